"""The sharded form against the pair-by-pair oracle: in plain torch, over gloo hosts, and compiled by XLA.

PJRT's CPU client runs the compiled program on any number of devices, so these tests check the program that a TPU host
would run, collectives included. XLA runs in processes of their own: the number of devices is
fixed when torch_xla is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.losses import Negatives, Slices, sharded_sigmoid_loss, sigmoid_loss
from tests.helpers.sharded import PLAIN, SHARDED, inputs


def unsplit(count, hosts=None):
    """n slices on one ordinary device: nothing to mark."""
    return Slices(count, mark=lambda tensor: tensor, sync=lambda: None, hosts=hosts)


def value_and_gradients(loss, leaves, count=None, **settings):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    image, text, *scalars = leaves
    if count is not None:
        image, text = (tensor.view(count, -1, tensor.shape[1]) for tensor in (image, text))
    value = loss(image, text, *scalars, **settings)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@settings(max_examples=60)
@given(
    name=st.sampled_from(["sigmoid", "softmax"]),
    count=st.integers(1, 5),
    pairs_per_device=st.integers(1, 7),
    tile_size=st.integers(1, 8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_number_of_slices_is_the_loss_of_the_batch(name, count, pairs_per_device, tile_size, dtype):
    leaves = inputs(count * pairs_per_device, dtype)
    expected = value_and_gradients(PLAIN[name], [leaf.double() for leaf in leaves])
    actual = value_and_gradients(SHARDED[name], leaves, count, slices=unsplit(count), tile_size=tile_size)
    # As for the ring: float64 differs by the order of additions; bfloat16 products round z by 10 * 2**-9 at most.
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    for want, got in zip(expected, actual, strict=True):
        atol = tolerance * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=2 * tolerance, atol=atol)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_random_negatives_are_those_of_the_global_batch(count):
    """The global indices decide: micro-batches lay pairs out in another order."""
    leaves, negatives = inputs(12), Negatives("random", 0.4, seed=7)
    indices = torch.arange(12, dtype=torch.int32).view(count, -1)
    expected = value_and_gradients(sigmoid_loss, leaves, negatives=negatives)
    settings = {"slices": unsplit(count), "negatives": negatives, "tile_size": 2}
    actual = value_and_gradients(sharded_sigmoid_loss, leaves, count, indices=indices, **settings)
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    other = value_and_gradients(sharded_sigmoid_loss, leaves, count, indices=11 - indices, **settings)
    assert not torch.allclose(other[0], expected[0])


def test_what_a_static_program_cannot_do_is_refused():
    image, text, *scalars = (leaf.view(1, *leaf.shape) if leaf.ndim else leaf for leaf in inputs(4))
    with pytest.raises(ValueError, match="negatives=hardest is not available on XLA devices"):
        sharded_sigmoid_loss(image, text, *scalars, slices=unsplit(1), negatives=Negatives("hardest", 0.5))
    with pytest.raises(ValueError, match="need the indices of the pairs"):
        sharded_sigmoid_loss(image, text, *scalars, slices=unsplit(1), negatives=Negatives("random", 0.5))


def on_host(rank, world_size, name, count, pairs_per_device, negatives):
    num_pairs = count * pairs_per_device
    image, text, *scalars = inputs(num_pairs * world_size)
    part = slice(rank * num_pairs, (rank + 1) * num_pairs)
    settings = {"slices": unsplit(count, dist.group.WORLD), "tile_size": 2}
    if negatives is not None:
        indices = torch.arange(part.start, part.stop, dtype=torch.int32).view(count, -1)
        settings |= {"negatives": negatives, "indices": indices}
    return value_and_gradients(SHARDED[name], [image[part], text[part], *scalars], count, **settings)


@pytest.mark.parametrize(("world_size", "count", "pairs_per_device"), [(2, 2, 3), (3, 1, 1), (2, 4, 1)])
@pytest.mark.parametrize(
    ("name", "negatives"), [("sigmoid", None), ("softmax", None), ("sigmoid", Negatives("random", 0.4, seed=7))]
)
def test_hosts_form_a_ring_around_their_devices(rank_groups, world_size, count, pairs_per_device, name, negatives):
    hosts = rank_groups(world_size).run(on_host, name, count, pairs_per_device, negatives)
    values, images, texts, scales, biases = zip(*hosts, strict=True)
    actual = [
        torch.stack(values).mean(),
        torch.cat(images) / world_size,
        torch.cat(texts) / world_size,
        torch.stack(scales).mean(),
        torch.stack(biases).mean(),
    ]
    leaves = inputs(world_size * count * pairs_per_device)
    if negatives is None:
        expected = value_and_gradients(PLAIN[name], leaves)
    else:
        expected = value_and_gradients(sigmoid_loss, leaves, negatives=negatives)
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


XLA_PROGRAM = """
import sys
from pathlib import Path

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime
from torch_xla.debug import metrics

from sigray.losses import Negatives, Slices
from tests.helpers.sharded import PLAIN, SHARDED, inputs
from tests.helpers.reference import random_features

torch_xla.runtime.use_spmd()
count, pairs, dim = int(sys.argv[1]), int(sys.argv[2]), 8
mesh = spmd.Mesh(np.arange(count), (count,), ("data",))
assert torch_xla.runtime.global_runtime_device_count() == count


def mark(tensor):
    spmd.mark_sharding(tensor, mesh, ("data", *[None] * (tensor.ndim - 1)))
    return tensor


slices = Slices(count, mark, torch_xla.sync)
for name in ("sigmoid", "softmax"):
    leaves = inputs(pairs, torch.float32, dim)
    twins = [leaf.double().requires_grad_() for leaf in leaves]
    want = PLAIN[name](*twins)
    want.backward()
    for repetition in range(3):
        image, text = (
            mark(leaf.view(count, -1, dim).to(torch_xla.device())).requires_grad_() for leaf in leaves[:2]
        )
        scalars = [leaf.to(torch_xla.device()).requires_grad_() for leaf in leaves[2:]]
        got = SHARDED[name](image, text, *scalars, slices=slices, tile_size=pairs // count // 2 or 1)
        got.backward()
        torch_xla.sync()
    print("compilations", metrics.metric_data("CompileTime")[0])
    # float32 against float64: as test_any_number_of_slices_is_the_loss_of_the_batch.
    torch.testing.assert_close(got.cpu().double(), want.detach(), rtol=2e-5, atol=1e-6)
    for tensor, twin in zip([image, text, *scalars], twins):
        torch.testing.assert_close(
            tensor.grad.cpu().double().view_as(twin), twin.grad, rtol=2e-5, atol=2e-5 * float(twin.grad.abs().max())
        )
print("equal on", count)
"""


def compiled_programs(folder):
    """Text of the optimized programs that XLA has written to a folder, those of a loss only."""
    texts = [path.read_text() for path in folder.glob("*SyncTensorsGraph*cpu_after_optimizations.txt")]
    return [text for text in texts if " dot(" in text or "dot." in text]


def largest_buffer(program):
    """Elements of the largest array in a compiled program, which is that of one device."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(torch.Size(map(int, shape.split(","))).numel() for shape in shapes)


def test_compiled_for_two_devices(torch_xla, tmp_path):
    check_compiled(2, tmp_path)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_compiled_for_other_numbers_of_devices(torch_xla, minutes, count, tmp_path):
    check_compiled(count, tmp_path)


def check_compiled(count: int, tmp_path: Path) -> None:
    """Value and gradients; one compilation each; hops instead of a gathered batch; no buffer of B x B, nor of b x B."""
    num_pairs = 64 * count
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(count),
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    }
    command = [sys.executable, "-c", XLA_PROGRAM, str(count), str(num_pairs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"equal on {count}" in done.stdout, done.stderr
    programs = compiled_programs(tmp_path)
    assert len(programs) == 2, "one program for the sigmoid, one for the softmax, in three repetitions each"
    # (n - 1) hops with texts in each of two directions, and the same with gradients; the softmax takes two rounds.
    hops = [program.count(" collective-permute(") for program in programs]
    assert sorted(hops) == [4 * (count - 1), 8 * (count - 1)]
    for program in programs:
        # 64 pairs of width 8 (9 with a normaliser) on each device, tiles of 32 x 32.
        assert largest_buffer(program) <= 32 * 32
        assert "all-gather" not in program
    sums = [program.count(" all-reduce(") for program in programs]
    assert sorted(sums) == ([2, 3] if count > 1 else [0, 0])
