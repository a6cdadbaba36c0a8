"""Count the bytes and floating-point operations of the towers, without memory.

Towers, captions, self-distillation, backward pass and optimizer run as `workers/training/step.py` runs them, on torch's
fake tensors. So the counts cover everything that open_clip and timm can build, with autocast, locked towers and dropout
as they are. The loops over chunks of logits are formulas (`loss_costs.py`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

# Private names: torch has no public way to run autocast on tensors without memory, nor to see every operation.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from sigray.orchestrator.device_kinds import CPU
from sigray.orchestrator.planning.loss_costs import LogitLoops, loop_edge, product_bytes
from sigray.workers.config import LossConfig, ModelConfig, OptimConfig, Precision, Tower
from sigray.workers.data.views import Pixels, split
from sigray.workers.device import Device
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import CaptionEnds
from sigray.workers.model.towers import (
    TOWERS,
    build_meta_model,
    checkpoint_activations,
    normalize_pixels,
    num_parameters,
    tower_blocks,
)
from sigray.workers.training.captioner import Captioner
from sigray.workers.training.optim import build_optimizer
from sigray.workers.training.student import Student


@dataclass(frozen=True)
class TowerCosts:
    """Costs of one micro-batch through the towers and of one update on a device.

    Attributes:
        embed_dim: D.
        image_bytes: of an image as the device takes it, views included.
        state_bytes: of the teacher's states of an image, if the device keeps those of its whole batch.
        ahead_bytes: of what it keeps beside them.
        parameters: numbers of parameters: visual, text, trained.
        weights: bytes of all parameters and buffers that the device holds. Peaks do not include them.
        updated: bytes of the parameters that a step has updated so far.
        optimizer_state: bytes; of those.
        gradients: bytes of the gradients of all weights.
        embed_peak: peak bytes of a forward pass without a graph.
        graph: bytes that a forward pass keeps for its backward pass, features included.
        peak: peak bytes of forward and backward pass, gradients of weights included.
        gradients_at_peak: bytes of gradients of weights in `peak`: all after the first micro-batch, before that those
            made so far.
        update_peak: peak bytes of clipping and optimizer, beyond gradients and state.
        flops: of a micro-batch: forward of each tower, forward again, captions, views, backward. With views, those of
            the teacher.
    """

    embed_dim: int
    image_bytes: int
    state_bytes: int
    ahead_bytes: int
    parameters: dict[str, int]
    weights: int
    updated: int
    optimizer_state: int
    gradients: int
    embed_peak: int
    graph: int
    peak: int
    gradients_at_peak: int
    update_peak: int
    flops: dict[str, float]


def gathered_bytes(model: ModelConfig) -> int:
    """Return the bytes that a device gathers at once if weights are split.

    With `sharding.weights: split` these are the weights of each tower outside its blocks, from forward to backward
    pass, and two blocks: the block that computes and the next, which is prefetched (FSDP2 as `workers/device.py` sets
    it up). Their gradients count too.
    """
    module = build_meta_model(model)
    rest, largest = 0, 0
    for tower in (module.get_submodule("visual"), module.get_submodule("text")):
        in_blocks: set[int] = set()
        for block in tower_blocks(tower):
            largest = max(largest, sum(parameter.nbytes for parameter in block.parameters()))
            in_blocks |= {id(parameter) for parameter in block.parameters()}
        rest += sum(parameter.nbytes for parameter in tower.parameters() if id(parameter) not in in_blocks)
    return 2 * rest + 3 * largest


_measured: dict[tuple[object, ...], TowerCosts] = {}


def measure_towers(
    model: ModelConfig,
    optim: OptimConfig,
    precision: Precision,
    num_pairs: int,
    *,
    cached: bool,
    losses: Sequence[LossConfig] = (LossConfig(),),
    accelerator: str = CPU,
    uses_xla: bool = False,
    activation_checkpointing: bool = False,
    stored_embeddings: bool = False,
) -> TowerCosts:
    """Run towers and optimizer as `Trainer` does, without memory, and count.

    Args:
        num_pairs: of the micro-batch.
        cached: whether a step has several micro-batches: then each is embedded twice.
        losses: of the phases up to this one, which is the last.
        accelerator: on which the loops over chunks of logits run.
        uses_xla: use torch's plain attention, which keeps the attention weights for the backward pass, not the one
            kernel that computes them again (CPU, CUDA); and caption all positions, not those with a token.
        activation_checkpointing: as in the config.
        stored_embeddings: never run the locked tower.
    """
    options = (cached, accelerator, uses_xla, activation_checkpointing, stored_embeddings)
    loss = losses[-1]
    key = (model.model_dump_json(), str(losses), optim.name, precision, num_pairs, *options)
    if key in _measured:
        return _measured[key]
    size, context_length, _ = shapes(model)
    running = [tower for tower in TOWERS if not (stored_embeddings and tower in model.locked)]
    training = [tower for tower in TOWERS if tower not in model.locked]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = build_meta_model(model)
    if activation_checkpointing:
        checkpoint_activations(module, model, functools.partial(checkpoint, use_reentrant=False))
    device = Device(torch.device("cpu"), precision)  # no memory, but for torch's autocast the device is a CPU
    stand_ins = LogitLoops(product_bytes(precision, accelerator), loop_edge(accelerator))
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if uses_xla:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        module = module.to_empty(device="cpu")
        images = torch.empty(num_pairs, size, size, 3, dtype=torch.uint8)
        tokens = torch.empty(num_pairs, context_length, dtype=torch.int32)
        terms = _RowTerms(module, model, loss, device, tokens, stand_ins, places_all=uses_xla)
        given = [images, tokens, terms.views]
        counter = stack.enter_context(Counter([*module.parameters(), *module.buffers(), *given]))

        after_image: list[float] = []
        module.get_submodule("visual").register_forward_hook(lambda *_: after_image.append(counter.flops))

        def embed(towers: list[Tower]) -> list[torch.Tensor]:
            counter.start()
            with device.autocast():
                found = module(
                    normalize_pixels(images, model) if "visual" in towers else None,
                    tokens if "text" in towers else None,
                )
            names = {"visual": "image_features", "text": "text_features"}
            return [found[names[tower]].to(dtype) for tower in towers]

        def forward_flops() -> dict[str, float]:
            image = after_image[-1] if "visual" in running else 0.0
            found = {"image tower": image, "text tower": counter.flops - image}
            return {name: count for name, count in found.items() if count}

        embed_peak = 0
        trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        parameters = [parameter for name, parameter in trainable if _trains(name, loss)]
        updated = [parameter for name, parameter in trainable if any(_trains(name, each) for each in losses)]
        gradients = sum(parameter.nbytes for parameter in parameters)
        if cached:
            with torch.no_grad():
                embed(running)
            flops = forward_flops()
            embed_peak = counter.peak
            for parameter in parameters:  # as in the second micro-batch and later
                parameter.grad = torch.empty_like(parameter)
        counter.watch(parameters)
        ahead_bytes = terms.look_ahead(counter)
        again = [tower for tower in TOWERS if tower in training or (tower == "visual" and terms.reads_image_tower)]
        features = embed(again if cached else running)
        if cached:
            flops["forward again"] = counter.flops
        else:
            flops = forward_flops()
        dim = features[-1].shape[1]
        features = [part for part in features + terms.encode(counter) if part.requires_grad]
        graph = counter.now
        forward = counter.flops
        torch.autograd.backward(features, [torch.empty_like(part) for part in features])
        del features
        peak, gradients_at_peak = counter.peak, counter.gradients_at_peak
        if cached:
            peak, gradients_at_peak = gradients + peak, gradients
        flops |= terms.flops | {"backward": counter.flops - forward}
        for parameter in updated:  # parameters that only the loss reads have no gradient yet
            parameter.grad = torch.empty_like(parameter)
        optimizer = build_optimizer(module, OptimConfig(name=optim.name), {"fused": True})
        counter.start()
        torch.nn.utils.clip_grad_norm_(updated, 1.0)
        optimizer.step()  # makes its state
        state = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
        update_peak = counter.peak - state
    numbers: dict[str, int] = {tower: num_parameters(module.get_submodule(tower)) for tower in TOWERS}
    held = {tower: tower in running for tower in numbers}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    _measured[key] = TowerCosts(
        embed_dim=dim,
        image_bytes=terms.pixels.num_bytes,
        state_bytes=terms.state_bytes,
        ahead_bytes=ahead_bytes,
        parameters=numbers | {"trained": sum(parameter.numel() for parameter in parameters)},
        weights=sum(tensor.nbytes for name, tensor in tensors if held.get(name.split(".")[0], True)),
        updated=sum(parameter.nbytes for parameter in updated),
        optimizer_state=state,
        gradients=gradients,
        embed_peak=embed_peak,
        graph=graph,
        peak=peak,
        gradients_at_peak=gradients_at_peak,
        update_peak=update_peak,
        flops=flops,
    )
    return _measured[key]


class _RowTerms:
    """The terms beside the contrastive loss, of one micro-batch without memory.

    Args:
        tokens: (n, T), of the micro-batch.
        loops: what stands for the losses that loop over logits.
        places_all: whether all positions of captions are computed, as under XLA.

    Attributes:
        pixels: of an image of the batch.
        views: (n, num_bytes) of the images.
        flops: of the terms so far.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        model: ModelConfig,
        loss: LossConfig,
        device: Device,
        tokens: torch.Tensor,
        loops: LogitLoops,
        *,
        places_all: bool,
    ) -> None:
        self._captioner: Captioner | None = None
        if loss.caption_weight:
            self._captioner = Captioner(module, loss, CaptionEnds(0, 0), 0, is_recorded=places_all)
        self._student: Student | None = None
        if loss.distill is not None:
            self._student = Student(module, model, loss.distill, lambda parameter: parameter, device, 0)
        self._device, self._tokens, self._loops, self._places_all = device, tokens, loops, places_all
        self.pixels = Pixels(shapes(model)[0], self._student.views if self._student is not None else None)
        self.views = torch.empty(len(tokens), *self.pixels.shape, dtype=torch.uint8)
        self.flops: dict[str, float] = {}

    @property
    def reads_image_tower(self) -> bool:
        return self._captioner is not None

    @property
    def state_bytes(self) -> int:
        return self._student.kept_bytes if self._student is not None else 0

    def look_ahead(self, counter: Counter) -> int:
        """Show the teacher the batch, if it must see it first.

        Returns:
            Bytes that the device keeps beside its states.
        """
        if self._student is None or not self._student.looks_ahead:
            return 0
        before, held = counter.flops, counter.now
        with self._device.autocast():
            self._student.look_ahead([(split(self.views, self.pixels)[1], self._reads(self._student))])
        self.flops["views"] = counter.flops - before
        return counter.now - held - len(self.views) * self._student.kept_bytes

    def encode(self, counter: Counter) -> list[torch.Tensor]:
        """Compute the terms, right after the image tower has run."""
        terms: list[torch.Tensor] = []
        with self._device.autocast():
            if self._captioner is not None:
                before = counter.flops
                positions = torch.empty(self._tokens.shape)
                places = None if self._places_all else torch.arange(positions.numel())
                is_parallel = torch.empty(len(positions), dtype=torch.bool)
                loss = functools.partial(self._loops.token_loss, counter)
                terms += self._captioner.encode(self._tokens, is_parallel, positions, places, loss=loss).values()
                self.flops["captions"] = counter.flops - before
            if self._student is not None:
                before = counter.flops
                masked = torch.empty(len(self.views), self._student.num_patches, dtype=torch.bool)
                reads = self._reads(self._student)
                loss = functools.partial(self._loops.distillation_loss, counter)
                parts = split(self.views, self.pixels)[1:]
                terms += self._student.encode(*parts, masked, reads, loss=loss).values()
                self.flops["views"] = self.flops.get("views", 0.0) + counter.flops - before
        return terms

    def _reads(self, student: Student) -> torch.Tensor:
        return torch.empty(len(self.views), student.num_predicted, dtype=torch.int64)


def _trains(name: str, loss: LossConfig) -> bool:
    """Whether a step with this loss updates a parameter, if it is not locked."""
    if name.startswith("decoder."):
        return loss.caption_weight > 0
    if name.startswith("distiller."):
        if loss.distill is None:
            return False
        is_local = name.startswith("distiller.local_head.")
        return (loss.distill.local_weight if is_local else loss.distill.masked_weight) > 0
    return True


class Counter(TorchDispatchMode):
    """Counts bytes of tensors and floating-point operations in a `with` block.

    The count is exact to the byte: each new storage adds its size, and subtracts it when it is freed, if its owner was
    a variable, the autograd graph or a gradient. Memory that an operation allocates and frees itself is not counted.

    Args:
        known: tensors that exist already; they and views of them do not count.

    Attributes:
        now: bytes held, since `start`.
        peak: most of them at once.
        gradients_at_peak: bytes of gradients of the watched parameters in the peak.
        flops: since `start`, of matrix products, convolutions and attention; multiplication and addition are two.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # bytes by address of the storage's C++ object
        self.start()
        for tensor in known:
            self._see(tensor, counts=False)

    def start(self) -> None:
        """Start to count; bytes held now do not count."""
        self.now = self.peak = self.gradients_at_peak = self._gradients = 0
        self.flops = 0.0
        self._alive = dict.fromkeys(self._alive, 0)

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Count the gradients of these parameters in each peak."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def _add_gradient(self, parameter: torch.Tensor) -> None:
        self._gradients += parameter.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output

    def _see(self, tensor: torch.Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes() if counts else 0
        self.now += self._alive[key]
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self._gradients
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count two products: (heads, L, d) with (heads, d, M), and back."""
    batch, heads, length, dim = query.shape
    return 2 * batch * heads * length * key.shape[2] * (dim + value.shape[3])


def _attention_layer_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, width: int, num_heads: int, *_: Any, **__: Any
) -> int:
    """Count torch's attention layer in evaluation mode.

    Projections of query, key and value, attention, projection of the output.
    """
    batch, length = query.shape[:2]
    return 2 * batch * length * width * (4 * width + 2 * length)


def _attention_backward_flops(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count five products: weights again, gradients of weights, query, key, value."""
    batch, heads, length, dim = query.shape
    return 2 * batch * heads * length * key.shape[2] * (3 * dim + 2 * grad.shape[3])


# Of the attention kernels, torch counts only CUDA's.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._native_multi_head_attention: _attention_layer_flops,
}
