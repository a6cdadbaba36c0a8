"""Losses over a process group: text chunks travel round a ring, and what belongs to them travels home behind them.

    R  ranks in the group             b  pairs on this rank (B / R)             D  embedding dimension

Each rank keeps its images and sees every rank's texts once (SigLIP, arXiv 2303.15343, section 3.3 and figure 1). A
rank's chunk is cut in two halves, one travels up the ranks and one down, so both directions of every link work. At
step s a rank computes on the halves that started s ranks away while they are already on their way to the next rank;
their gradients are gathered on the same road, one hop behind, and are home after R hops. The rank's own halves come
first and last: the first hides the first hop, the last the way home. Memory per rank is O(b D); on the wire each rank
sends (R - 1) b D features and (R - 1) b D gradients, which is the least there is when every rank needs all texts.

gloo and nccl take the same road. torch-xla has no point-to-point calls: its twin is a sharded form of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sigray.losses.negatives import ALL_NEGATIVES, NUM_BINS, Negatives, make_mask
from sigray.losses.sigmoid import LossBlock, SigmoidPass, count_tiles_, one_pass
from sigray.losses.softmax import SoftmaxPass
from sigray.losses.spans import span
from sigray.losses.tiles import check_features, default_tile_size


class NonFiniteFeatures(FloatingPointError):
    """NaN or infinity in what one rank brings to the loss. Raised on every rank.

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
    """This rank's part of the sigmoid loss over the global batch: its images against the texts of all ranks.

    The mean over ranks of the value is the loss of the global batch, and so is the mean of every parameter gradient
    (what DistributedDataParallel computes): text gradients from all ranks have come home before this returns.

    Args:
        image_features: (b, D) of this rank, unit norm; b must be the same on every rank.
        text_features: (b, D) of this rank, unit norm; row i belongs to image i.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        negatives: which negatives of the global batch count; hardest and easiest send the features round twice more.
        group: the process group; None is the default group, or a single process where there is none.
        tile_size: as in `sigmoid_loss`.
        late_checks: receives a function that raises what is wrong with the ranks' features, as below, to be called once
            the backward pass has been asked for: a device that runs behind its host has to stand still where the host
            waits to know it first. Without the list, and on a CPU, it is known before anything is computed.

    Returns:
        Scalar: the sum over b * R b pairs, divided by b.

    Raises:
        ValueError: where ranks hold different numbers of pairs, or one rank images without texts; on every rank.
        NonFiniteFeatures: where any rank holds NaN or infinity; on every rank.
        RuntimeError: in a backward pass with create_graph=True, and in a second one.
    """
    ranks = Ranks.of(group)
    ranks.check(image_features, text_features, logit_scale, logit_bias, late_checks)
    num_pairs = len(image_features)
    size = tile_size or default_tile_size(image_features.device)

    def block(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossBlock:
        text, first_image = text.contiguous(), ranks.rank * num_pairs

        def count(high: int | None) -> Tensor:
            histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=image.device)

            def visit(part: Tensor, first_text: int) -> None:
                count_tiles_(histogram, image, part, high, offset=first_image - first_text, tile_size=size)

            ranks.show_round(text, visit)
            return ranks.sum(histogram)

        num_negatives = num_pairs * ranks.size * (num_pairs * ranks.size - 1)
        mask = make_mask(negatives, num_negatives, count)
        loss = SigmoidPass(image, scale, bias, first_image=first_image, tile_size=size, mask=mask)
        return loss.finish(ranks.pass_round(text, loss.visit))

    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


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
    """This rank's part of the softmax loss over the global batch; all else as `ring_sigmoid_loss`.

    The chunks go round twice: the first time the normalisers of rows and columns are gathered, the second time the
    gradients. `logit_bias` has no effect and receives a gradient of zero.
    """
    ranks = Ranks.of(group)
    ranks.check(image_features, text_features, logit_scale, logit_bias, late_checks)
    num_pairs = len(image_features)
    size = tile_size or default_tile_size(image_features.device)

    def block(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossBlock:
        text = text.contiguous()
        loss = SoftmaxPass(image, scale, bias, first_image=ranks.rank * num_pairs, tile_size=size)
        normalisers = ranks.gather(ranks.pass_round(text, loss.normalise, torch.logaddexp))

        def visit(part: Tensor, first_text: int) -> Tensor:
            return loss.visit(part, first_text, normalisers[first_text : first_text + len(part)])

        return loss.finish(ranks.pass_round(text, visit))

    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a loss, and the ways in which they exchange chunks of it.

    Attributes:
        group: their process group; None is the default one.
        rank: this one's place in the group.
        size: R; 1 where there is no process group.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group; a single one where torch.distributed is not in use."""
        if not dist.is_initialized():
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        late_checks: list[Callable[[], None]] | None = None,
    ) -> None:
        """Compare what all ranks hold, in one small collective: unequal chunks would hang a ring.

        Args:
            late_checks: as in `ring_sigmoid_loss`.

        Raises:
            ValueError: where a rank holds images without texts or the ranks do not fit each other.
            NonFiniteFeatures: where a rank holds NaN or infinity.
        """
        image, text = image_features.detach(), text_features.detach()
        # A row's sum is finite where its elements are: unit norm is far from overflow.
        sums = [
            image.sum(dim=1, dtype=torch.float32),
            text.sum(dim=1, dtype=torch.float32),
            logit_scale.detach(),
            logit_bias.detach(),
        ]
        bad = [(~torch.isfinite(values)).flatten() for values in sums]
        shape = [len(image), len(text), image.shape[1], text.shape[1]]
        sent = torch.tensor([*shape, -1]).to(image.device, non_blocking=True)
        sizes, none = sent[:-1], sent[-1]
        first_bad = [torch.where(flags.any(), flags.int().argmax(), none) if len(flags) else none for flags in bad]
        mine = torch.cat([sizes, torch.stack(first_bad)])
        held = self.gather(mine[None])
        if late_checks is None or held.device.type == "cpu":
            with span("loss: ring"):
                _raise_what_is_wrong(held.tolist())
        else:
            on_host = held.to("cpu", non_blocking=True)  # into page-locked memory, behind what the device has to do yet
            is_there = torch.Event(held.device)
            is_there.record()

            def look() -> None:
                is_there.synchronize()
                _raise_what_is_wrong(on_host.tolist())

            late_checks.append(look)
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

    def show_round(self, chunk: Tensor, visit: Callable[[Tensor, int], None]) -> None:
        """Call `visit(part, first)` with every part of every rank's chunk, once; `first` numbers its rows globally."""

        def visit_only(part: Tensor, first: int) -> Tensor:
            visit(part, first)
            return part

        self._travel(chunk, visit_only, None)

    def pass_round(
        self,
        chunk: Tensor,
        visit: Callable[[Tensor, int], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> Tensor:
        """As `show_round`, and bring home what every rank's `visit` returns for this rank's chunk, combined.

        Args:
            chunk: (b, ...) of this rank, contiguous.
            visit: returns a tensor with as many rows as the part that it is given.
            combine: associative and commutative.

        Returns:
            (b, ...): `combine` over what all ranks returned for this chunk.
        """
        home = self._travel(chunk, visit, combine)
        return home[0] if len(home) == 1 else torch.cat(home)

    def _travel(
        self,
        chunk: Tensor,
        visit: Callable[[Tensor, int], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> list[Tensor]:
        """What came home for each part of the chunk; without `combine` nothing is sent home."""
        if self.size == 1:
            return [visit(chunk, 0)]
        half = (len(chunk) + 1) // 2
        roads = [(+1, slice(0, half)), (-1, slice(half, len(chunk)))] if len(chunk) > 1 else [(+1, slice(0, 1))]
        directions = [direction for direction, _ in roads]

        def visit_part(number: int, part: Tensor, step: int) -> Tensor:
            direction, rows = roads[number]
            source = (self.rank - direction * step) % self.size
            return visit(part, source * len(chunk) + rows.start)

        own = [chunk[rows] for _, rows in roads]
        flight = _Flight(self, directions, own)
        at_home = [visit_part(0, own[0], step=0)]
        gathered: list[Tensor] = []
        for step in range(1, self.size):
            parts = flight.wait()
            if step + 1 < self.size:
                flight = _Flight(self, directions, parts)
            behind = _Flight(self, directions, gathered) if combine and step > 1 else None
            gathered = [visit_part(number, part, step) for number, part in enumerate(parts)]
            if combine and behind:
                gathered = list(map(combine, gathered, behind.wait()))
        homeward = _Flight(self, directions, gathered) if combine else None
        at_home += [visit_part(number, own[number], step=0) for number in range(1, len(own))]
        return list(map(combine, at_home, homeward.wait())) if combine and homeward else []


def _raise_what_is_wrong(held: list[list[int]]) -> None:
    """`Ranks.check`; of each rank: images, texts, their widths, the first row of each input that is not finite (-1)."""
    for rank, (num_images, num_texts, image_dim, text_dim, *_) in enumerate(held):
        if num_images != num_texts:
            raise ValueError(f"rank {rank} holds {num_images} images and {num_texts} texts: pairs expected")
        if (num_images, image_dim, text_dim) != (held[0][0], held[0][2], held[0][2]):
            counts = ", ".join(str(count) for count, *_ in held)
            raise ValueError(
                f"the ranks hold unequal batches ({counts} pairs; rank {rank} has features of width {image_dim} "
                f"and {text_dim}, rank 0 of {held[0][2]}): give each rank as many pairs, for example by dropping "
                "the last, incomplete batch"
            )
    for rank, (_, _, _, _, *rows) in enumerate(held):
        for name, row in zip(("image_features", "text_features", "logit_scale", "logit_bias"), rows, strict=True):
            if row >= 0:
                raise NonFiniteFeatures(rank, name, row)


class _Flight:
    """Tensors on their way to the next rank, one for each direction, while those of the rank before arrive."""

    def __init__(self, ranks: Ranks, directions: list[int], tensors: list[Tensor]) -> None:
        self._sent, self._received = tensors, [torch.empty_like(tensor) for tensor in tensors]
        # group_peer: point-to-point calls count ranks of the whole world unless told the group's own. With two ranks
        # both directions lead to the same peer; messages between two ranks arrive in the order in which they left.
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
