"""Compute which sample stands where from shard sizes, seed and position.

    N  samples in an epoch     L  lanes     B  global batch size     R  training workers

Pure arithmetic: no files, no state. Epochs follow each other without a gap, so a run is one endless sequence of
positions p = 0, 1, 2, ... Step k takes the positions [k B, (k + 1) B). Position p belongs to lane p mod L, as its
(p div L)-th sample.

In each epoch the shards are permuted and laid end to end. The line of N samples is cut into L segments whose lengths
differ by at most one, as mosaicml-streaming's `partition/` cuts an epoch. Each segment is cut into windows, and the
samples of a window are permuted. Lane l of epoch e reads segment (l - e N) mod L. So in every epoch each lane holds
exactly the positions of its segment, whatever N and L are, and every sample appears once.

Several datasets are mixed by weight. A fixed cycle assigns each position to a dataset, so every stretch of the run has
each dataset's share to within one sample. Each dataset is a stream as above with L lanes and epochs of its own. The
weights may change at given positions. A new cycle begins there, and each dataset goes on where it was.

Nothing here depends on the number of training workers or data-shard workers. The tests check each statement above
sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SampleRef:
    """One sample of one epoch: number `index` in shard number `shard` of the manifest."""

    epoch: int
    shard: int
    index: int

    @property
    def in_manifest(self) -> tuple[int, int]:
        """Return what is the same in every epoch: (shard, index)."""
        return self.shard, self.index


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together: neighbours on the epoch's line from `start`."""

    epoch: int
    start: int
    permutation: np.ndarray  # (length,) int64: slot t of the window shows the sample at start + permutation[t]


@dataclass(frozen=True)
class LaneSlice:
    """Samples [start, stop) of a lane."""

    lane: int
    start: int
    stop: int


@dataclass(eq=False)
class DatasetOrder:
    """The order of one dataset's stream."""

    shard_sizes: np.ndarray  # samples in each shard, in the manifest's order
    first_shard: int  # number in the manifest
    seed: tuple[int, ...]  # the run's seed, and the number of the dataset unless it is 0
    num_lanes: int  # L
    shuffle_window: int  # upper bound of a window's length; the lengths of a segment's windows differ by at most one

    def __post_init__(self) -> None:
        self.num_samples = int(self.shard_sizes.sum())  # N, per epoch
        self._lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by epoch
        self._windows: dict[int, Window] = {}  # by lane: the newest

    def window(self, lane: int, index: int) -> tuple[Window, int]:
        """Return the window of the lane's sample number `index`, and its slot there."""
        epoch, position = divmod(index * self.num_lanes + lane, self.num_samples)
        offset, segment = divmod(position, self.num_lanes)
        small, num_larger = divmod(self.num_samples, self.num_lanes)
        length = small + (segment < num_larger)
        num_windows = -(-length // self.shuffle_window)
        number = ((offset + 1) * num_windows - 1) // length
        first = number * length // num_windows
        last = (number + 1) * length // num_windows
        start = segment * small + min(segment, num_larger) + first
        known = self._windows.get(lane)
        if known is None or (known.epoch, known.start) != (epoch, start):
            permutation = _permutation(last - first, (*self.seed, 1, epoch, segment, number))
            known = self._windows[lane] = Window(epoch, start, permutation)
        return known, offset - first

    def locate(self, epoch: int, line_position: int) -> SampleRef:
        """Return the sample at a position of the epoch's line of permuted shards."""
        shards, ends = self._line(epoch)
        number = int(np.searchsorted(ends, line_position, side="right"))
        before = int(ends[number - 1]) if number else 0
        return SampleRef(epoch, self.first_shard + int(shards[number]), line_position - before)

    def locate_all(self, epoch: int, line_positions: np.ndarray) -> np.ndarray:
        """Return (n, 3) int64 of epoch, shard, index for (n,) positions, as `locate`."""
        shards, ends = self._line(epoch)
        numbers = np.searchsorted(ends, line_positions, side="right")
        before = ends[numbers] - self.shard_sizes[shards[numbers]]
        columns = np.full(len(numbers), epoch), self.first_shard + shards[numbers], line_positions - before
        return np.stack(columns, axis=1).astype(np.int64, copy=False)

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of this epoch, and the end of each on the line."""
        line = self._lines.get(epoch)
        if line is None:
            shards = _permutation(len(self.shard_sizes), (*self.seed, 0, epoch))
            line = shards, np.cumsum(self.shard_sizes[shards])
            # Replaced as a whole: other threads read it. Lanes are in at most two epochs, their prefetch in a third.
            self._lines = {known: self._lines[known] for known in sorted(self._lines)[-2:]} | {epoch: line}
        return line


class StreamOrder:
    """The order of one run: one dataset, or several mixed by weight.

    Lane l of dataset d is lane d L + l of the run.

    Args:
        datasets: for each dataset, the samples in each of its shards, in the manifest's order.
        weights: of the datasets.
        changes: samples after which other weights hold, rising, and those weights; 0 leaves a dataset out.
        seed: the run's seed.
        num_lanes: L, of each dataset.
        shuffle_window: as `DatasetOrder`.

    Attributes:
        num_samples: samples of all datasets, each once.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[int]],
        weights: Sequence[float] = (1.0,),
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        *,
        seed: int,
        num_lanes: int,
        shuffle_window: int,
    ) -> None:
        self.num_lanes = num_lanes
        self.datasets: list[DatasetOrder] = []
        first_shard = 0
        for number, shard_sizes in enumerate(datasets):
            sizes = np.array(shard_sizes, dtype=np.int64)
            seeds = (seed, number) if number else (seed,)  # a run with one dataset keeps the order of older releases
            self.datasets.append(DatasetOrder(sizes, first_shard, seeds, num_lanes, shuffle_window))
            first_shard += len(sizes)
        self.num_samples = sum(dataset.num_samples for dataset in self.datasets)
        self._mixes = [_Mix(0, np.zeros(len(weights), np.int64), _turns(weights))]
        for start, changed in changes:
            given = [self.num_of_dataset(number, start) for number in range(len(self.datasets))]
            self._mixes.append(_Mix(start, np.array(given), _turns(changed)))

    def next_index(self, lane: int, step: int, global_batch_size: int) -> int:
        """Return the first sample of a lane that no step before `step` takes."""
        dataset, lane = divmod(lane, self.num_lanes)
        return -(-(self.num_of_dataset(dataset, step * global_batch_size) - lane) // self.num_lanes)

    def rank_part(self, step: int, global_batch_size: int, rank: int, world_size: int) -> list[LaneSlice]:
        """Return the rank's equal, contiguous part of a step's global batch.

        The global batch is sorted by lane on any number of ranks; rank 0 of 1 has all of it.

        Raises:
            ValueError: world_size does not divide global_batch_size.
        """
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} does not divide by {world_size} training workers")
        size = global_batch_size // world_size
        starts = self._next_indices(step * global_batch_size)
        stops = self._next_indices((step + 1) * global_batch_size)
        ends = np.cumsum(stops - starts)  # of each lane's piece, counted in the batch
        slots = ends - (stops - starts)
        lows = starts + np.maximum(rank * size - slots, 0)
        highs = starts + np.minimum((rank + 1) * size, ends) - slots
        lanes = np.flatnonzero(lows < highs)
        return [LaneSlice(*of_lane) for of_lane in np.stack((lanes, lows[lanes], highs[lanes]), axis=1).tolist()]

    def _next_indices(self, num_samples: int) -> np.ndarray:
        """Return the first sample of each lane after the run's first `num_samples`."""
        lanes = np.arange(self.num_lanes)
        counts = (self.num_of_dataset(number, num_samples) for number in range(len(self.datasets)))
        return np.concatenate([-(-(count - lanes) // self.num_lanes) for count in counts])

    def dataset_of(self, lane: int) -> DatasetOrder:
        """Return the dataset that a lane reads."""
        return self.datasets[lane // self.num_lanes]

    def window(self, lane: int, index: int) -> tuple[Window, int]:
        """Return the window of the lane's sample number `index`, and its slot there."""
        return self.dataset_of(lane).window(lane % self.num_lanes, index)

    def places(self, piece: LaneSlice) -> np.ndarray:
        """Return a lane slice's samples: (stop - start, 3) int64 of epoch, shard, index."""
        dataset = self.dataset_of(piece.lane)
        parts = []
        index = piece.start
        while index < piece.stop:
            window, slot = self.window(piece.lane, index)
            positions = window.start + window.permutation[slot : slot + piece.stop - index]
            parts.append(dataset.locate_all(window.epoch, positions))
            index += len(positions)
        return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)

    def num_of_dataset(self, dataset: int, num_samples: int) -> int:
        """Return how many of the run's first `num_samples` samples are of a dataset."""
        mix = next(mix for mix in reversed(self._mixes) if mix.start <= num_samples)
        cycles, rest = divmod(num_samples - mix.start, mix.turns.shape[1] - 1)
        return int(mix.given[dataset] + cycles * mix.turns[dataset, -1] + mix.turns[dataset, rest])


@dataclass(frozen=True)
class _Mix:
    """How datasets take turns from position `start` on."""

    start: int
    given: np.ndarray  # (datasets,) samples of each dataset before `start`
    turns: np.ndarray  # as `_turns`


_CYCLE = 4096


def _turns(weights: Sequence[float]) -> np.ndarray:
    """Return (datasets, cycle + 1) counts of each dataset's first p cycle positions.

    Each dataset gets its share of the cycle's 4,096 positions, rounded by largest remainder, and at least one if its
    weight is above 0. The positions follow the smooth weighted round robin, which keeps every stretch within one sample
    of the shares.
    """
    if len(weights) == 1:
        return np.array([[0, 1]])
    shares = np.array(weights, dtype=np.float64) / sum(weights) * _CYCLE
    counts = np.maximum(np.floor(shares).astype(np.int64), shares > 0)
    for number in np.argsort(-(shares - counts), kind="stable")[: max(_CYCLE - int(counts.sum()), 0)]:
        counts[number] += 1
    counts[np.argmax(counts)] -= counts.sum() - _CYCLE
    credit = np.zeros(len(counts), np.int64)
    turns = np.zeros((len(counts), _CYCLE + 1), np.int64)
    for position in range(_CYCLE):
        credit += counts
        chosen = int(np.argmax(credit))
        credit[chosen] -= _CYCLE
        turns[:, position + 1] = turns[:, position]
        turns[chosen, position + 1] += 1
    return turns


def _permutation(length: int, seed: tuple[int, ...]) -> np.ndarray:
    # RandomState's streams are frozen by numpy's compatibility policy (NEP 19). Generator's may change with a release,
    # and a run must resume under another numpy.
    return np.random.RandomState(list(seed)).permutation(length)
