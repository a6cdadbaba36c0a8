"""Phases: pure arithmetic of samples seen, and runs that are the same however they are interrupted."""

from __future__ import annotations

import shutil
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file

from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, load_config, override, parse_config
from sigray.orchestrator.run.preflight import check_model_config
from sigray.workers.checkpoint.index import COMMIT, list_checkpoints
from sigray.workers.config import OptimConfig
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.worker import build_order
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.ledger import audit
from sigray.workers.training.optim import learning_rate
from sigray.workers.training.phases import mixes_of, phase_of_checkpoint, phases_of
from sigray.workers.training.step import Trainer
from tests.helpers import pretrained
from tests.helpers.bare import Recorder, train_bare
from tests.helpers.data import TOWERS
from tests.helpers.phases import BATCH, FIRST, NUM_STEPS, SECOND, phased_run
from tests.helpers.ranks import run_on_ranks


def config_of(phases, num_samples=96, batch=8, **sections):
    content = {
        "run": {"name": "x", "dir": "/tmp/x"},
        "data": {"shards": "/tmp/none"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": num_samples, "global_batch_size": batch},
        "phases": phases,
    }
    return parse_config(content | sections, "x.yaml")


starts = st.one_of(st.integers(1, 200), st.decimals("0.01", "0.99", places=2).map(float))


@settings(max_examples=200, deadline=None)
@given(
    begins=st.lists(starts, min_size=1, max_size=3),
    stretches=st.lists(st.sampled_from([1, 2, 3.75]), min_size=3, max_size=3),
    fresh=st.lists(st.booleans(), min_size=3, max_size=3),
    batch=st.sampled_from([1, 3, 8]),
    num_samples=st.integers(1, 200),
)
def test_a_phase_is_a_function_of_samples_seen(begins, stretches, fresh, batch, num_samples):
    """Slow twin: go through the run sample by sample."""
    phases = [
        {"start": start, "stretch": stretch, "schedule": "fresh" if is_fresh else "kept", "loss": {"tile_size": number}}
        for number, (start, stretch, is_fresh) in enumerate(zip(begins, stretches, fresh, strict=False), 1)
    ]
    num_steps = -(-num_samples // batch)
    wanted = [
        Fraction(str(start)) * (num_samples if start < 1 else 1) for start in begins
    ]  # samples at which each phase begins
    steps = [next(step for step in range(10_000) if step * batch >= start) for start in wanted]
    is_in_the_first_step = any(1 <= start < batch for start in begins)
    is_in_order = sorted(set(steps)) == steps and 0 < steps[0] <= steps[-1] < num_steps
    if is_in_the_first_step or not is_in_order or num_samples < batch:
        with pytest.raises(ConfigError, match=r"must begin later|has no step|lies in the first step"):
            config_of(phases, num_samples, batch)
        return
    found = phases_of(config_of(phases, num_samples, batch))
    assert [phase.first_step for phase in found] == [0, *steps]
    assert [phase.end_step for phase in found] == [*steps, num_steps]
    place, places, lengths = Fraction(0), [], []
    for sample in range(num_steps * batch):
        number = sum(sample >= step * batch for step in steps)
        if number and fresh[number - 1] and sample == steps[number - 1] * batch:
            lengths.append(place)
            place = Fraction(0)
        places.append((number, len(lengths), place))
        place += 1 / Fraction(str(stretches[number - 1])) if number else 1
    lengths.append(place)
    for step in range(num_steps):
        number, schedule, expected = places[step * batch]
        phase = phase_of_checkpoint(found, step + 1)
        assert phase.number == number
        assert phase.schedule.place(step * batch) == pytest.approx(float(expected), abs=1e-9)
        assert phase.schedule.length == pytest.approx(float(lengths[schedule]), abs=1e-9)


def test_a_run_without_phases_has_one():
    (only,) = phases_of(config_of([]))
    assert (only.first_step, only.end_step, only.changes) == (0, 12, ())
    assert (only.schedule.place(40), only.schedule.length) == (40, 96)


def test_what_a_phase_leaves_out_is_as_in_the_phase_before():
    config = config_of(
        [{"start": 16, "loss": {"name": "softmax"}, "optim": {"lr": 0.5}}, {"start": 32, "optim": {"eps": 0.25}}],
        optim={"beta1": 0.5},
    )
    first, second, third = phases_of(config)
    assert (first.loss.name, second.loss.name, third.loss.name) == ("sigmoid", "softmax", "softmax")
    assert [(each.optim.lr, each.optim.eps, each.optim.beta1) for each in (first, second, third)] == [
        (1e-3, 1e-8, 0.5),
        (0.5, 1e-8, 0.5),
        (0.5, 0.25, 0.5),
    ]
    assert second.changes == ("loss.name=softmax", "optim.lr=0.5")
    assert third.changes == ("optim.eps=0.25",)
    assert RunConfig(**config.model_dump()) == config
    # A key that a phase does not give follows the rest of the config, in a sweep or on a command line.
    other = override(config, ["optim.beta1=0.25", "phases.1.optim.eps=0.125", "loss.tile_size=8"], "x.yaml")
    assert [(each.optim.beta1, each.optim.eps, each.loss.tile_size) for each in phases_of(other)] == [
        (0.25, 1e-8, 8),
        (0.25, 1e-8, 8),
        (0.25, 0.125, 8),
    ]


RECIPE = {
    "model": {"towers": TOWERS, "heads": {}},
    "train": {"num_samples": 96, "global_batch_size": 8, "ema": 32},
}


def test_a_section_keeps_the_keys_that_a_phase_leaves_out():
    phases = [
        {"start": 16, "loss": {"distill": {"local_weight": 0.5, "num_local_views": 3}}},
        {"start": 32, "loss": {"distill": {"local_weight": 2, "global_scale": [0.4, 1.0]}}},
        {"start": 48, "loss": {"distill": None}},
        {"start": 64, "loss": {"distill": {"masked_weight": 0}}},
    ]
    found = phases_of(config_of(phases, **RECIPE))
    given = [each.loss.distill for each in found]
    assert given[0] is given[3] is None
    assert [(each.local_weight, each.masked_weight, each.num_local_views) for each in given if each] == [
        (0.5, 0.25, 3),
        (2.0, 0.25, 3),
        (1.0, 0.0, 8),
    ]
    assert [each.changes for each in found[1:]] == [
        ("loss.distill={'local_weight': 0.5, 'num_local_views': 3}",),
        ("loss.distill.local_weight=2",),
        ("loss.distill=None",),
        ("loss.distill={'masked_weight': 0}",),
    ]
    outside = config_of([{"start": 32, "loss": {"distill": {"local_weight": 2}}}], **RECIPE, loss={"distill": {}})
    other = override(outside, ["loss.distill.num_local_views=4"], "x.yaml")
    assert [each.loss.distill.num_local_views for each in phases_of(other)] == [4, 4]


@pytest.mark.parametrize("value", [2, "{}", "null", "[1]"])
@pytest.mark.parametrize("key", ["local_weight", "teacher", "no_key"])
def test_a_key_of_a_section_that_a_phase_begins_is_not_put_before_it(key, value):
    """It would begin self-distillation with the run, and the phase keep its own value."""
    config = config_of(
        [{"start": 16, "image_size": 32}, {"start": 32, "loss": {"distill": {"masked_weight": 0.5}}}], **RECIPE
    )
    with pytest.raises(ConfigError) as refused:
        override(config, [f"loss.distill.{key}={value}"], "x.yaml")
    assert f"phases.1 gives it: give phases.1.loss.distill.{key}, or all of loss.distill" in str(refused.value)
    other = override(config, ["phases.1.loss.distill.local_weight=2"], "x.yaml")
    assert phases_of(other)[2].loss.distill.local_weight == 2
    whole = override(config, ["loss.distill={local_weight: 3}"], "x.yaml")
    assert [each.loss.distill.local_weight for each in phases_of(whole)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ("loss", {"caption_weight": [1]}, "phases.0.loss.caption_weight=[1]"),
        ("loss", {"caption_weight": {"a": 1}}, "phases.0.loss.caption_weight={'a': 1}"),
        ("loss", {"caption_weight": "much"}, "phases.0.loss.caption_weight='much'"),
        ("loss", {"caption_weight": None}, "phases.0.loss.caption_weight=None"),
        ("loss", {"distill": 1}, "phases.0.loss.distill=1"),
        ("loss", {"distill": "on"}, "phases.0.loss.distill='on'"),
        ("loss", {"distill": [{}]}, "phases.0.loss.distill=[{}]"),
        ("loss", {"distill": {"local_weight": [1]}}, "phases.0.loss.distill.local_weight=[1]"),
        ("loss", {"distill": {"local_wait": 1}}, "phases.0.loss.distill.local_wait: unknown key"),
        ("loss", {"name": ["softmax"]}, "phases.0.loss.name=['softmax']"),
        ("optim", {"lr": {"a": 1}}, "phases.0.optim.lr={'a': 1}"),
        ("optim", {"lr": None}, "phases.0.optim.lr=None"),
        ("optim", {"num_warmup_samples": [8]}, "phases.0.optim.num_warmup_samples=[8]"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_with_its_key(section, given, message):
    with pytest.raises(ConfigError) as refused:
        config_of([{"start": 40, section: given}])
    assert message in str(refused.value)


BAD = {
    "two at one step": ([{"start": 40}, {"start": 39}], "phases.1.start=39: it begins at step 5 of 12"),
    "after the end": ([{"start": 96}], "phases.0.start=96: it begins at step 12 of 12"),
    "unknown key": ([{"start": 40, "loss": {"nam": "softmax"}}], "phases.0.loss.nam: unknown key"),
    "weights of no mixture": ([{"start": 40, "weights": {"a": 1}}], "phases.0.weights={'a': 1.0}"),
    "another optimizer": ([{"start": 40, "optim": {"name": "lion"}}], "phases.0.optim.name cannot change"),
    "warm-up": (
        [{"start": 40, "schedule": "fresh", "optim": {"num_warmup_samples": 57}}],
        "phases.0.optim: num_warmup_samples=57 and num_cooldown_samples=0 together are larger than the schedule of 56",
    ),
    "warm-up before it": (
        [{"start": 40, "schedule": "fresh"}],
        "optim: num_warmup_samples=41 and num_cooldown_samples=0 together are larger than the schedule of 40",
    ),
    "no change": ([{"start": 40}], "phases.0.start=40: the phase changes nothing"),
    "a fraction": ([{"start": 1.0, "image_size": 32}], "phases.0.start=1 lies in the first step"),
    "keys that contradict": (
        [{"start": 40, "loss": {"negatives_fraction": 0.5}}],
        "phases.0.loss.negatives_fraction=0.5 has no effect with negatives=all",
    ),
    "a type": ([{"start": 40, "optim": {"lr": "high"}}], "phases.0.optim.lr='high'"),
    "store": ([{"start": 40, "image_size": 32}], "phases.0.image_size=32: embeddings.store holds those of one"),
    "xla": ([{"start": 40, "loss": {"negatives": "hardest"}}], "phases.0.loss.negatives=hardest cannot run with"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_by_name(name):
    phases, message = BAD[name]
    sections = {
        "store": {
            "embeddings": {"store": "/tmp/store"},
            "model": {"towers": TOWERS, "locked": ["visual"], "init_from": "/tmp/weights"},
        },
        "warm-up before it": {"optim": {"num_warmup_samples": 41}},
        "xla": {"cluster": {"accelerator": "xla_cpu", "devices_per_worker": 1}},
    }
    with pytest.raises(ConfigError) as refused:
        config_of(phases, **sections.get(name, {}))
    assert message in str(refused.value)


def test_a_weight_of_each_dataset_is_needed(tmp_path):
    for weights in ({"fields": 1}, {"fields": 0, "more": 0}, {"fields": 1, "mor": 1}):
        with pytest.raises(ConfigError, match=r"phases.0.weights=.*\{fields, more\}"):
            phased_run(tmp_path, phases=[{"start": 40, "weights": weights}])


def test_a_dataset_may_join_later(tmp_path):
    later = [{"start": 40, "weights": {"fields": 1, "more": 1}}]
    config = phased_run(tmp_path, "data.shards.more.weight=0", phases=later)
    manifest = scan_shards(config.data.shards, config.data)
    order = build_order(manifest, config.data, 0, mixes_of(config))
    assert [order.num_of_dataset(1, place) for place in (40, 48)] == [0, 4]
    with pytest.raises(ConfigError, match=r"data.shards.more.weight=0, and no phase gives it another"):
        phased_run(tmp_path, "data.shards.more.weight=0", phases=[])
    with pytest.raises(ConfigError, match="each weight is 0"):
        phased_run(tmp_path, "data.shards.more.weight=0", "data.shards.fields.weight=0", phases=later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 4}, r"phases.0.image_size=4: model.image_size=4: .*patch_size=8 is larger"),
        ({"init_fresh": ["visual.head"]}, r"phases.0.init_fresh='visual.head' matches no parameter that trains"),
    ],
)
def test_towers_that_cannot_go_on_are_refused_before_the_run(change, message):
    with pytest.raises(ValueError, match=message):
        check_model_config(config_of([{"start": 40, **change}]))


def test_a_tower_of_siglip_can_be_resized():
    check_model_config(
        config_of([{"start": 40, "image_size": 64}], model={"towers": pretrained.SIGLIP}), reads_tokenizer=False
    )


def test_fractions_pin_the_length_of_a_run():
    config = config_of([{"start": 0.5, "image_size": 32}])
    longer = override(config, ["train.num_samples=192"], "x.yaml")
    with pytest.raises(ConfigError, match=r"phases begin at fractions of it \(0.5\), which would move"):
        check_resume(config, longer)
    config = config_of([{"start": 48, "image_size": 32}])
    check_resume(config, override(config, ["train.num_samples=192"], "x.yaml"))
    with pytest.raises(ConfigError, match="phases"):
        check_resume(config, config_of([{"start": 40, "image_size": 32}]))


# ----------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Config, result, lines of metrics by step, and the checkpoints' folder of a run of two ranks."""
    config = phased_run(tmp_path_factory.mktemp("phases"))
    return config, run_on_ranks(2, train_bare, config)[0]


def same_files(config, expected):
    """Check the last checkpoint, and those that both runs wrote: none is begun while one is being written."""
    found, wanted = hashes(config), hashes(expected)
    assert found.keys() >= {FIRST, SECOND, NUM_STEPS}
    assert {step: found[step] for step in found if step in wanted} == {
        step: wanted[step] for step in wanted if step in found
    }


def hashes(config):
    """Hashes of the files of each checkpoint, by step."""
    return {
        info.step: {name: file["xxh3_128"] for name, file in info.files.items()}
        for info in list_checkpoints(Storage(config.storage_uri))
    }


def test_the_phases_of_a_run_do_what_they_say(undisturbed):
    _, found = undisturbed
    assert found["phases"] == [(1, FIRST), (2, SECOND)]
    lines = {line["step"]: line for line in found["lines"]}
    assert [lines[step]["train/phase"] for step in range(1, 13)] == [0] * 5 + [1] * 4 + [2] * 3
    base, own = OptimConfig(), OptimConfig(lr=2e-3, num_warmup_samples=8)
    rates = [lines[step]["train/learning_rate"] for step in range(1, 13)]
    assert rates[:FIRST] == [learning_rate(base, 8 * step, 40) for step in range(5)]
    length = 4 * BATCH + 3 * BATCH / 2
    places = [0, 8, 16, 24, 32, 36, 40]
    assert rates[FIRST:] == pytest.approx([learning_rate(own, place, length) for place in places], rel=1e-12)


def test_each_sample_of_each_dataset_comes_once(undisturbed):
    config, _ = undisturbed
    manifest = scan_shards(config.data.shards, config.data)
    order = build_order(manifest, config.data, 0, mixes_of(config))
    found = audit(Storage(config.storage_uri), manifest, order, BATCH)
    assert found.is_exact
    taken = [[order.num_of_dataset(number, BATCH * step) for number in (0, 1)] for step in (FIRST, SECOND, NUM_STEPS)]
    assert taken == [[30, 10], [38, 34], [62, 34]]
    assert {epoch.dataset: epoch.num_used for epoch in found.epochs if epoch.epoch == 0} == {"fields": 62, "more": 23}
    assert not audit(Storage(config.storage_uri), manifest, build_order(manifest, config.data, 0), BATCH).is_exact


def state(config, step, name="model.safetensors"):
    return load_file(config.folder / f"checkpoints/step-{step:010d}" / name)


def optimizer_steps(config, step):
    """Steps that the optimizer has taken with each parameter, by the shape of the parameter."""
    path = config.folder / f"checkpoints/step-{step:010d}/optimizer.pt"
    return {tuple(each["exp_avg"].shape): int(each["step"]) for each in torch.load(path)["state"].values()}


def test_a_border_resizes_and_refreshes_what_it_names(undisturbed):
    """Slow twin: resize by open_clip, take fresh weights from a new model, step by hand."""
    config, _ = undisturbed
    phases = phases_of(config)
    for number, border in ((1, FIRST), (2, SECOND)):
        model = phases[number].model
        before, after = state(config, border), state(config, border + 1)
        place = "visual.positional_embedding"
        patches = (model.image_size // 8) ** 2
        assert before[place].shape != after[place].shape == (1 + patches, 32)
        assert phase_of_checkpoint(phases, border) == phases[number - 1]
        assert phase_of_checkpoint(phases, border + 1) == phases[number]
        expected = dict(before)
        resize_pos_embed(expected, build_model(model))
        projection = "text.text_projection"
        if number == 2:
            trainer = trainer_of(config, phases[2])
            expected[projection] = trainer.module.state_dict()[projection]
            assert not torch.equal(expected[projection], before[projection])
        lr = phases[number].optim.lr
        for name, tensor in after.items():
            # One step of AdamW moves a weight by the rate and its decay, and by a little more with the momentum.
            assert (tensor - expected[name]).abs().max() <= 10 * lr, name
        steps = optimizer_steps(config, border + 1)
        assert steps[tuple(after[place].shape)] == 1
        assert steps[tuple(after[projection].shape)] == (1 if number == 2 else border + 1)
        assert steps[tuple(after["visual.proj"].shape)] == border + 1
        average = state(config, border + 1, "ema.safetensors")
        assert torch.equal(average[place], after[place])
        assert not torch.equal(average["visual.proj"], after["visual.proj"])


def trainer_of(config, phase):
    from sigray.workers.device import open_device

    return Trainer(
        phase.model, phase.optim, phase.loss, open_device("cpu", 0, "fp32"), schedule=phase.schedule,
        global_batch_size=BATCH, micro_batch_size=None, seed=config.run.seed, phase=phase.number,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [FIRST - 1, FIRST, SECOND, SECOND + 1])
def test_an_interrupted_run_has_the_same_bits(undisturbed, tmp_path, stop):
    expected, whole = undisturbed
    config = phased_run(tmp_path)
    begun = run_on_ranks(2, train_bare, config, stop)[0]
    rest = run_on_ranks(2, train_bare, config)[0]
    assert max(begun["losses"]) == stop
    assert min(rest["losses"]) == stop + 1
    assert begun["losses"] | rest["losses"] == whole["losses"]
    same_files(config, expected)


@pytest.mark.parametrize(
    ("stop", "first_lost", "name"),
    [
        (FIRST + 2, FIRST, "model.safetensors"),  # the run needs a trainer of the phase before
        (SECOND + 1, SECOND + 1, "optimizer.pt"),  # fresh parameters must be fresh again
    ],
)
def test_a_damaged_checkpoint_at_a_border_costs_only_steps(undisturbed, tmp_path, stop, first_lost, name):
    expected, _ = undisturbed
    config = phased_run(tmp_path)
    run_on_ranks(2, train_bare, config, stop)
    for step in [step for step in hashes(config) if step >= first_lost]:
        path = config.folder / f"checkpoints/step-{step:010d}" / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    left = max(step for step in hashes(config) if step < first_lost)
    rest = run_on_ranks(2, train_bare, config)[0]
    assert min(rest["losses"]) == left + 1
    same_files(config, expected)


def damage_the_border(rank, world_size, config):
    """Rank 0 damages the checkpoint of the first border as soon as it is durable; returns what the hooks saw."""
    original, seen = Recorder.checkpointed, []

    def checkpointed(self, info):
        original(self, info)
        if info.step == FIRST and not seen:
            seen.append(info)
            path = config.folder / f"checkpoints/{info.name}/model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    with mock.patch.object(Recorder, "checkpointed", checkpointed):
        return train_bare(rank, world_size, config)


def test_a_border_whose_checkpoint_is_damaged_is_gone_through_again(undisturbed, tmp_path):
    expected, _ = undisturbed
    config = phased_run(tmp_path)
    found = run_on_ranks(2, damage_the_border, config)[0]
    assert found["phases"] == [(1, FIRST), (2, SECOND)]
    assert found["starts"][0] == 0 < found["starts"][1] < FIRST
    same_files(config, expected)


def test_a_run_killed_in_the_middle_of_a_border_goes_on(undisturbed, tmp_path):
    """The checkpoint of the border was not committed."""
    expected, _ = undisturbed
    config = phased_run(tmp_path)
    run_on_ranks(2, train_bare, config, FIRST)
    (config.folder / f"checkpoints/step-{FIRST:010d}" / COMMIT).unlink()
    run_on_ranks(2, train_bare, config)
    same_files(config, expected)


@pytest.mark.usefixtures("minutes")
def test_another_size_of_the_group_gives_the_same_run(undisturbed, tmp_path):
    """Resized at a border, and inside of a phase; with micro-batches."""
    _, whole = undisturbed
    config = phased_run(tmp_path)
    losses = {}
    for world_size, stop in ((2, FIRST), (1, FIRST + 2), (4, SECOND), (2, None)):
        losses |= run_on_ranks(world_size, train_bare, config, stop)[0]["losses"]
    assert losses == pytest.approx(whole["losses"], rel=2e-5)
    shutil.rmtree(config.folder)
    small = load_config(tmp_path / "run.yaml", ["train.micro_batch_size=2", "train.activation_checkpointing=true"])
    assert run_on_ranks(2, train_bare, small)[0]["losses"] == pytest.approx(whole["losses"], rel=2e-5)


@pytest.mark.usefixtures("minutes")
def test_split_weights_go_through_the_borders_too(undisturbed, tmp_path):
    _, whole = undisturbed
    config = phased_run(tmp_path, "sharding.weights=split")
    begun = run_on_ranks(2, train_bare, config, FIRST)[0]["losses"]
    rest = run_on_ranks(2, train_bare, config)[0]["losses"]
    assert begun | rest == pytest.approx(whole["losses"], rel=2e-5)
