"""Losses over a process group: a ring carries texts and their gradients.

    R  ranks in the group             b  pairs on this rank (B / R)             D  embedding dimension

Each rank keeps its images and sees every rank's texts once (SigLIP, arXiv 2303.15343, section 3.3 and figure 1). A
rank's chunk is cut in two halves. One travels up the ranks and one down, so both directions of every link work. At step
s a rank computes on the halves that started s ranks away, while they are being sent to the next rank. Their gradients
follow one hop later and are home after R hops. The rank computes on its own halves first and last: the first hides the
first hop, the last hides the gradients' last hop. Memory per rank is O(b D). Each rank sends (R - 1) b D features and
(R - 1) b D gradients, which is the minimum if every rank needs all texts.

gloo and nccl run the same code. torch-xla has no point-to-point calls: `losses/sharded.py` is the ring for XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sigray.losses.negatives import ALL_NEGATIVES, NUM_BINS, Negatives, make_mask
from sigray.losses.sigmoid import LossResult, OnePass, SigmoidPass, count_tiles_
from sigray.losses.softmax import SoftmaxPass
from sigray.losses.spans import span
from sigray.losses.tiles import check_features

Combine = Callable[[Tensor, Tensor], Tensor]  # associative and commutative


class NonFiniteFeatures(FloatingPointError):
    """NaN or infinity in the inputs of one rank. Raised on every rank.

    Attributes:
        rank: in the group; the first one that is affected.
        name: `image_features`, `text_features`, `logit_scale` or `logit_bias`.
        row: of the features; 0 for a scalar.
    """

    def __init__(self, rank: int, name: str, row: int) -> None:
        super().__init__(rank, name, row)  # the arguments, so that it survives pickling
        self.rank, self.name, self.row = rank, name, row

    def __str__(self) -> str:
        return f"NaN or infinity in {self.name} of rank {self.rank}, row {self.row}"


def ring_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    negatives: Negatives = ALL_NEGATIVES,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    late_checks: list[Callable[[], None]] | None = None,
) -> Tensor:
    """This rank's part of the sigmoid loss: its images against the texts of all ranks.

    The mean of the value over ranks is the loss of the global batch, and so is the mean of every parameter gradient
    (what DistributedDataParallel computes): text gradients from all ranks are home before this returns.

    Args:
        image_features, text_features: (b, D) of this rank, unit norm; row i of both is a pair. b is equal on all ranks.
        logit_scale, logit_bias: scalars; the scale is already exponentiated.
        negatives: which negatives of the global batch count; hardest and easiest take two more rounds of the features.
        group: the process group; None is the default group, or a single process without torch.distributed.
        tile_size: as in `sigmoid_loss`.
        late_checks: receives a function that raises the errors below. Call it once the backward pass is launched: an
            asynchronous device would idle if the host waited for the check first. Without the list, and on a CPU, the
            check runs before anything is computed.

    Returns:
        Scalar: the sum over b * R b pairs, divided by b.

    Raises:
        ValueError: ranks hold different numbers of pairs, or one rank images without texts; on every rank.
        NonFiniteFeatures: a rank holds NaN or infinity; on every rank.
        RuntimeError: in a backward pass with create_graph=True, and in a second one.
    """
    ranks = Ranks.of(group)
    inputs = image_features, text_features, logit_scale, logit_bias
    ranks.check(inputs, late_checks)
    num_pairs = len(image_features)

    def compute(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        text = text.contiguous()
        first_image = ranks.rank * num_pairs

        def count(high: int | None) -> Tensor:
            histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=image.device)

            def visit(part: Tensor, first_text: int) -> Tensor:
                count_tiles_(histogram, image, part, high, offset=first_image - first_text, tile_size=tile_size)
                return part

            ranks.rotate(text, visit, None)
            return ranks.sum(histogram)

        num_negatives = num_pairs * ranks.size * (num_pairs * ranks.size - 1)
        mask = make_mask(negatives, num_negatives, count)
        loss = SigmoidPass(image, scale, bias, first_image=first_image, tile_size=tile_size, mask=mask)
        return loss.finish(ranks.rotate(text, loss.visit, torch.add))

    return OnePass.apply(compute, *inputs)


def ring_softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    late_checks: list[Callable[[], None]] | None = None,
) -> Tensor:
    """This rank's part of the softmax loss over the global batch.

    The chunks take two rounds: one for the normalisers of rows and columns, one for the gradients. `logit_bias` has no
    effect and receives a gradient of zero. All else is as for `ring_sigmoid_loss`.
    """
    ranks = Ranks.of(group)
    inputs = image_features, text_features, logit_scale, logit_bias
    ranks.check(inputs, late_checks)
    num_pairs = len(image_features)

    def compute(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        text = text.contiguous()
        loss = SoftmaxPass(image, scale, bias, first_image=ranks.rank * num_pairs, tile_size=tile_size)
        normalisers = ranks.gather(ranks.rotate(text, loss.normalise, torch.logaddexp))

        def visit(part: Tensor, first_text: int) -> Tensor:
            return loss.visit(part, first_text, normalisers[first_text : first_text + len(part)])

        return loss.finish(ranks.rotate(text, visit, torch.add))

    return OnePass.apply(compute, *inputs)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a loss, and their collectives.

    Attributes:
        group: their process group; None is the default one.
        rank: of this process in the group.
        size: R; 1 without a process group.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group; a single one if torch.distributed is not in use."""
        if not dist.is_initialized():
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def check(self, inputs: Sequence[Tensor], late_checks: list[Callable[[], None]] | None) -> None:
        """Compare the inputs of all ranks in one small collective.

        Unequal chunks would hang a ring.

        Args:
            inputs: features of images and of texts, scale and bias.
            late_checks: as in `ring_sigmoid_loss`.

        Raises:
            ValueError: a rank holds images without texts, or the ranks do not fit each other.
            NonFiniteFeatures: a rank holds NaN or infinity.
        """
        image, text, *scalars = (tensor.detach() for tensor in inputs)
        # A row's sum is finite if its elements are: unit norm is far from overflow.
        sums = [features.sum(dim=1, dtype=torch.float32) for features in (image, text)]
        bad = [(~torch.isfinite(values)).flatten() for values in (*sums, *scalars)]
        shape = [len(image), len(text), image.shape[1], text.shape[1]]
        sent = torch.tensor([*shape, -1]).to(image.device, non_blocking=True)
        none = sent[-1]
        first_bad = [torch.where(flags.any(), flags.int().argmax(), none) if len(flags) else none for flags in bad]
        held = self.gather(torch.cat([sent[:-1], torch.stack(first_bad)])[None])
        if late_checks is None or held.device.type == "cpu":
            with span("loss: ring"):
                _check_held(held.tolist())
        else:
            on_host = held.to("cpu", non_blocking=True)  # into page-locked memory, after the device's queued work
            is_there = torch.Event(held.device)
            is_there.record()

            def check_later() -> None:
                is_there.synchronize()
                _check_held(on_host.tolist())

            late_checks.append(check_later)
        check_features(image, text)

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over the ranks."""
        if self.size > 1:
            with span("loss: ring"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(b, ...) of every rank as (R b, ...), in the order of ranks."""
        if self.size == 1:
            return tensor
        everyone = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        with span("loss: ring"):
            dist.all_gather_into_tensor(everyone, tensor.contiguous(), group=self.group)
        return everyone

    def rotate(self, chunk: Tensor, visit: Callable[[Tensor, int], Tensor], combine: Combine | None) -> Tensor:
        """Call `visit(part, first)` with every part of every rank's chunk, once.

        What the visits of all ranks return for this rank's chunk comes home, combined.

        Args:
            chunk: (b, ...) of this rank, contiguous.
            visit: returns a tensor with as many rows as the part; `first` is the global index of the part's first row.
            combine: of what two ranks returned; None: nothing is sent home.

        Returns:
            (b, ...): `combine` over what all ranks returned for this chunk; without `combine` the chunk.
        """
        if self.size == 1:
            return visit(chunk, 0)
        middle = (len(chunk) + 1) // 2
        halves = [(+1, slice(0, middle)), (-1, slice(middle, len(chunk)))][: len(chunk)]
        directions = [direction for direction, _ in halves]

        def visit_half(number: int, part: Tensor, step: int) -> Tensor:
            direction, rows = halves[number]
            source = (self.rank - direction * step) % self.size
            return visit(part, source * len(chunk) + rows.start)

        own = [chunk[rows] for _, rows in halves]
        transfer = _Transfer(self, directions, own)
        results = [visit_half(0, own[0], step=0)]
        combined: list[Tensor] = []  # the results so far for the parts that are here
        for step in range(1, self.size):
            parts = transfer.wait()
            if step + 1 < self.size:
                transfer = _Transfer(self, directions, parts)
            following = _Transfer(self, directions, combined) if combine and step > 1 else None
            combined = [visit_half(number, part, step) for number, part in enumerate(parts)]
            if combine and following:
                combined = list(map(combine, combined, following.wait()))
        last_hop = _Transfer(self, directions, combined) if combine else None
        results += [visit_half(number, own[number], step=0) for number in range(1, len(own))]
        if not (combine and last_hop):
            return chunk
        results = list(map(combine, results, last_hop.wait()))
        del parts, transfer, following, combined, last_hop  # else the peak grows by a chunk
        return torch.cat(results)


def _check_held(held: list[list[int]]) -> None:
    """Raise the errors of `Ranks.check`.

    Args:
        held: of each rank the numbers of images and texts, the widths of both, and of each input the first row that is
            not finite (-1: none).
    """
    for rank, (num_images, num_texts, image_dim, text_dim, *_) in enumerate(held):
        if num_images != num_texts:
            raise ValueError(f"rank {rank} holds {num_images} images and {num_texts} texts: pairs expected")
        if (num_images, image_dim, text_dim) != (held[0][0], held[0][2], held[0][2]):
            counts = ", ".join(str(count) for count, *_ in held)
            raise ValueError(
                f"the ranks hold unequal batches ({counts} pairs; rank {rank} has features of width {image_dim} "
                f"and {text_dim}, rank 0 of {held[0][2]}): give each rank the same number of pairs, for example by "
                "dropping the last, incomplete batch"
            )
    for rank, (_, _, _, _, *rows) in enumerate(held):
        for name, row in zip(("image_features", "text_features", "logit_scale", "logit_bias"), rows, strict=True):
            if row >= 0:
                raise NonFiniteFeatures(rank, name, row)


class _Transfer:
    """One hop in flight: tensors sent to the next rank, received from the one before."""

    def __init__(self, ranks: Ranks, directions: list[int], tensors: list[Tensor]) -> None:
        self._sent = tensors  # kept until they are sent
        self._received = [torch.empty_like(tensor) for tensor in tensors]
        # group_peer: point-to-point calls count ranks of the whole world unless they get the group's own. With two
        # ranks both directions lead to the same peer; messages between two ranks arrive in the order of sending.
        messages = [
            dist.P2POp(call, tensor, group=ranks.group, group_peer=(ranks.rank + sign * direction) % ranks.size)
            for call, sign, side in ((dist.isend, +1, self._sent), (dist.irecv, -1, self._received))
            for direction, tensor in zip(directions, side, strict=True)
        ]
        with span("loss: ring"):
            self._work = dist.batch_isend_irecv(messages)

    def wait(self) -> list[Tensor]:
        with span("loss: ring"):
            for work in self._work:
                work.wait()
        return self._received
