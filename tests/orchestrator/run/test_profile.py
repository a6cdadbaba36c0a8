"""Where a step's time goes: the arithmetic against counting moments, real ranks without Ray, and the whole command."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigray.losses.spans import PREFIX, span
from sigray.orchestrator.config import ConfigError, load_config, override
from sigray.orchestrator.reports.drawing import png
from sigray.orchestrator.run.profile import draw, profile_config, read_profiles, remarks, split_of, table
from sigray.workers.storage import Storage
from sigray.workers.training.profile import PARTS, Profile, RankProfile, StepProfiler, split_steps
from tests.helpers.bare import train_bare
from tests.helpers.data import write_small_run
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import Sigray, SmallRun

WANTED = Profile(warm_up=4, steps=3)
NAMED = [part for part in PARTS if part != "other"]


@st.composite
def nested(draw: Any, begin: int, end: int, depth: int = 3) -> list[tuple[int, int, str]]:
    """Spans in [begin, end) that follow each other, with shorter ones inside them."""
    found, at = [], begin
    while at < end and depth and draw(st.booleans()):
        start = draw(st.integers(at, end - 1))
        stop = draw(st.integers(start + 1, end))
        found += [(start, stop, draw(st.sampled_from(NAMED))), *draw(nested(start, stop - 1, depth - 1))]
        at = stop
    return found


def event(name: str, start: int, stop: int, tid: int = 1, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, "tid": tid}


@given(st.data())
def test_parts_are_those_of_every_moment(data):
    """Two steps of 40 us; each microsecond belongs to the shortest span that holds it, or to none."""
    spans = data.draw(nested(0, 100))
    steps = [(10, 50), (50, 90)]
    events = [event(f"ProfilerStep#{n}", *step) for n, step in enumerate(steps)]
    events += [event(PREFIX + name, start, stop) for start, stop, name in spans]
    # The same on another thread, or of the device, is not the loop's.
    events += [event(f"{PREFIX}forward", 20, 40, tid=2), event(f"{PREFIX}forward", 20, 40, cat="gpu_user_annotation")]
    for found, (begin, end) in zip(split_steps(data.draw(st.permutations(events))), steps, strict=True):
        expected: Counter[str] = Counter()
        for at in range(begin, end):
            holding = [
                (stop - start, -number, name) for number, (start, stop, name) in enumerate(spans) if start <= at < stop
            ]
            expected[min(holding)[2] if holding else "other"] += 1
        assert list(found) == list(PARTS)
        assert {part: round(s * 1e6) for part, s in found.items() if s} == expected
        assert sum(found.values()) == pytest.approx((end - begin) / 1e6)


def test_a_span_is_nothing_while_nobody_profiles():
    assert span("forward") is span("backward")


@pytest.fixture
def config(tmp_path):
    path = write_small_run(
        tmp_path,
        train={"num_samples": 20 * 8, "global_batch_size": 8, "micro_batch_size": 2, "log_every_steps": 1},
        cluster={"num_workers": 2},
        checkpoint={"save_every_steps": 1000},
    )
    return load_config(path)


def profiled(rank, world_size, config):
    """A profiled run, and the wall time of each profiled step by a clock of its own."""
    ends = []
    original = StepProfiler.step_done

    def step_done(self):
        called = time.perf_counter()
        original(self)
        ends.append((called, time.perf_counter()))

    StepProfiler.step_done = step_done
    losses = train_bare(rank, world_size, config, profile=WANTED)["losses"]
    walls = [called - begun for (_, begun), (called, _) in pairwise(ends)]
    return losses, walls[WANTED.warm_up - 1 :]


def test_the_parts_of_a_step_add_up_to_its_wall_time(config, tmp_path):
    ranks = run_on_ranks(2, profiled, config)
    storage = Storage(config.storage_uri)
    profiles = read_profiles(storage, config.folder)
    assert [one.rank for one in profiles] == [0, 1]
    for one, (_, walls) in zip(profiles, ranks, strict=True):
        assert len(one.steps) == len(walls) == WANTED.steps + 1
        # Between the two clocks lie a few lines of Python, and all the rest the machine does then.
        assert sum(sum(parts.values()) for parts in one.steps) == pytest.approx(sum(walls), rel=0.3)
        for parts in one.steps:
            assert set(parts) == set(PARTS)
            for part in ("to device", "forward", "loss: tiles", "loss: ring", "backward", "optimizer", "metrics"):
                assert parts[part] > 0, part
            assert parts["device program"] == 0
        assert [step["checkpoint"] > 0 for step in one.steps] == [False] * WANTED.steps + [True]
        trace = json.loads(gzip.decompress(storage.read(f"profile/rank-{one.rank:04d}.json.gz")))["traceEvents"]
        assert any(str(item.get("name")).startswith("aten::") for item in trace)

    split = split_of(profiles)
    assert split.num_steps == WANTED.steps
    picture = tmp_path / "step.png"
    png(lambda figure: draw(figure, split), picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert table(split).row_count == 1 + len([part for part in PARTS if any(rank[part] for rank in split.ranks)])
    assert any("a checkpoint holds training up for" in line for line in remarks(split, config))

    # Looking does not change what is seen: the same losses, to the bit.
    plain = load_config(tmp_path / "run.yaml", ["run.name=plain"])
    expected = run_on_ranks(2, train_bare, plain, WANTED.total)[0]["losses"]
    assert ranks[0][0] == expected


def test_ranks_are_told_apart():
    """The numbers of the table by hand: two ranks, the last step of each holds the checkpoint."""

    def step(**ms: float) -> dict[str, float]:
        return dict.fromkeys(PARTS, 0.0) | {part: value / 1000 for part, value in ms.items()}

    first = [step(forward=30, other=10), step(forward=50, other=10), step(forward=30, checkpoint=70)]
    second = [step(forward=60), step(forward=60), step(forward=20, checkpoint=40)]
    split = split_of([RankProfile(0, "cpu", 0.04, first), RankProfile(1, "cpu", 0.06, second)])
    assert split.ranks[0]["forward"] == pytest.approx(0.04)
    assert split.ranks[1]["forward"] == pytest.approx(0.06)
    assert split.step_s == pytest.approx(0.055)
    assert split.plain_step_s == pytest.approx(0.05)
    assert split.checkpoint_s == pytest.approx(0.07)


def test_a_run_that_is_too_short_is_refused(config):
    with pytest.raises(ConfigError, match=r"train\.num_samples=160 are 20 steps, and a profile takes 31"):
        profile_config(config, Profile(20, 10))
    phased = override(config, ["phases=[{start: 80, image_size: 32}]"], "the test")
    with pytest.raises(ConfigError, match=r"phases\.0\.start=80 are 10 steps, and a profile takes 11"):
        profile_config(phased, Profile(5, 5))
    wanted = profile_config(config, WANTED)
    assert wanted.run.name == "small-profile"
    assert wanted.train == config.train


def test_the_command(own_ray, tmp_path):
    """`sigray profile` under Ray: table, picture, traces, and a timeline with the data-shard workers' blocks."""
    small = SmallRun(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}
    run = Sigray(tmp_path / "log", environment, "profile", small.config, "--steps", "5", "--warm-up", "4")
    assert run.wait() == 0, run.output()
    assert "mean of 5 steps on 2 training worker(s)" in run.output()
    folder = tmp_path / "runs" / "small-profile"
    names = {path.name for path in (folder / "profile").iterdir()}
    ranks = {f"rank-000{rank}{ending}" for rank in (0, 1) for ending in (".json.gz", "-steps.json")}
    assert names == {"step.png", "ray_timeline.json", *ranks}
    assert not (folder / "checkpoints").exists()
    timeline = json.loads((folder / "profile" / "ray_timeline.json").read_text())
    assert any("DataWorkerActor.block" in item["cat"] for item in timeline)
