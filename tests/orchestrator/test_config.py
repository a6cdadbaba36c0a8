"""Configs: what is wrong is named with key, value and what is allowed, before anything is imported or started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, load_config, parse_config
from tests.helpers.runs import EXAMPLES

SMALL = {
    "run": {"name": "small"},
    "data": {"shards": "tars"},
    "model": {"name": "ViT-B-16-SigLIP"},
    "train": {"num_samples": 1000, "global_batch_size": 100},
}


def write(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.global_batchsize=512",
            r"train.global_batchsize: unknown key \(value 512\); did you mean 'global_batch",
        ),
        ("trian.x=1", r"trian: unknown key .* did you mean 'train'\? allowed here: run, data, model, train"),
        ("train.global_batch_size=many", r"train.global_batch_size='many': should be a valid integer"),
        ("train.global_batch_size=0", r"train.global_batch_size=0: should be greater than 0"),
        ("optim.schedule=linear", r"optim.schedule='linear': should be 'cosine', 'constant' or 'rsqrt'"),
        ("cluster.num_workers=3", r"global_batch_size=100 does not divide by cluster.num_workers=3: 99 or 102 would"),
        ("train.micro_batch_size=30", r"micro_batch_size=30 does not divide the 100 pairs .*: 25 or 50 would"),
        ("train.micro_batch_size=101", r"micro_batch_size=101 does not divide the 100 pairs .*: 100 would"),
        ("loss.negatives_fraction=0.5", r"loss: negatives_fraction=0.5 has no effect with negatives=all"),
        ("loss={name: softmax, negatives: hardest}", r"loss: negatives=hardest needs name=sigmoid"),
        ("optim.num_warmup_samples=2000", r"num_warmup_samples=2000 is larger than train.num_samples=1000"),
        (
            "optim.num_cooldown_samples=2000",
            r"num_cooldown_samples=2000 together are larger than train.num_samples=1000",
        ),
        ("train.global_batch_size=2000", r"global_batch_size=2000 is larger than train.num_samples=1000"),
        ("model.towers={embed_dim: 8}", r"model: give one of name and towers: both are given"),
        ("eval.sets={a: {shards: x, templates: [photo]}}", r"eval.sets.a: template 'photo' has no \{\}"),
        ("eval.sets.a.shard=x", r"eval.sets.a.shard: unknown key .* did you mean 'shards'"),
        ("cluster.hang_timeout_s=60", r"cluster.hang_timeout_s=60 is not above data.worker_timeout_s=\d+: "),
        ("eval.pixel_baseline=true", r"eval.pixel_baseline=true needs a set with classes"),
        ("run.name=../up", r"run.name='../up': "),
        ("train", r"'train' is not an override: section.key=value expected"),
        ("train.num_samples.x=1", r"'num_samples' is a value, not a section"),
        ("optim.lr=[", r"not YAML"),
    ],
)
def test_one_clear_message(tmp_path, override, message):
    path = write(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_a_locked_tower_has_no_layer_decay(tmp_path):
    with pytest.raises(ConfigError, match=r"optim.layer_decay.text has no effect with model.locked=\['text'\]"):
        load_config(write(tmp_path, SMALL), ["model.locked=[text]", "optim.layer_decay={text: 0.5}"])


def test_override_makes_the_section_that_it_needs(tmp_path):
    assert load_config(write(tmp_path, SMALL), ["eval.sets.a.shards=/x"]).eval.sets["a"].shards == "/x"


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, SMALL), ["train.precision=fp8", "optim.lr=-1", "data.lanes=3"])
    assert all(key in str(error.value) for key in ("train.precision='fp8'", "optim.lr=-1", "data.lanes"))


def test_missing_file_and_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such file or directory"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match="bad.yaml: not YAML"):
        load_config(tmp_path / "bad.yaml")


def test_resolved_config_loads_to_itself(tmp_path):
    config = load_config(write(tmp_path, SMALL), ["optim.lr=1e-4", "run.seed=3"])
    assert config.optim.lr == 1e-4
    assert parse_config(yaml.safe_load(config.to_yaml()), "again") == config


def test_relative_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(
        write(tmp_path, SMALL), ["data.shards=[tars, 's3://bucket/tars']", "run.storage=s3://bucket/runs"]
    )
    assert config.data.shards == [str(tmp_path / "tars"), "s3://bucket/tars"]
    assert config.storage_uri == "s3://bucket/runs/small"
    assert config.folder == tmp_path / "runs" / "small"


def test_resume_may_change_the_machines_and_not_the_problem():
    saved = parse_config(SMALL, "saved")
    machines = {**SMALL, "cluster": {"num_workers": 4}, "train": {**SMALL["train"], "log_every_steps": 3}}
    check_resume(saved, parse_config(machines, "wanted"))
    other = {**SMALL, "model": {"name": "ViT-B-32"}, "optim": {"lr": 0.5}}
    with pytest.raises(ConfigError) as error:
        check_resume(saved, parse_config(other, "wanted"))
    assert "model.name: the run was started with 'ViT-B-16-SigLIP', now 'ViT-B-32'" in str(error.value)
    assert "optim.lr: the run was started with 0.001, now 0.5" in str(error.value)


def test_resume_refuses_captions_of_equal_weight_in_another_order():
    """The numbers that draw a caption go to the sources in this order, so the stream would be another."""

    def config(captions):
        return parse_config(SMALL | {"data": {"shards": "tars", "captions": captions}}, "test")

    saved = config({"txt": 1, "alt": 1, "long": 2})
    check_resume(saved, config({"long": 2, "txt": 1, "alt": 1}))
    with pytest.raises(ConfigError, match=r"order \['long', 'txt', 'alt'\], now \['long', 'alt', 'txt'\]"):
        check_resume(saved, config({"alt": 1, "txt": 1, "long": 2}))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_tells_its_command(path):
    load_config(path)
    assert re.search(rf"sigray train {path}", path.read_text())


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize(("configured", "expected"), [(None, {1: 25, 2: 25, 4: None}), (10, {1: 10, 2: 10, 4: 5})])
def test_micro_batches_of_a_range_of_workers(configured, expected):
    """100 pairs: 25 on each of four workers."""
    train = SMALL["train"] | {"micro_batch_size": configured}
    config = parse_config(SMALL | {"train": train, "cluster": {"num_workers": [1, 4]}}, "small")
    assert {size: config.micro_batch_size(size) for size in expected} == expected


PLACES = ["data.shards", "run.dir", "run.storage", "embeddings.store", "eval.sets.a.shards", "eval.sets.a.linear_probe"]
PLACES += ["data.shards.b.shards", "model.init_from", "model.tokenizer", "eval.sets.a.classes", "data.shard_cache"]


@pytest.mark.parametrize("url", ["gcs://b/x.tar", "pipe:cat x.tar", "ftp://h/x.tar"])
@pytest.mark.parametrize("key", PLACES)
def test_another_kind_of_url_is_refused_with_its_key(tmp_path, key, url):
    content = SMALL | {"eval": {"sets": {"a": {"shards": "x", "classes": "c.json"}}}}
    if key.startswith("data.shards."):
        content |= {"data": {"shards": {"b": {"shards": "x", "weight": 1}}}}
    with pytest.raises(ConfigError, match=rf"  {key}: '{url}': \w+:(//)? is not read here: give a local path") as error:
        load_config(write(tmp_path, content), [f"{key}={url}"])
    assert len(str(error.value).splitlines()) == 2


def test_endings_are_mended_where_they_are_unambiguous(tmp_path):
    keys = ["data.image_keys=[.JPG, jpg, Seg.png]", "data.captions={.TXT: 1, 'JSON:captions.En': 2}"]
    data = load_config(write(tmp_path, SMALL), keys).data
    assert data.image_keys == ["jpg", "seg.png"]
    assert data.captions == {"txt": 1, "json:captions.En": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_keys=[a/jpg]", r"data.image_keys: 'a/jpg' can be no member's ending"),
        ("data.image_keys=['*.jpg']", r"data.image_keys: '\*.jpg' can be no member's ending"),
        ("data.image_keys=['jpg;png']", r"data.image_keys: 'jpg;png' can be no member's ending"),
        ("data.image_keys=['']", r"data.image_keys: '' can be no member's ending"),
        ("data.image_keys=[]", r"data.image_keys: \[\] names no ending"),
        ("data.captions={TXT: 1, .txt: 2}", r"data.captions: \['TXT', '.txt'\] name a source twice"),
        ("data.captions={'json:': 1}", r"data.captions: 'json:' can match no member"),
        ("data.captions={'json:a..b': 1}", r"data.captions: 'json:a..b' can match no member"),
        ("data.captions={'txt:line': 1}", r"data.captions: 'txt:line' can match no member: .* or txt:lines"),
        ("data.captions={'txt:a': 1}", r"data.captions: 'txt:a' can match no member"),
        ("data.captions={'.': 1}", r"data.captions: '.' can be no member's ending"),
        (
            "eval.sets={a: {shards: x, language_captions: 'json:{language}.'}}",
            "language_captions: .* can match no member",
        ),
        ("data.shards=[]", r"data.shards: \[\] names no shards"),
        ("data.shards=''", r"data.shards: '' names no shards"),
        ("run.storage=''", r"run.storage: is empty: give a local path"),
    ],
)
def test_what_can_never_match_is_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, SMALL), [override])


def test_schema_describes_every_key():
    schema = RunConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    lanes = schema["$defs"]["DataConfig"]["properties"]["num_lanes"]
    assert "order" in lanes["description"]


def test_config_error_exits_with_2_and_starts_nothing(tmp_path):
    program = (
        "import sys; from sigray.orchestrator.cli.main import main\n"
        f"code = main(['train', '{write(tmp_path, SMALL)}', 'train.x=1'])\n"
        "print(code, [name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []", done
    assert "train.x: unknown key (value 1)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_overrides_may_stand_behind_an_option(tmp_path, capsys):
    from sigray.orchestrator.cli.main import main

    path = str(write(tmp_path, SMALL))
    assert main(["train", path, "--overwrite", "train.x=1", "optim.y=2"]) == 2
    error = capsys.readouterr().err
    assert "train.x: unknown key" in error
    assert "optim.y: unknown key" in error
    with pytest.raises(SystemExit, match="2"):
        main(["train", path, "--overwirte"])
    assert "unrecognized arguments: --overwirte" in capsys.readouterr().err


def test_help_teaches():
    sigray = Path(sys.executable).parent / "sigray"
    done = subprocess.run([sigray, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("python -m examples.emoji36", "sigray resume", "section.key=value", "Exit codes"):
        assert word in done.stdout
