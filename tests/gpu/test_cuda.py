"""On a CUDA device: the numbers of the CPU and of float64, and what only a GPU has. CI has none and skips all of it.

python -m pytest -m gpu
"""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from sigray.losses import Negatives, sigmoid_loss, sigmoid_loss_plain
from sigray.losses.fused import eager_terms_, negative_terms_
from sigray.losses.ring import ring_softmax_loss
from sigray.losses.softmax import softmax_loss_plain
from sigray.orchestrator.config import load_config
from sigray.workers.checkpoint.writer import CheckpointWriter, load_checkpoint, load_newest
from sigray.workers.config import CheckpointConfig
from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.device import open_device
from sigray.workers.storage import Storage
from sigray.workers.training.step import BadStep
from tests.helpers import steps
from tests.helpers.bare import OneWorker, train_bare
from tests.helpers.data import write_small_run
from tests.helpers.losses import scalars, tile_of, value_and_gradients
from tests.helpers.reference import random_features, step_gradients
from tests.helpers.steps import MODEL, NUM_PAIRS, SEED, WITH_DROPOUT, check_gradients, global_batch, part_of

CUDA = "cuda"


@pytest.fixture(autouse=True)
def strict_float32(cuda):
    """As the tests expect it, after any other test."""
    open_device(CUDA, 0, "fp32")


@pytest.fixture
def nccl(tmp_path):
    """A group of this rank alone: one GPU takes one rank."""
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=torch.device(CUDA, 0)
    )
    yield
    dist.destroy_process_group()


def relative_error(actual, expected):
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


# The loss


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 37), (64, 1024), (129, 2053), (500, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "bias", "excluded"), [(10.0, -10.0, 0.0), (117.3, -16.0, 0.3), (1e6, 5.0, 0.1), (-3.0, -2.0, 1.0)]
)
def test_the_kernel_equals_its_float64_twin(rows, columns, dtype, scale, bias, excluded):
    x = tile_of(rows, columns, dtype, seed=rows, excluded=excluded)
    tile, sums = x.to(CUDA, copy=True), torch.ones(3, rows + 2, device=CUDA)[:, :rows]
    negative_terms_(tile, torch.tensor(scale, device=CUDA), torch.tensor(bias, device=CUDA), sums)
    want, want_sums = x.to(CUDA).double(), torch.ones(3, rows, dtype=torch.float64, device=CUDA)
    eager_terms_(want, torch.tensor(scale).double().to(CUDA), torch.tensor(bias).double().to(CUDA), want_sums)
    # As in tests/losses/test_fused.py, and the order of a row's additions on top.
    relative = 2e-6 + 2e-7 * min(abs(scale) + abs(bias), 100)
    torch.testing.assert_close(sums.double(), want_sums, rtol=relative, atol=relative * float(want_sums.abs().max()))
    torch.testing.assert_close(tile.double(), want, rtol=relative + torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_swallows_no_nan(poison, dtype):
    x, sums = tile_of(2, 33, dtype, seed=0).to(CUDA), torch.zeros(3, 2, device=CUDA)
    x[1, 32] = poison
    negative_terms_(x, torch.tensor(10.0, device=CUDA), torch.tensor(-10.0, device=CUDA), sums)
    assert torch.isfinite(sums[:, 0]).all()
    assert not torch.isfinite(sums[:, 1]).all()


# Of value and gradients, in the Euclidean norm. bfloat16: features, cosines and dL/dz have 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_pairs", "tile_size"), [(1, None), (5, None), (1000, 256), (5000, None)])
def test_the_loss_equals_the_plain_equation_in_float64(dtype, num_pairs, tile_size):
    features = [random_features(num_pairs, 96, seed=seed).to(CUDA, dtype) for seed in (0, 1)]
    inputs = [tensor.to(CUDA) for tensor in scalars(10.0, -10.0, torch.float32 if dtype.itemsize < 8 else dtype)]
    actual = value_and_gradients(lambda *x: sigmoid_loss(*x, tile_size=tile_size), *features, *inputs)
    expected = value_and_gradients(sigmoid_loss_plain, *(tensor.double() for tensor in (*features, *inputs)))
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("which", ["random", "hardest", "easiest"])
def test_chosen_negatives_are_those_of_the_cpu(which):
    features = [random_features(700, 64, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    negatives = Negatives(which, 0.05, 7)

    def run(device):
        inputs = [tensor.to(device) for tensor in (*features, *scalars(10.0, -10.0, torch.float32))]
        return value_and_gradients(lambda *x: sigmoid_loss(*x, negatives=negatives, tile_size=256), *inputs)

    # Cosines differ in the last bits, so a few of the 24,465 that are kept may be others at the threshold.
    for got, want in zip(run(CUDA), run("cpu"), strict=True):
        assert relative_error(got, want) < (1e-5 if which == "random" else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_equals_the_plain_equation(dtype):
    features = [random_features(900, 96, seed=seed).to(CUDA, dtype) for seed in (0, 1)]
    scale, bias = (tensor.to(CUDA) for tensor in scalars(10.0, 0.0, torch.float32))
    *actual, _ = value_and_gradients(lambda *x: ring_softmax_loss(*x, tile_size=256), *features, scale, bias)
    expected = value_and_gradients(softmax_loss_plain, *(tensor.double() for tensor in (*features, scale)))
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < 3 * TOLERANCE[dtype]


def test_the_loss_needs_no_b_by_b_memory():
    features = [
        random_features(32768, 512, seed=seed, dtype=torch.float32).to(CUDA).requires_grad_() for seed in (0, 1)
    ]
    scale, bias = (tensor.to(CUDA).requires_grad_() for tensor in scalars(10.0, -10.0, torch.float32))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sigmoid_loss(*features, scale, bias).backward()
    grown = torch.cuda.max_memory_allocated() - before
    gradients, tile = 2 * 32768 * 512 * 4, 8192 * 8192 * 4
    assert grown < gradients + 1.5 * tile  # B x B would be 4 GiB


def test_equal_passes_give_equal_bits():
    features = [random_features(9000, 128, seed=seed, dtype=torch.float32).to(CUDA) for seed in (0, 1)]
    inputs = *features, *(tensor.to(CUDA) for tensor in scalars(10.0, -10.0, torch.float32))
    first, second = (value_and_gradients(sigmoid_loss, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The device


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 2e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-5, 1e-3)]
)
def test_float32_products_are_rounded_where_the_precision_says_so(precision, least, most):
    open_device(CUDA, 0, precision)
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)).to(CUDA) for seed in (0, 1))
    assert least <= relative_error(a @ b, a.double() @ b.double()) < most


make_trainer = functools.partial(steps.make_trainer, 1, accelerator=CUDA)


def gradients_of(trainer, num_steps=1):
    batch = part_of(0, 1)
    batch.images, batch.tokens = batch.images.pin_memory(), batch.tokens.pin_memory()
    for step in range(num_steps):
        loss = float(trainer.step(replace(batch, step=step)).loss)
    gradients = {name: parameter.grad for name, parameter in trainer.module.named_parameters()}
    return loss, {
        name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu() for name, grad in gradients.items()
    }


@pytest.mark.parametrize("num_micro_batches", [1, 4, 16])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_step_equals_the_oracle(num_micro_batches, activation_checkpointing, compile_blocks):
    expected_loss, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    loss, gradients = gradients_of(
        make_trainer(
            micro_batch_size=NUM_PAIRS // num_micro_batches,
            activation_checkpointing=activation_checkpointing,
            compile_blocks=compile_blocks,
        )
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_gradients(gradients, expected)


def test_a_step_over_nccl_equals_the_oracle(nccl):
    expected_loss, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    trainer = make_trainer(micro_batch_size=NUM_PAIRS // 4)
    assert trainer._device.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    loss, gradients = gradients_of(trainer)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_gradients(gradients, expected)


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_split_weights_equal_the_oracle(nccl, compile_blocks):
    expected_loss, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    trainer = make_trainer(splits_weights=True, micro_batch_size=NUM_PAIRS // 2, compile_blocks=compile_blocks)
    loss, gradients = gradients_of(trainer)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_gradients(gradients, expected)


def test_dropout_is_replayed_in_the_second_pass():
    """The twin: the same draws, one graph over all micro-batches."""
    size = NUM_PAIRS // 4
    twin = make_trainer(model=WITH_DROPOUT, micro_batch_size=size)
    parts = [twin._encode(part_of(0, 1), slice(n * size, (n + 1) * size), n) for n in range(4)]
    image, text = (torch.cat(kind).double() for kind in zip(*parts, strict=True))
    loss = sigmoid_loss_plain(image, text, twin.module.logit_scale.exp().double(), twin.module.logit_bias.double())
    loss.backward()
    expected = {name: parameter.grad.double().cpu() for name, parameter in twin.module.named_parameters()}
    actual, gradients = gradients_of(make_trainer(model=WITH_DROPOUT, micro_batch_size=size))
    assert actual == pytest.approx(float(loss.detach()), rel=1e-5)
    check_gradients(gradients, expected)
    assert actual != gradients_of(make_trainer(micro_batch_size=size))[0], "dropout is off"


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_the_host_does_not_wait_for_the_device_in_a_step(num_micro_batches):
    """Each wait leaves the device idle until the host has caught up. (CUDA's mode does not see waits for events.)"""
    size = NUM_PAIRS // num_micro_batches
    trainer, batch = make_trainer(precision="bf16", micro_batch_size=size), part_of(0, 1)
    batch.images, batch.tokens = batch.images.pin_memory(), batch.tokens.pin_memory()
    trainer.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            trainer.step(replace(batch, step=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(wait) for wait in waits if "synchroniz" in str(wait.message)]


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_nan_is_named_before_the_weights_change(num_micro_batches):
    size = NUM_PAIRS // num_micro_batches
    trainer = make_trainer(precision="bf16", micro_batch_size=size)
    trainer.step(part_of(0, 1))
    with torch.no_grad():
        trainer.module.get_parameter("text.token_embedding.weight").fill_(torch.nan)
    before = {name: parameter.clone() for name, parameter in trainer.module.named_parameters()}
    with pytest.raises(BadStep, match="NaN or infinity in text_features of rank 0, micro-batch 0"):
        trainer.step(replace(part_of(0, 1), step=1))
    for name, parameter in trainer.module.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_bfloat16_keeps_the_direction(num_micro_batches):
    expected_loss, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    loss, gradients = gradients_of(make_trainer(precision="bf16", micro_batch_size=NUM_PAIRS // num_micro_batches))
    assert loss == pytest.approx(expected_loss, rel=5e-3)
    flat, want = (torch.cat([g[name].flatten().double() for name in sorted(expected)]) for g in (gradients, expected))
    assert float(torch.nn.functional.cosine_similarity(flat, want, dim=0)) > 0.999


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "compile_blocks": True}])
def test_the_same_steps_give_the_same_bits(settings):
    """A resumed run ends with the weights of the unbroken one only if this holds."""
    (first, weights), (second, same) = (
        (gradients_of(trainer, num_steps=4)[0], trainer.module.state_dict())
        for trainer in (make_trainer(**settings), make_trainer(**settings))
    )
    assert first == second
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_batches_arrive_whole_while_the_device_is_behind(tmp_path):
    """The loader uses page-locked memory again, and it is written to from elsewhere; no copy may read it after that."""
    config = load_config(write_small_run(tmp_path, train={"num_samples": 960, "global_batch_size": 16}), [])
    manifest = scan_shards(config.data.shards, config.data)
    order = build_order(manifest, config.data, 0)

    def loader(page_lock):
        worker = DataWorker(manifest, config.data, config.model, seed=0)
        source = OneWorker(worker, shares_memory=page_lock is not None)
        return Loader(
            order, source, config.data, image_kind=image_kind(manifest, config.model), global_batch_size=16,
            rank=0, world_size=1, first_step=0, last_step=60, page_lock=page_lock,
        )  # fmt: skip

    device = open_device(CUDA, 0, "fp32")
    busy, sums, pinned = torch.randn(4096, 4096, device=CUDA), [], []
    for batch in loader(device.page_lock):
        busy = busy @ busy / 64  # the device falls behind the host
        pinned.append(batch.images.is_pinned() and batch.tokens.is_pinned())
        images, tokens = device.to_device(batch.images, batch.tokens)
        weights = torch.arange(1, images[0].numel() + 1, device=CUDA, dtype=torch.float64)
        sums.append((images.flatten(1).double() @ weights, tokens.double().sum(dim=1)))
        batch.release()
        del images, tokens
    assert all(pinned)
    weights = weights.cpu()
    for batch, (image_sums, token_sums) in zip(loader(None), sums, strict=True):
        assert torch.equal(batch.images.flatten(1).double() @ weights, image_sums.cpu())
        assert torch.equal(batch.tokens.double().sum(dim=1), token_sums.cpu())


def test_a_checkpoint_holds_the_state_at_its_step(tmp_path):
    """Training continues at once after `save`: the copy must be complete by then."""
    trainer, storage = make_trainer(), Storage(str(tmp_path))
    gradients_of(trainer, num_steps=2)
    writer = CheckpointWriter(
        storage, trainer.module, trainer.optimizer, CheckpointConfig(), {"a": "model"}, warn=print
    )
    expected = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    writer.save(2, 2 * NUM_PAIRS)
    gradients_of(trainer, num_steps=3)
    assert not torch.equal(expected["logit_bias"], trainer.module.state_dict()["logit_bias"])
    writer.close()
    other = make_trainer()
    load_newest(storage, lambda info: load_checkpoint(storage, info, other.module, other.optimizer), print)
    for name, tensor in other.module.state_dict().items():
        assert tensor.device.type == CUDA
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def small_run(tmp_path):
    return write_small_run(
        tmp_path,
        train={"num_samples": 192, "global_batch_size": 16, "micro_batch_size": 8, "log_every_steps": 1},
        optim={"lr": 3e-3, "num_warmup_samples": 32},
        checkpoint={"save_every_steps": 4},
        cluster={"num_workers": 1, "accelerator": "cuda"},
    )


def test_a_run_has_the_losses_of_the_cpu(small_run):
    runs = {
        accelerator: train_bare(
            0, 1, load_config(small_run, [f"run.name={accelerator}", f"cluster.accelerator={accelerator}"])
        )
        for accelerator in ("cpu", CUDA)
    }
    assert len(runs[CUDA]["losses"]) == 12
    assert runs[CUDA]["losses"] == pytest.approx(runs["cpu"]["losses"], rel=1e-4)
    assert runs[CUDA]["losses"][12] < 0.9 * runs[CUDA]["losses"][1]


def test_a_resumed_run_ends_with_the_same_weights(small_run):
    whole = train_bare(0, 1, load_config(small_run, ["run.name=whole"]))
    config = load_config(small_run, ["run.name=broken"])
    train_bare(0, 1, config, last_step=6)
    resumed = train_bare(0, 1, config)
    assert min(resumed["losses"]) > 1
    assert resumed["files"]["model.safetensors"] == whole["files"]["model.safetensors"]
