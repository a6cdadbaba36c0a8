"""The fused tile against the same lines in float64: sums, the tile, and the form without a compiler."""

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.losses import fused
from sigray.losses.fused import eager_terms_, negative_terms_, pair_terms_, row_dots
from sigray.native import compiled, cpu_flags
from tests.helpers.losses import tile_of

DTYPES = [torch.float32, torch.bfloat16]


def both(x, scale, bias):
    """What the fused form and its float64 twin make of a tile: ((tile, sums), (tile, sums))."""
    results = []
    for function, dtype in ((negative_terms_, torch.float32), (eager_terms_, torch.float64)):
        tile = x.clone() if dtype == torch.float32 else x.double()
        sums = torch.zeros(3, len(x), dtype=dtype)
        function(tile, torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype), sums)
        results.append((tile.double(), sums.double()))
    return results


def test_the_compiled_library_is_what_is_tested_here():
    assert fused._library() is not None, "no C compiler on this machine: the tests below would test the eager form"


@settings(max_examples=80)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 117.3, 1e6]),
    bias=st.sampled_from([-16.0, -10.0, 0.0, 5.0]),
    excluded=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_float64_twin(rows, columns, dtype, scale, bias, excluded, seed):
    (tile, sums), (want_tile, want_sums) = both(tile_of(rows, columns, dtype, seed, excluded), scale, bias)
    # z is rounded to 2**-24 of |scale x| + |bias| before exp, which costs as much relative error; the polynomials add
    # 4e-7. The tile is then rounded to its own dtype.
    relative = 1e-6 + 2e-7 * min(scale + abs(bias), 100)
    torch.testing.assert_close(sums, want_sums, rtol=relative, atol=1e-30 + relative * float(want_sums.abs().max()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(tile, want_tile, rtol=relative + eps, atol=1e-37)


def test_exponentials_and_logarithms_over_the_whole_range():
    x = torch.cat([torch.linspace(-1, 1, 200_001), torch.linspace(-0.01, 0.01, 100_001)])[None]
    z = 128 * x  # exact: only exp, log1p and the division are tested
    (tile, _), (want, _) = both(x, 128.0, 0.0)
    inside = want > 2e-38  # below -87 the value of -87 stays
    error = ((tile - want) / want)[inside].abs()
    assert float(error.max()) < 1e-6, f"at z = {z[inside][error.argmax()]}"
    for part in x.split(1, dim=1)[::997]:
        (_, sums), (_, want_sums) = both(part, 128.0, 0.0)
        torch.testing.assert_close(sums, want_sums, rtol=2e-6, atol=1e-36)


WIDTHS = {"AVX-512": ("avx512f", []), "AVX": ("avx", ["-mno-avx512f"])}


@pytest.fixture(scope="module", params=list(WIDTHS))
def library_of_a_width(request):
    """The tile in C, compiled for vectors of 64 or 32 bytes."""
    flag, options = WIDTHS[request.param]
    if flag not in cpu_flags():
        pytest.skip(f"this processor has no {request.param}")
    library = compiled(fused._SOURCE, flags=["-fopenmp", *options], without="no test")
    assert library is not None
    pointer, size, scalar = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for function in (library.tile_float32, library.tile_bfloat16):
        function.argtypes, function.restype = [pointer, size, size, scalar, scalar, pointer, size], None
    return library


@pytest.mark.parametrize("columns", [950, 1040, 2048, 4096, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_logits_around_zero(library_of_a_width, columns, dtype):
    """Every factor (1 + e) is as large as it can be, 2: their product must be folded before it leaves float32."""
    x = 1e-3 * tile_of(3, columns, dtype, seed=columns)
    x[0] = 0
    tile, sums = x.clone(), torch.zeros(3, 3)
    function = library_of_a_width.tile_float32 if dtype == torch.float32 else library_of_a_width.tile_bfloat16
    function(tile.data_ptr(), *x.shape, 1.0, 0.0, sums.data_ptr(), sums.stride(0))
    want_tile, want_sums = x.double(), torch.zeros(3, 3, dtype=torch.float64)
    eager_terms_(want_tile, torch.tensor(1.0).double(), torch.tensor(0.0).double(), want_sums)
    # At most 625 additions in a lane, each rounded to 2**-24 of a sum that grows; 1e-6 was seen. The last sum is of
    # terms of both signs.
    torch.testing.assert_close(sums[:2].double(), want_sums[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[2].double(), want_sums[2], rtol=0, atol=1e-5 * columns * 1e-3)
    torch.testing.assert_close(tile.double(), want_tile, rtol=1e-6 + torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_swallowed(dtype):
    for poison in (torch.nan, torch.inf):
        x = tile_of(2, 33, dtype, seed=0)
        x[1, 32] = poison
        sums = torch.zeros(3, 2)
        negative_terms_(x, torch.tensor(10.0), torch.tensor(-10.0), sums)
        assert torch.isfinite(sums[:, 0]).all()
        assert not torch.isfinite(sums[:, 1]).all()


@settings(max_examples=60)
@given(
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([-3.0, 0.0, 1.0, 117.3, 1e6]),
    bias=st.sampled_from([-16.0, 0.0, 5.0]),
    seed=st.integers(0, 10**6),
)
def test_pairs_equal_the_float64_twin(size, dtype, scale, bias, seed):
    tile, start = tile_of(size + 3, size + 5, dtype, seed), torch.rand(3, size + 3)
    cosines = tile_of(1, size, torch.float32, seed + 1)[0]
    found, sums = tile.clone(), start.clone()
    pair_terms_(found.diagonal(2)[:size], cosines, torch.tensor(scale), torch.tensor(bias), sums[:, 1 : size + 1])
    z = (torch.tensor(scale) * cosines + bias).double()
    dz = -torch.sigmoid(-z)
    want, want_sums = tile.double(), start.double()
    want.diagonal(2)[:size].copy_(dz)
    want_sums[:, 1 : size + 1] += torch.stack([torch.nn.functional.softplus(-z), dz, dz * cosines.double()])
    # z is rounded to float32, here with one rounding more than there may be in a fused multiply-add.
    torch.testing.assert_close(sums.double(), want_sums, rtol=1e-6 + 2e-7 * min(abs(scale) + abs(bias), 100), atol=1e-6)
    at, far = (m.diagonal(2)[:size].double() for m in (found, want))
    torch.testing.assert_close(at, far, rtol=2e-5 + torch.finfo(dtype).eps, atol=1e-37)
    found.diagonal(2)[:size].zero_(), tile.diagonal(2)[:size].zero_()
    assert torch.equal(found, tile)  # nothing else was touched


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_that_is_nan_stays_one(dtype):
    x, sums = torch.zeros(2, dtype=dtype), torch.zeros(3, 2)
    pair_terms_(x, torch.tensor([torch.nan, 0.5]), torch.tensor(10.0), torch.tensor(-10.0), sums)
    assert x.isnan().tolist() == [True, False]
    assert sums.isnan().tolist() == [[True, False]] * 3


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 37), (64, 768)])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_dots_of_rows(rows, columns, is_contiguous):
    left, right = (tile_of(rows, columns, torch.bfloat16, seed) for seed in (0, 1))
    if not is_contiguous:
        left = left.T.contiguous().T
    want = (left.double() * right.double()).sum(dim=1)
    torch.testing.assert_close(row_dots(left, right).double(), want, rtol=0, atol=1e-6 * columns)


def test_bfloat16_is_rounded_to_nearest_even():
    x = tile_of(3, 300, torch.bfloat16, seed=0)
    rounded, exact = x.clone(), x.float()
    for tile in (rounded, exact):
        negative_terms_(tile, torch.tensor(10.0), torch.tensor(-3.0), torch.zeros(3, 3))
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scales_that_are_no_exponentials(scale):
    (tile, sums), (want_tile, want_sums) = both(tile_of(3, 40, torch.float32, seed=1, excluded=0.2), scale, -2.0)
    torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tile, want_tile, rtol=1e-5, atol=1e-30)


INTERPRETED = """
import torch

from sigray.losses.fused import eager_terms_
from sigray.losses.fused_cuda import BLOCK, negative_terms_cuda_
from tests.helpers.losses import tile_of

for rows, columns, scale, bias, excluded in [
    (1, 1, 10.0, -10.0, 0.0), (3, 37, 10.0, -10.0, 0.3), (2, BLOCK, 117.3, -16.0, 0.1), (2, BLOCK + 5, 1e6, 5.0, 0.0),
    (2, 2 * BLOCK + 1, 1e-3, 0.0, 1.0), (4, 300, -3.0, -2.0, 0.2),
]:
    for dtype in (torch.float32, torch.bfloat16):
        x = tile_of(rows, columns, dtype, seed=rows, excluded=excluded)
        tile, sums = x.clone(), torch.ones(3, rows + 2)[:, :rows]
        negative_terms_cuda_(tile, torch.tensor(scale), torch.tensor(bias), sums)
        want_tile, want_sums = x.double(), torch.ones(3, rows, dtype=torch.float64)
        eager_terms_(want_tile, torch.tensor(scale).double(), torch.tensor(bias).double(), want_sums)
        # As test_equals_the_float64_twin.
        relative = 1e-6 + 2e-7 * min(abs(scale) + abs(bias), 100)
        atol = relative * float(want_sums.abs().max())
        torch.testing.assert_close(sums.double(), want_sums, rtol=relative, atol=atol)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(tile.double(), want_tile, rtol=relative + eps, atol=1e-37)
for poison in (torch.nan, torch.inf):
    x, sums = tile_of(2, 33, torch.float32, seed=0), torch.zeros(3, 2)
    x[1, 32] = poison
    negative_terms_cuda_(x, torch.tensor(10.0), torch.tensor(-10.0), sums)
    assert torch.isfinite(sums[:, 0]).all() and not torch.isfinite(sums[:, 1]).all(), (poison, sums)
print("equal")
"""


def test_the_kernel_for_cuda_interpreted():
    """Triton's interpreter runs the kernel on the CPU, against the same twin as the C form."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when the kernel is made
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert "equal" in done.stdout, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_for_cuda_compiles(capability, dtype):
    """To machine code of an A100 and an H100, by Triton's own compiler and assembler; no GPU is needed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from sigray.losses.fused_cuda import BLOCK, NUM_WARPS, tile_kernel

    signature = {
        "x": f"*{dtype}",
        "scale": "*fp32",
        "bias": "*fp32",
        "sums": "*fp32",
        "columns": "i32",
        "stride": "i32",
    }
    source = triton.compiler.ASTSource(tile_kernel, signature | {"BLOCK": "constexpr"}, {"BLOCK": BLOCK})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
    assert "st.local" not in made.asm["ptx"], "registers are spilled"


PROGRAM_OF_A_TILE = """
from sigray.losses.fused import negative_terms_
x = torch.linspace(-1, 1, 300 * 211).view(300, 211).contiguous()
results = x, torch.zeros(3, 300)
negative_terms_(x, torch.tensor(10.0), torch.tensor(-3.0), results[1])
"""


def test_the_number_of_threads_does_not_change_a_bit():
    begin = "import torch, hashlib\nfor number in (1, 2, 3):\n    torch.set_num_threads(number)\n"
    end = "print(hashlib.sha256(b''.join(tensor.numpy().tobytes() for tensor in results)).hexdigest())"
    script = begin + textwrap.indent(PROGRAM_OF_A_TILE + end, "    ")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    sums = done.stdout.split()
    assert [len(each) for each in sums] == [64] * 3, done.stderr
    assert len(set(sums)) == 1


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_the_eager_form_runs_and_says_so(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fused, "_library", fused.functools.cache(fused._library.__wrapped__))
    x = tile_of(3, 20, torch.float32, seed=3)
    with pytest.warns(UserWarning, match=f"runs unfused .*{compiler} failed"):
        (_, sums), (_, want) = both(x, 10.0, -10.0)
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-6)
