"""Decisions as values: pure functions of what was observed. `launch.py` acts on them."""

from __future__ import annotations

from collections.abc import Sequence

# Lines of metrics that a decision looks at: a single line may hold a checkpoint's or a shard's pause.
_NUM_LINES = 3
_MUCH_WAIT_PCT = 5.0
_LITTLE_WAIT_PCT = 1.0
_FULL = 0.7  # of a worker's time; above it a short delay makes the trainers wait


def wanted_data_workers(lines: Sequence[dict[str, float]], current: int, least: int, most: int) -> int:
    """How many data-shard workers a run should have.

    One more while the trainers wait for data; one fewer once they do not wait and one fewer would still not be full.

    Args:
        lines: metrics since the number last changed, oldest first: `data/wait_pct`, and `data/busy_workers`, how many
            workers' time was spent on decoding.
        current: workers that there are or that are starting.
        least, most: data.num_workers.
    """
    newest = lines[-_NUM_LINES:]
    if len(newest) == _NUM_LINES:
        waits = [line["data/wait_pct"] for line in newest]
        busy = max(line["data/busy_workers"] for line in newest)
        if min(waits) > _MUCH_WAIT_PCT:
            current += 1
        elif max(waits) < _LITTLE_WAIT_PCT and current > 1 and busy < _FULL * (current - 1):
            current -= 1
    return min(max(current, least), most)
