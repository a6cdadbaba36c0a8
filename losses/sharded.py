"""The losses in one program over many devices (GSPMD): the ring of `exchange.py` for torch-xla.

    n  devices of the program        b  pairs on each        c  texts of a part on each        D  embedding dimension

torch-xla has no point-to-point calls. Instead features have a leading dimension of n that is split over the devices,
one slice each. A product batched over it is local, and a rotation of it is what XLA's partitioner compiles to one
collective-permute: each device hands its texts to the next (tests/losses/test_sharded.py reads that off the compiled
program). So the road is that of the ring: half of the texts travels up and half down, their gradients one hop behind,
memory per device is O(b D) and a tile, and nothing of size B x B exists. Shapes are static, so a program is compiled
once. The functions are plain torch: on one ordinary device they compute the same, which the tests use.

Several programs (XLA hosts that share no mesh: slices, or PJRT's CPU client) form the ring of `exchange.py` on top:
chunks travel between hosts, and each is taken round the devices of a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sigray.losses.fused import negative_terms
from sigray.losses.negatives import ALL_NEGATIVES, Negatives, random_drop
from sigray.losses.ring import Ranks
from sigray.losses.sigmoid import LossResult, one_pass
from sigray.losses.tiles import default_tile_size, product_dtype, sum_dtype


@dataclass(frozen=True)
class Shards:
    """The devices of a program, and the hosts around it.

    Attributes:
        count: n.
        mark: tells the compiler that a tensor's first dimension, of n, lies one slice on each device; returns it.
        settle: has everything that was recorded so far computed; before the host reads features.
        hosts: the process group of the hosts whose programs are apart, on host memory; None: this program is all.
    """

    count: int
    mark: Callable[[Tensor], Tensor]
    settle: Callable[[], None]
    hosts: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> Ranks:
        """The hosts as the ranks of a ring."""
        return Ranks.of(self.hosts) if self.hosts is not None else Ranks(None, 0, 1)


def sharded_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    shards: Shards,
    negatives: Negatives = ALL_NEGATIVES,
    numbers: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """The sigmoid loss of this program's images against the texts of all programs.

    With one program it is the loss of the global batch and its gradients are complete; with several, the mean over
    hosts is, as for `ring_sigmoid_loss`. Nothing is read by the host, so NaN is not looked for: it is in the value.

    Args:
        image_features: (n, b, D), unit norm.
        text_features: (n, b, D), unit norm; the same places are pairs.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        shards: where the features lie.
        negatives: all, or random ones; hardest and easiest need counts of a size that a static program does not have.
        numbers: (n, b) int32, of each pair in the global batch; needed for random negatives.
        tile_size: edge of a tile of logits on one device; changes memory and speed, not the result.

    Returns:
        Scalar: the sum over pairs, divided by the number of images of this program.

    Raises:
        ValueError: for hardest or easiest negatives, and for random ones without numbers.
    """
    if negatives.keep not in ("all", "random"):
        raise ValueError(f"negatives={negatives.keep} is not available on XLA devices: all or random")
    drop: tuple[Negatives, Tensor] | None = None
    if negatives.keep == "random" and negatives.fraction < 1:
        if numbers is None:
            raise ValueError("random negatives need the numbers of the pairs")
        drop = negatives, numbers

    def block(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        size = tile_size or default_tile_size(image.device)
        loss = _SigmoidShards(image, scale, bias, shards, size, drop)
        grad_text = loss.pairs(text) + _round_the_hosts(text, shards, loss.visit, torch.add)
        return loss.finish(grad_text)

    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


def sharded_softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    shards: Shards,
    tile_size: int | None = None,
) -> Tensor:
    """The softmax loss; all else as `sharded_sigmoid_loss`. `logit_bias` receives a gradient of zero."""

    def block(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        loss = _SoftmaxShards(image, scale, bias, shards, tile_size or default_tile_size(image.device))
        normalisers = _round_the_hosts(text, shards, loss.normalise, _log_add)
        # The normalisers travel with their texts: one more column, in the precision of the sums.
        both = torch.cat([text.to(normalisers.dtype), normalisers], dim=2)
        grad_text = _round_the_hosts(both, shards, loss.visit, torch.add)
        return loss.finish(grad_text + loss.pairs(text, normalisers))

    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


def _round_the_hosts(
    chunk: Tensor,
    shards: Shards,
    visit: Callable[[Tensor, int, int], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`visit(part, host, first)` for the texts of every host; what it returns for this host's, combined: (n, b, ...).

    `first` is the place of the part's first text within its device's b.
    """
    ranks = shards.ranks
    if ranks.size == 1:
        return visit(chunk, 0, 0)
    shards.settle()
    num_pairs, device = chunk.shape[1], chunk.device

    def on_device(part: Tensor, first: int) -> Tensor:
        host, place = divmod(first, num_pairs)
        gathered = visit(shards.mark(part.transpose(0, 1).contiguous().to(device)), host, place)
        return gathered.cpu().transpose(0, 1).contiguous()

    # Rows are places, so that the two halves that travel either way hold as many texts of every device.
    home = ranks.rotate(chunk.cpu().transpose(0, 1).contiguous(), on_device, combine)
    return shards.mark(home.transpose(0, 1).contiguous().to(device))


def _round_the_devices(
    chunk: Tensor,
    shards: Shards,
    visit: Callable[[Tensor, int], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`visit(part, hops)` for the texts of every device; what it returns for each, combined, is back with its texts.

    Args:
        chunk: (n, c, ...).
        visit: each device on the part that started `hops` devices away; negative: from the other side.
    """
    at_home = visit(chunk, 0)
    if shards.count == 1:
        return at_home
    half = (chunk.shape[1] + 1) // 2
    roads = [(+1, slice(0, half)), (-1, slice(half, chunk.shape[1]))][: min(2, chunk.shape[1])]
    homeward = []
    for direction, columns in roads:
        part = chunk[:, columns]
        gathered: Tensor | None = None
        for hop in range(1, shards.count):
            part = _next_device(part, direction, shards)
            found = visit(part, direction * hop)
            # What was gathered on the hops before travels while this one is computed.
            gathered = found if gathered is None else combine(_next_device(gathered, direction, shards), found)
        assert gathered is not None
        homeward.append(_next_device(gathered, direction, shards))
    return combine(at_home, torch.cat(homeward, dim=1))


def _next_device(tensor: Tensor, direction: int, shards: Shards) -> Tensor:
    """Every device's slice to the next one: slices of a split dimension, put together again one place further."""
    head, tail = tensor[:-direction], tensor[-direction:]
    return shards.mark(torch.cat([tail, head]))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) of finite numbers; torch.logaddexp would run on the host under XLA."""
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))


def _spans(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class _RowSums:
    """Sums of tiles over their columns, (n, R) for each span of rows.

    Not over all of a tile at once: XLA's CPU compiler then puts the sums of all tiles into one unrolled kernel and
    needs minutes for it.
    """

    def __init__(self, num_spans: int) -> None:
        self._sums: list[Tensor | None] = [None] * num_spans

    def add(self, number: int, terms: Tensor) -> None:
        """(n, R, C) of a tile in a span of rows."""
        found, known = terms.sum(dim=2), self._sums[number]
        self._sums[number] = found if known is None else known + found

    def total(self) -> Tensor:
        return torch.cat([part for part in self._sums if part is not None], dim=1).sum()


class _Shards:
    """What both losses keep: the images on their devices, and the sums that stay with them."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, shards: Shards, tile_size: int) -> None:
        self._shards, self._tile_size = shards, tile_size
        self._sums, self._products = sum_dtype(image), product_dtype(image)
        self._image = shards.mark(image.to(self._products))
        self._scale, self._bias = scale.to(self._sums), bias.to(self._sums)
        self._dtype, self._rank = image.dtype, shards.ranks.rank
        self._rows = list(_spans(image.shape[1], tile_size))
        self._grad_image: list[Tensor | None] = [None] * len(self._rows)
        # (n, R) for each span of rows: summed over rows and devices once, at the end.
        self._loss, self._grad_scale = _RowSums(len(self._rows)), _RowSums(len(self._rows))

    @property
    def _num_images(self) -> int:
        return self._image.shape[0] * self._image.shape[1]

    def _places(self, rows: slice) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=self._image.device)

    def _cosines(self, rows: slice, text: Tensor) -> Tensor:
        """(n, R, C) in the dtype of the sums; the product itself is in that of the products."""
        return torch.bmm(self._image[:, rows], text.transpose(1, 2)).to(self._sums)

    def _push(self, number: int, rows: slice, dz: Tensor, text: Tensor) -> Tensor:
        """Add dz's part of the image gradients; returns that of the texts, (n, C, D)."""
        dz = dz.to(self._products)
        part = torch.bmm(dz, text).to(self._sums)
        known = self._grad_image[number]
        self._grad_image[number] = part if known is None else known + part
        return torch.bmm(dz.transpose(1, 2), self._image[:, rows]).to(self._sums)

    def _image_part(self) -> Tensor:
        return torch.cat([part for part in self._grad_image if part is not None], dim=1)


class _SigmoidShards(_Shards):
    """The sigmoid's terms. Pairs are taken apart from the negatives: they never leave their device."""

    def __init__(
        self,
        image: Tensor,
        scale: Tensor,
        bias: Tensor,
        shards: Shards,
        tile_size: int,
        drop: tuple[Negatives, Tensor] | None,
    ) -> None:
        super().__init__(image, scale, bias, shards, tile_size)
        self._drop = drop
        self._grad_bias = _RowSums(len(self._rows))

    def pairs(self, text: Tensor) -> Tensor:
        """The terms of the pairs; returns their part of the text gradients, (n, b, D)."""
        image, text = self._image.to(self._sums), self._shards.mark(text).to(self._sums)
        cosines = (image * text).sum(dim=2)
        z = self._scale * cosines + self._bias
        dz = torch.sigmoid(-z).neg()
        for number, rows in enumerate(self._rows):
            part = dz[:, rows, None]
            loss = torch.nn.functional.softplus(-z[:, rows, None])
            self._add(number, loss, part, part * cosines[:, rows, None])
            self._grad_image[number] = part * text[:, rows]
        return dz[:, :, None] * image

    def _add(self, number: int, loss: Tensor, grad_bias: Tensor, grad_scale: Tensor) -> None:
        self._loss.add(number, loss)
        self._grad_bias.add(number, grad_bias)
        self._grad_scale.add(number, grad_scale)

    def visit(self, text: Tensor, host: int, first: int) -> Tensor:
        """All images of this program against the texts of a part, (n, c, D); returns (n, c, D)."""
        numbers = None
        if self._drop is not None:
            own = self._drop[1][:, first : first + text.shape[1]]
            numbers = own + (host - self._rank) * self._num_images

        def on_devices(part: Tensor, hops: int) -> Tensor:
            # A road of its own direction starts at the first text or, downwards, in the middle.
            start = first + (text.shape[1] - part.shape[1] if hops < 0 else 0)
            mine = None
            if numbers is not None:
                mine = numbers[:, start - first : start - first + part.shape[1]].roll(hops, 0)
            return self._negatives(part, start, mine, holds_pairs=hops == 0 and host == self._rank)

        return _round_the_devices(self._shards.mark(text), self._shards, on_devices, torch.add)

    def _negatives(self, text: Tensor, first: int, numbers: Tensor | None, holds_pairs: bool) -> Tensor:
        text, grad_text = text.to(self._products), []
        for columns in _spans(text.shape[1], self._tile_size):
            part, total = text[:, columns], None
            for number, rows in enumerate(self._rows):
                x = self._cosines(rows, part)
                if holds_pairs:
                    x = x.masked_fill(self._places(rows)[:, None] == first + self._places(columns), -torch.inf)
                if numbers is not None:
                    assert self._drop is not None
                    negatives, own = self._drop
                    drop = random_drop(own[:, rows], numbers[:, columns], negatives.seed, negatives.fraction)
                    x = x.masked_fill(drop, -torch.inf)
                dz, *sums = negative_terms(x, self._scale, self._bias)
                self._add(number, *sums)
                q = self._push(number, rows, dz, part)
                total = q if total is None else total + q
            assert total is not None
            grad_text.append(total)
        return torch.cat(grad_text, dim=1)

    def finish(self, grad_text: Tensor) -> LossResult:
        """Everything that was visited, divided by the number of images."""
        loss, grad_bias, grad_scale = (
            sums.total() / self._num_images for sums in (self._loss, self._grad_bias, self._grad_scale)
        )
        factor = self._scale / self._num_images
        return LossResult(loss, self._image_part(), grad_text, factor, grad_scale, grad_bias)


class _SoftmaxShards(_Shards):
    """The softmax's terms: `normalise` with every text, then `visit` with every text and its normaliser."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, shards: Shards, tile_size: int) -> None:
        super().__init__(image, scale, bias, shards, tile_size)
        self._normalisers: list[Tensor | None] = [None] * len(self._rows)

    def normalise(self, text: Tensor, host: int, first: int) -> Tensor:
        """(n, c, 1): log sum exp z over the images of this program; the images' own sums are kept."""

        def on_devices(part: Tensor, hops: int) -> Tensor:
            part, found = part.to(self._products), []
            for columns in _spans(part.shape[1], self._tile_size):
                total = None
                for number, rows in enumerate(self._rows):
                    z = self._scale * self._cosines(rows, part[:, columns])
                    of_rows, of_columns = z.logsumexp(dim=2), z.logsumexp(dim=1)
                    known = self._normalisers[number]
                    self._normalisers[number] = of_rows if known is None else _log_add(known, of_rows)
                    total = of_columns if total is None else _log_add(total, of_columns)
                assert total is not None
                found.append(total[:, :, None])
            return torch.cat(found, dim=1)

        return _round_the_devices(self._shards.mark(text), self._shards, on_devices, _log_add)

    def visit(self, both: Tensor, host: int, first: int) -> Tensor:
        """(n, c, D) of texts with their normalisers, (n, c, D + 1): the gradients of all but the pairs' own term."""

        def on_devices(part: Tensor, hops: int) -> Tensor:
            text, normalisers, grad_text = part[:, :, :-1].to(self._products), part[:, :, -1:], []
            for columns in _spans(text.shape[1], self._tile_size):
                total = None
                for number, rows in enumerate(self._rows):
                    x, of_rows = self._cosines(rows, text[:, columns]), self._normalisers[number]
                    assert of_rows is not None
                    z = self._scale * x
                    dz = (z - of_rows[:, :, None]).exp() + (z - normalisers[:, columns].transpose(1, 2)).exp()
                    dz = dz / 2
                    self._grad_scale.add(number, x * dz)
                    q = self._push(number, rows, dz, text[:, columns])
                    total = q if total is None else total + q
                assert total is not None
                grad_text.append(total)
            return torch.cat(grad_text, dim=1)

        return _round_the_devices(self._shards.mark(both), self._shards, on_devices, torch.add)

    def pairs(self, text: Tensor, normalisers: Tensor) -> Tensor:
        """The loss itself and the pairs' own term of the gradients; returns that of the texts, (n, b, D)."""
        image, text = self._image.to(self._sums), text.to(self._products).to(self._sums)
        cosines = (image * text).sum(dim=2)
        for number, rows in enumerate(self._rows):
            known, of_rows = self._grad_image[number], self._normalisers[number]
            assert known is not None
            assert of_rows is not None
            self._grad_image[number] = known - text[:, rows]
            loss = (of_rows + normalisers[:, rows, 0]) / 2 - self._scale * cosines[:, rows]
            self._loss.add(number, loss[:, :, None])
            self._grad_scale.add(number, -cosines[:, rows, None])
        return -image

    def finish(self, grad_text: Tensor) -> LossResult:
        """As `_SigmoidShards.finish`."""
        loss, grad_scale = (sums.total() / self._num_images for sums in (self._loss, self._grad_scale))
        zero = torch.zeros_like(self._bias)
        return LossResult(loss, self._image_part(), grad_text, self._scale / self._num_images, grad_scale, zero)
