"""Divide a global batch over training workers; size the pool of data workers."""

from __future__ import annotations

MAX_DATA_WORKER_UTILISATION = 0.7
"""Fraction of a data-shard worker's time for decoding.

Above it, a short delay makes the training workers wait.
"""


def usable_sizes(least: int, most: int, global_batch_size: int) -> list[int]:
    """Return the numbers of training workers that divide the batch, largest first."""
    return [size for size in range(most, least - 1, -1) if global_batch_size % size == 0]


def micro_batch(part: int, limit: int, num_devices: int = 1) -> int:
    """Return the largest micro-batch within a limit that divides a worker's part.

    The micro-batch divides over the worker's devices if the part does. Then it may have to exceed the limit.

    Args:
        part: samples of the global batch on one training worker.
        limit: samples.
        num_devices: devices of one training worker.
    """
    multiple = num_devices if part % num_devices == 0 else 1
    return next(size for size in range(max(min(part, limit), multiple), 0, -1) if part % size == size % multiple == 0)
