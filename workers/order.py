"""Which sample stands where: pure arithmetic from (shard sizes, seed, position). No files, no state.

    N  samples in an epoch     L  lanes     B  global batch size     R  training workers

Epochs follow each other without a gap, so a run is one endless sequence of positions p = 0, 1, 2, ... Step k takes
the positions [k B, (k + 1) B). Position p belongs to lane p mod L, as its (p div L)-th sample.

In each epoch the shards are permuted and laid end to end; that line of N samples is cut into L segments whose lengths
differ by one at most (as mosaicml-streaming's `partition/` cuts an epoch), each segment into windows, and the samples
of a window are permuted. Lane l of epoch e reads segment (l - e N) mod L, which makes the count come out: in every
epoch each lane holds exactly the positions of its segment, whatever N and L are, and every sample appears once.

Nothing here depends on how many workers train or decode. The tests check the same statements sample by sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SampleRef:
    """One sample of one epoch: `index` counts inside shard number `shard` of the manifest."""

    epoch: int
    shard: int
    index: int

    @property
    def in_manifest(self) -> tuple[int, int]:
        """The same in every epoch."""
        return self.shard, self.index


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together: neighbours on the epoch's line from `start` on."""

    epoch: int
    start: int
    permutation: np.ndarray  # (length,) int64: slot t of the window shows the sample at start + permutation[t]


@dataclass(frozen=True)
class LaneSlice:
    """Samples [start, stop) of a lane."""

    lane: int
    start: int
    stop: int


class StreamOrder:
    """The order of one run.

    Args:
        shard_sizes: samples in each shard, in the manifest's order.
        seed: the run's seed.
        num_lanes: L.
        shuffle_window: upper bound of a window's length; the windows of a segment are of equal length, within one.

    Attributes:
        num_samples: N, samples per epoch.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, num_lanes: int, shuffle_window: int) -> None:
        self.shard_sizes = np.array(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.seed, self.num_lanes, self.shuffle_window = seed, num_lanes, shuffle_window
        # Every lane is inside one epoch, or one of two at its turn, and inside one window.
        self._lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[int, Window] = {}

    def batch(self, step: int, global_batch_size: int) -> list[LaneSlice]:
        """The global batch of a step, lane by lane: the canonical order of its pairs on any number of ranks."""
        first, last = step * global_batch_size, (step + 1) * global_batch_size
        slices = (
            LaneSlice(lane, -(-(first - lane) // self.num_lanes), -(-(last - lane) // self.num_lanes))
            for lane in range(self.num_lanes)
        )
        return [piece for piece in slices if piece.start < piece.stop]

    def rank_part(self, step: int, global_batch_size: int, rank: int, world_size: int) -> list[LaneSlice]:
        """Rank's equal, contiguous part of `batch`.

        Raises:
            ValueError: where world_size does not divide global_batch_size.
        """
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} does not divide by {world_size} training workers")
        size = global_batch_size // world_size
        begin, end, slot, part = rank * size, (rank + 1) * size, 0, []
        for piece in self.batch(step, global_batch_size):
            count = piece.stop - piece.start
            low, high = max(begin - slot, 0), min(end - slot, count)
            if low < high:
                part.append(LaneSlice(piece.lane, piece.start + low, piece.start + high))
            slot += count
        return part

    def window(self, lane: int, index: int) -> tuple[Window, int]:
        """The window that holds the lane's sample number `index`, and that sample's slot in it."""
        epoch, position = divmod(index * self.num_lanes + lane, self.num_samples)
        offset, segment = divmod(position, self.num_lanes)
        small, num_larger = divmod(self.num_samples, self.num_lanes)
        length = small + (segment < num_larger)
        num_windows = -(-length // self.shuffle_window)
        number = ((offset + 1) * num_windows - 1) // length
        first, last = number * length // num_windows, (number + 1) * length // num_windows
        start = segment * small + min(segment, num_larger) + first
        known = self._windows.get(lane)
        if known is None or (known.epoch, known.start) != (epoch, start):
            permutation = _permutation(last - first, (self.seed, 1, epoch, segment, number))
            known = self._windows[lane] = Window(epoch, start, permutation)
        return known, offset - first

    def locate(self, epoch: int, line_position: int) -> SampleRef:
        """The sample at a place of the epoch's line of permuted shards."""
        shards, ends = self._line(epoch)
        number = int(np.searchsorted(ends, line_position, side="right"))
        before = int(ends[number - 1]) if number else 0
        return SampleRef(epoch, int(shards[number]), line_position - before)

    def samples(self, piece: LaneSlice) -> Iterator[SampleRef]:
        """The samples of a lane slice, one by one."""
        for index in range(piece.start, piece.stop):
            window, slot = self.window(piece.lane, index)
            yield self.locate(window.epoch, window.start + int(window.permutation[slot]))

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of this epoch, and where each ends on the line."""
        if epoch not in self._lines:
            while len(self._lines) > 1:
                self._lines.pop(min(self._lines))
            shards = _permutation(len(self.shard_sizes), (self.seed, 0, epoch))
            self._lines[epoch] = shards, np.cumsum(self.shard_sizes[shards])
        return self._lines[epoch]


def _permutation(length: int, seed: tuple[int, ...]) -> np.ndarray:
    # RandomState's streams are frozen by numpy's compatibility policy (NEP 19); Generator's may change with a
    # release, and a run must resume under another numpy.
    return np.random.RandomState(list(seed)).permutation(length)
