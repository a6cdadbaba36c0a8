"""The losses in one program over many devices (GSPMD): the ring for torch-xla.

    n  devices of the program        b  pairs on each        c  texts of a part on each        D  embedding dimension

torch-xla has no point-to-point calls. Instead features have a leading dimension of n that is split over the devices,
one slice each. A batched product over n is local. XLA's partitioner compiles a rotation of n to one collective-permute,
which sends each device's texts to the next device; tests/losses/test_sharded.py checks the compiled program. The rest
is as in `ring.py`: one half of the texts travels up and one down, and their gradients follow one hop later. Memory per
device is O(b D) and a tile; nothing of size B x B exists. Shapes are static, so a program is compiled once. The
functions are plain torch: on one ordinary device they compute the same, which the tests use.

Several programs (XLA hosts that share no mesh: TPU slices, or PJRT's CPU client) form the ring of `ring.py` on top:
chunks travel between hosts, and each host rotates a chunk over its devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sigray.losses.fused import negative_terms
from sigray.losses.negatives import ALL_NEGATIVES, Negatives, random_drop
from sigray.losses.ring import Combine, Ranks
from sigray.losses.sigmoid import LossResult, OnePass
from sigray.losses.tiles import default_tile_size, product_dtype, ranges, sum_dtype

Drop = tuple[Negatives, Tensor]  # random negatives, and the pairs' indices in the global batch


@dataclass(frozen=True)
class Slices:
    """The devices of a program, each with a slice of the features, and the hosts.

    Attributes:
        count: n.
        mark: tells the compiler that a tensor's first dimension, n, is split over the devices; returns the tensor.
        sync: compiles and runs all recorded operations; called before the host reads features.
        hosts: gloo process group of the hosts if their programs are separate; None: there is one program.
    """

    count: int
    mark: Callable[[Tensor], Tensor]
    sync: Callable[[], None]
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
    slices: Slices,
    negatives: Negatives = ALL_NEGATIVES,
    indices: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """The sigmoid loss of this program's images against the texts of all programs.

    With one program it is the loss of the global batch and its gradients are complete. With several programs the mean
    over hosts is, as for `ring_sigmoid_loss`. The host reads nothing, so there is no check for NaN: it shows in the
    value.

    Args:
        image_features, text_features: (n, b, D), unit norm; equal positions are pairs.
        logit_scale, logit_bias: scalars; the scale is already exponentiated.
        slices: the devices.
        negatives: all or random; hardest and easiest need counts whose size a static program does not have.
        indices: (n, b) int32, of each pair in the global batch; needed for random negatives.
        tile_size: edge of a tile of logits on one device; changes memory and speed, not the result.

    Returns:
        Scalar: the sum over pairs, divided by the number of images of this program.

    Raises:
        ValueError: for hardest or easiest negatives, and for random ones without indices.
    """
    if negatives.keep not in ("all", "random"):
        raise ValueError(f"negatives={negatives.keep} is not available on XLA devices: all or random")
    drop: Drop | None = None
    if negatives.keep == "random" and negatives.fraction < 1:
        if indices is None:
            raise ValueError("random negatives need the indices of the pairs")
        drop = negatives, indices

    def compute(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        loss = _SlicedSigmoid(image, scale, bias, slices, tile_size)
        visit = functools.partial(loss.visit, drop=drop)
        return loss.finish(loss.pairs(text) + _rotate_hosts(text, slices, visit, torch.add))

    return OnePass.apply(compute, image_features, text_features, logit_scale, logit_bias)


def sharded_softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    slices: Slices,
    tile_size: int | None = None,
) -> Tensor:
    """The softmax loss; all else as `sharded_sigmoid_loss`.

    `logit_bias` receives a gradient of zero.
    """

    def compute(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        loss = _SlicedSoftmax(image, scale, bias, slices, tile_size)
        normalisers = _rotate_hosts(text, slices, loss.normalise, _log_add)
        # The normalisers travel with their texts: one more column, in the precision of the sums.
        both = torch.cat([text.to(normalisers.dtype), normalisers], dim=2)
        grad_text = _rotate_hosts(both, slices, loss.visit, torch.add)
        return loss.finish(grad_text + loss.pairs(text, normalisers))

    return OnePass.apply(compute, image_features, text_features, logit_scale, logit_bias)


def _rotate_hosts(
    chunk: Tensor, slices: Slices, visit: Callable[[Tensor, int, int], Tensor], combine: Combine
) -> Tensor:
    """Call `visit(part, host, first)` with the texts of every host.

    Args:
        chunk: (n, b, ...) of this host.
        visit: `first` is the position of the part's first text among the b of its device.
        combine: of what two hosts returned.

    Returns:
        (n, b, ...): `combine` over what all hosts returned for this host's texts.
    """
    ranks = slices.ranks
    if ranks.size == 1:
        return visit(chunk, 0, 0)
    slices.sync()
    num_pairs = chunk.shape[1]

    def on_device(part: Tensor, first: int) -> Tensor:
        host, position = divmod(first, num_pairs)
        result = visit(slices.mark(part.transpose(0, 1).contiguous().to(chunk.device)), host, position)
        return result.cpu().transpose(0, 1).contiguous()

    # Rows are positions, so that either half that travels holds the same number of texts of every device.
    home = ranks.rotate(chunk.cpu().transpose(0, 1).contiguous(), on_device, combine)
    return slices.mark(home.transpose(0, 1).contiguous().to(chunk.device))


def _rotate_devices(chunk: Tensor, slices: Slices, visit: Callable[[Tensor, int], Tensor], combine: Combine) -> Tensor:
    """Call `visit(part, hops)` with the texts of every device.

    Args:
        chunk: (n, c, ...).
        visit: each device on the part that started `hops` devices away; negative: from the other side.
        combine: of what two devices returned.

    Returns:
        (n, c, ...): on each device `combine` over what all devices returned for its texts.
    """
    own = visit(chunk, 0)
    if slices.count == 1:
        return own
    middle = (chunk.shape[1] + 1) // 2
    halves = [(+1, slice(0, middle)), (-1, slice(middle, chunk.shape[1]))][: chunk.shape[1]]
    home = []
    for direction, columns in halves:
        part = _next_device(chunk[:, columns], direction, slices)
        combined = visit(part, direction)
        for hop in range(2, slices.count):
            part = _next_device(part, direction, slices)
            result = visit(part, direction * hop)
            # The results of the hops before travel while this one is computed.
            combined = combine(_next_device(combined, direction, slices), result)
        home.append(_next_device(combined, direction, slices))
    return combine(own, torch.cat(home, dim=1))


def _next_device(tensor: Tensor, direction: int, slices: Slices) -> Tensor:
    """Every device's slice on the next device: a rotation of the split dimension."""
    return slices.mark(torch.cat([tensor[-direction:], tensor[:-direction]]))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) of finite numbers.

    Under XLA torch.logaddexp would run on the host.
    """
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))


class _RowTotals(dict[int, Tensor]):
    """A running total for each range of rows, (n, R, ...), by the number of the range.

    Sums stay apart by ranges and rows until the end: if a tile is summed at once, XLA's CPU compiler puts the sums of
    all tiles into one unrolled kernel and needs minutes for it.
    """

    def __init__(self, combine: Combine = torch.add) -> None:
        super().__init__()
        self._combine = combine

    def add(self, number: int, terms: Tensor) -> None:
        self[number] = self._combine(self[number], terms) if number in self else terms

    def whole(self) -> Tensor:
        """(n, b, ...)"""
        return torch.cat([self[number] for number in sorted(self)], dim=1)


class _SlicedLoss:
    """The base of both losses: the images on their devices, and their sums."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, slices: Slices, tile_size: int | None) -> None:
        self._slices = slices
        self._tile_size = tile_size or default_tile_size(image.device)
        self._sums, self._products = sum_dtype(image), product_dtype(image)
        self._image = slices.mark(image.to(self._products))
        self._scale, self._bias = scale.to(self._sums), bias.to(self._sums)
        self._num_images = image.shape[0] * image.shape[1]
        self._rows = list(ranges(image.shape[1], self._tile_size))
        self._loss, self._grad_scale, self._grad_bias, self._grad_image = (_RowTotals() for _ in range(4))

    def _over_tiles(
        self, text: Tensor, terms: Callable[[int, slice, slice, Tensor], Tensor], combine: Combine = torch.add
    ) -> Tensor:
        """Call `terms(number, rows, columns, text)` with each tile of these texts.

        Args:
            text: (n, c, D) in the dtype of products.
            terms: returns (n, C, ...); `number` is that of the range of rows.
            combine: of the results of one range of columns.

        Returns:
            (n, c, ...)
        """
        results = []
        for columns in ranges(text.shape[1], self._tile_size):
            of_rows = (terms(number, rows, columns, text[:, columns]) for number, rows in enumerate(self._rows))
            results.append(functools.reduce(combine, of_rows))
        return torch.cat(results, dim=1)

    def _cosines(self, rows: slice, text: Tensor) -> Tensor:
        """(n, R, C) in the dtype of the sums, multiplied in the dtype of products."""
        return torch.bmm(self._image[:, rows], text.transpose(1, 2)).to(self._sums)

    def _push(self, number: int, rows: slice, dz: Tensor, text: Tensor) -> Tensor:
        """Add dz's part of the image gradients; return that of the texts, (n, C, D)."""
        dz = dz.to(self._products)
        self._grad_image.add(number, torch.bmm(dz, text).to(self._sums))
        return torch.bmm(dz.transpose(1, 2), self._image[:, rows]).to(self._sums)

    def finish(self, grad_text: Tensor) -> LossResult:
        """The sums over all visits, divided by the number of images of this program.

        Args:
            grad_text: (n, b, D), the sum of what the visits returned for these texts.
        """
        loss, grad_scale = (totals.whole().sum() / self._num_images for totals in (self._loss, self._grad_scale))
        has_bias = len(self._grad_bias) > 0
        grad_bias = self._grad_bias.whole().sum() / self._num_images if has_bias else torch.zeros_like(self._bias)
        factor = self._scale / self._num_images
        return LossResult(loss, self._grad_image.whole(), grad_text, factor, grad_scale, grad_bias)


class _SlicedSigmoid(_SlicedLoss):
    """The sigmoid's terms: `pairs`, then `visit` with all texts.

    Pairs are computed apart from the negatives: they never leave their device.
    """

    def pairs(self, text: Tensor) -> Tensor:
        """Add the terms of the pairs; return their part of the text gradients, (n, b, D)."""
        image, text = self._image.to(self._sums), self._slices.mark(text).to(self._sums)
        cosines = (image * text).sum(dim=2)
        z = self._scale * cosines + self._bias
        dz = torch.sigmoid(-z).neg()
        for number, rows in enumerate(self._rows):
            self._add(number, torch.nn.functional.softplus(-z[:, rows]), dz[:, rows], dz[:, rows] * cosines[:, rows])
            self._grad_image.add(number, dz[:, rows, None] * text[:, rows])
        return dz[:, :, None] * image

    def _add(self, number: int, loss: Tensor, grad_bias: Tensor, grad_scale: Tensor) -> None:
        self._loss.add(number, loss)
        self._grad_bias.add(number, grad_bias)
        self._grad_scale.add(number, grad_scale)

    def visit(self, text: Tensor, host: int, first: int, drop: Drop | None) -> Tensor:
        """Add the negatives among all images of this program and a part, (n, c, D).

        Returns:
            (n, c, D): sum_i dL/dz_ij image_i.
        """
        hosts_away = host - self._slices.ranks.rank

        def positions(rows: slice) -> Tensor:
            return torch.arange(rows.start, rows.stop, device=text.device)

        def on_devices(part: Tensor, hops: int) -> Tensor:
            # The half that travels up begins at the first text, the half that travels down in the middle.
            start = first + (text.shape[1] - part.shape[1] if hops < 0 else 0)
            if drop is not None:
                negatives, own = drop
                indices = (own[:, start : start + part.shape[1]] + hosts_away * self._num_images).roll(hops, 0)

            def terms(number: int, rows: slice, columns: slice, tile_text: Tensor) -> Tensor:
                x = self._cosines(rows, tile_text)
                if hops == 0 and hosts_away == 0:
                    x = x.masked_fill(positions(rows)[:, None] == start + positions(columns), -torch.inf)
                if drop is not None:
                    dropped = random_drop(own[:, rows], indices[:, columns], negatives.seed, negatives.fraction)
                    x = x.masked_fill(dropped, -torch.inf)
                dz, *sums = negative_terms(x, self._scale, self._bias)
                self._add(number, *(each.sum(dim=2) for each in sums))
                return self._push(number, rows, dz, tile_text)

            return self._over_tiles(part.to(self._products), terms)

        return _rotate_devices(self._slices.mark(text), self._slices, on_devices, torch.add)


class _SlicedSoftmax(_SlicedLoss):
    """The softmax's terms: `normalise`, then `visit`, with all texts, then `pairs`."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, slices: Slices, tile_size: int | None) -> None:
        super().__init__(image, scale, bias, slices, tile_size)
        self._normalisers = _RowTotals(_log_add)

    def normalise(self, text: Tensor, host: int, first: int) -> Tensor:
        """(n, c, 1): log sum exp z over the images of this program.

        The part of these texts in the images' normalisers is added to them.
        """

        def terms(number: int, rows: slice, columns: slice, part: Tensor) -> Tensor:
            z = self._scale * self._cosines(rows, part)
            self._normalisers.add(number, z.logsumexp(dim=2))
            return z.logsumexp(dim=1)[:, :, None]

        def on_devices(part: Tensor, hops: int) -> Tensor:
            return self._over_tiles(part.to(self._products), terms, _log_add)

        return _rotate_devices(self._slices.mark(text), self._slices, on_devices, _log_add)

    def visit(self, both: Tensor, host: int, first: int) -> Tensor:
        """Add the gradients of all terms except the pairs' own.

        Args:
            both: (n, c, D + 1), texts and their normalisers.

        Returns:
            (n, c, D): sum_i dL/dz_ij image_i.
        """

        def on_devices(part: Tensor, hops: int) -> Tensor:
            normalisers = part[:, :, -1:]

            def terms(number: int, rows: slice, columns: slice, text: Tensor) -> Tensor:
                x = self._cosines(rows, text)
                z = self._scale * x
                of_rows = (z - self._normalisers[number][:, :, None]).exp()
                dz = (of_rows + (z - normalisers[:, columns].transpose(1, 2)).exp()) / 2
                self._grad_scale.add(number, (x * dz).sum(dim=2))
                return self._push(number, rows, dz, text)

            return self._over_tiles(part[:, :, :-1].to(self._products), terms)

        return _rotate_devices(self._slices.mark(both), self._slices, on_devices, torch.add)

    def pairs(self, text: Tensor, normalisers: Tensor) -> Tensor:
        """Add the loss and the pairs' own gradients; return those of the texts."""
        image, text = self._image.to(self._sums), text.to(self._products).to(self._sums)
        cosines = (image * text).sum(dim=2)
        for number, rows in enumerate(self._rows):
            self._grad_image.add(number, -text[:, rows])
            both_normalisers = self._normalisers[number] + normalisers[:, rows, 0]
            self._loss.add(number, both_normalisers / 2 - self._scale * cosines[:, rows])
            self._grad_scale.add(number, -cosines[:, rows])
        return -image
