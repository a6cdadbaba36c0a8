"""Why a run is pending, in one sentence: against counting by hand, and read from real files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sigray.orchestrator.cluster.pending import (
    Autoscaler,
    Demand,
    Host,
    NodeType,
    autoscaler_of,
    demand_of,
    find_autoscaler,
    pending_reason,
)
from sigray.orchestrator.config import ClusterConfig
from sigray.orchestrator.resources import check_slices

amounts = st.fixed_dictionaries(
    {}, optional={"CPU": st.integers(1, 8), "GPU": st.integers(1, 4), "training": st.integers(1, 2)}
)
demands = st.builds(Demand, st.integers(1, 6), amounts.filter(bool))
BY_HAND = Autoscaler(runs=False)


def host(total: dict[str, int], **more: str) -> Host:
    return Host(dict(total), dict(total), **more)


hosts = st.lists(st.builds(host, amounts), max_size=4)
types = st.lists(
    st.builds(NodeType, st.sampled_from(["a", "b"]), amounts.filter(bool), st.integers(0, 3)),
    max_size=2,
    unique_by=lambda kind: kind.name,
).map(tuple)
autoscalers = st.one_of(
    st.none(), st.just(BY_HAND), st.builds(Autoscaler, st.just(True), types, st.one_of(st.none(), st.integers(0, 4)))
)


def fits(demand: Demand, machines: list[dict[str, int]]) -> bool:
    """One worker after the other, each on the first machine that it fits: correct because all workers are alike."""
    left = [dict(machine) for machine in machines]
    for _ in range(demand.num_workers):
        for machine in left:
            if all(machine.get(name, 0) >= amount for name, amount in demand.resources.items()):
                for name, amount in demand.resources.items():
                    machine[name] -= amount
                break
        else:
            return False
    return True


def can_be_met(sentence: str) -> bool | None:
    """Whether a sentence says that no person has to act; None: it leaves that open."""
    if "cannot see" in sentence or "names no resources" in sentence:
        return None
    return "cannot be met" not in sentence and "no autoscaler runs" not in sentence


@given(demands, hosts, autoscalers)
def test_what_can_be_met_is_what_some_set_of_machines_meets(demand, up, autoscaler):
    """Every set of nodes that the autoscaler may have, tried one by one."""
    up = [dataclasses.replace(one, group="by hand") for one in up]  # none of them is the autoscaler's
    sentence = pending_reason(demand, up, autoscaler)
    found = can_be_met(sentence)
    here = [dict(one.total) for one in up]
    if fits(demand, here):
        assert found is True
    elif autoscaler is None:
        assert found is None
    else:
        ranges = [range(kind.max_nodes + 1) for kind in autoscaler.types]
        most = autoscaler.max_nodes if autoscaler.max_nodes is not None else 99
        sets = [counts for counts in itertools.product(*ranges) if sum(counts) <= most]
        more = [
            [kind.resources for kind, count in zip(autoscaler.types, counts, strict=True) for _ in range(count)]
            for counts in sets
        ]
        assert found is any(fits(demand, [*here, *machines]) for machines in more)
    assert ("cannot be met" in sentence) == (found is False and autoscaler.runs)


@given(demands, hosts, autoscalers)
def test_it_is_one_sentence_with_both_numbers(demand, up, autoscaler):
    sentence = pending_reason(demand, up, autoscaler)
    assert "\n" not in sentence
    assert sentence.startswith(f"needs {demand.num_workers} training worker")
    has = re.search(r", has (\d+)", sentence)
    if has:
        totals = [one.total for one in up]
        most = next(n for n in itertools.count() if not fits(dataclasses.replace(demand, num_workers=n + 1), totals))
        assert int(has[1]) == most
    else:
        assert "has them" in sentence


@given(demands, hosts, st.builds(host, amounts), autoscalers)
def test_another_machine_never_makes_it_worse(demand, up, another, autoscaler):
    if can_be_met(pending_reason(demand, up, autoscaler)):
        more = [*up, dataclasses.replace(another, group="by hand")]
        assert can_be_met(pending_reason(demand, more, autoscaler))


GPU = Demand(4, {"CPU": 12.0, "GPU": 1.0, "training": 1.0})
SLICE = Demand(4, {"CPU": 1.0, "TPU": 4.0}, pod_type="v4-32")
GPU_HOST = {"CPU": 12.0, "GPU": 1.0, "training": 1.0}
GPU_TYPE = NodeType("gpu", GPU_HOST, 8)


def tpu_hosts(count: int, name: str, kind: str = "v4-32") -> list[Host]:
    return [host({"CPU": 240, "TPU": 4}, slice_name=name, pod_type=kind) for _ in range(count)]


@pytest.mark.parametrize(
    ("demand", "up", "autoscaler", "sentence"),
    [
        (GPU, [host(GPU_HOST)] * 2, Autoscaler(True, (GPU_TYPE,)),
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 2: waiting for the autoscaler (gpu)"),
        (GPU, [host(GPU_HOST)] * 2, BY_HAND,
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 2: no autoscaler runs: start hosts by "
         "hand"),
        (GPU, [], None,
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 0: waiting for hosts; the driver cannot see "
         "whether an autoscaler runs"),
        (GPU, [Host(GPU_HOST, {"CPU": 12.0})] * 4, BY_HAND,
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 4, 0 free: waiting until the others are "
         "released"),
        (GPU, [], Autoscaler(True, (NodeType("data", {"CPU": 16.0, "data": 16.0}, 8),)),
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 0: cannot be met by this cluster file: no "
         "node type offers GPU"),
        (GPU, [host(GPU_HOST)], Autoscaler(True, (dataclasses.replace(GPU_TYPE, max_nodes=3),)),
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 1: cannot be met by this cluster file: its node "
         "types fit at most 3 (max_workers)"),
        (GPU, [], Autoscaler(True, (dataclasses.replace(GPU_TYPE, max_nodes=3),) * 2, 3),
         "needs 4 training workers of 12 CPU, 1 GPU, 1 training, has 0: cannot be met by this cluster file: its node "
         "types fit at most 3 (max_workers)"),
        (Demand(1, {"GPU": 8.0}), [], Autoscaler(True, (GPU_TYPE,)),
         "needs 1 training worker of 8 GPU, has 0: cannot be met by this cluster file: no node type has more than "
         "1 GPU"),
        (SLICE, tpu_hosts(2, "a"), Autoscaler(True, (NodeType("tpu", {"CPU": 240, "TPU": 4}, 1, 4, "v4-32"),)),
         "needs 4 TPU hosts of v4-32, has 2: waiting for the autoscaler (tpu)"),
        # Two halves of slices are no slice, and other slices are none.
        (SLICE, [*tpu_hosts(2, "a"), *tpu_hosts(2, "b"), *tpu_hosts(4, "c", "v4-64")], BY_HAND,
         "needs 4 TPU hosts of v4-32, has 2: no autoscaler runs: start hosts by "
         "hand"),
        (SLICE, [], Autoscaler(True, (NodeType("tpu", {"CPU": 240, "TPU": 4}, 1, 2, "v4-16"),)),
         "needs 4 TPU hosts of v4-32, has 0: cannot be met by this cluster file: no node type is a v4-32"),
        (SLICE, tpu_hosts(4, "a"), BY_HAND,
         "needs 4 TPU hosts of v4-32, has them: waiting for Ray to place them"),
    ],
)  # fmt: skip
def test_the_sentences(demand, up, autoscaler, sentence):
    assert pending_reason(demand, up, autoscaler) == sentence


@pytest.mark.parametrize("path", ["cluster.yaml", "clusters/aws_gpu.yaml", "clusters/gcp_tpu.yaml"])
def test_each_cluster_file_can_bring_up_what_it_is_for(path):
    """Their own node types, as `sigray cluster check` counts them, are the demand."""
    autoscaler = autoscaler_of(yaml.safe_load(Path(path).read_text()))
    training = [kind for kind in autoscaler.types if "training" in kind.resources]
    assert training
    for kind in training:
        own = {"GPU": kind.resources.get("GPU", 0), "TPU": kind.resources.get("TPU", 0), "training": 1.0}
        demand = Demand(kind.hosts if kind.pod_type else kind.max_nodes, own, kind.pod_type)
        assert can_be_met(pending_reason(demand, [], autoscaler)) is True
        if kind.pod_type:
            more = dataclasses.replace(demand, num_workers=demand.num_workers + 1)
            assert can_be_met(pending_reason(more, [], autoscaler)) is False


@pytest.mark.parametrize("num_workers", [2, 8, [2, 4], [4, 8]])
def test_workers_fill_whole_slices(num_workers):
    def cluster(**changes):
        content = {"accelerator": "tpu", "tpu_type": "TPU-V4", "tpu_topology": "2x2x4", "num_workers": 4}
        return ClusterConfig(**content | changes)

    check_slices(cluster())
    with pytest.raises(ValueError, match=r"slice of 2x2x4 has 4 host\(s\), .*: set cluster.num_workers to 4"):
        check_slices(cluster(num_workers=num_workers))
    with pytest.raises(ValueError, match="tpu_topology=3x5x7: "):
        check_slices(cluster(tpu_topology="3x5x7"))


def test_a_config_names_its_slice():
    config = ClusterConfig(accelerator="tpu", tpu_type="TPU-V4", tpu_topology="2x2x4", num_workers=4)
    demand = demand_of(config, 4)
    assert (demand.pod_type, demand.resources["TPU"], demand.text()) == ("v4-32", 4.0, "4 TPU hosts of v4-32")
    assert demand_of(ClusterConfig(accelerator="cuda"), 2).text() == "2 training workers of 1 CPU, 1 GPU"


def test_the_autoscaler_is_found_by_its_process(tmp_path):
    """As Ray 2.60 starts it; one of another cluster is none of ours."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(Path("cluster.yaml").read_text())
    entry = "/env/ray/autoscaler/_private/monitor.py"
    commands = {
        "10": ["python", "-u", entry, "--gcs-address=10.0.0.1:6379", f"--autoscaling-config={file}"],
        "11": ["python", "-u", entry, "--gcs-address=10.0.0.2:6379"],
        "12": ["vim", "/env/ray/autoscaler/_private/monitor.py"],
    }
    for number, words in commands.items():
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes("\0".join(words).encode())
    found = find_autoscaler("10.0.0.1:6379", tmp_path)
    assert {kind.name for kind in found.types} == {"data", "gpu", "tpu_host", "tpu_slice"}
    slice_type = next(kind for kind in found.types if kind.name == "tpu_slice")
    assert (slice_type.hosts, slice_type.pod_type, slice_type.max_nodes) == (2, "v4-16", 1)
    assert find_autoscaler("10.0.0.2:6379", tmp_path) == BY_HAND
    assert find_autoscaler("10.0.0.3:6379", tmp_path) is None
