"""Decisions without a cluster: from observed figures to values."""

from orchestrator.policy import wanted_data_workers


def lines(*waits_and_busy):
    return [{"data/wait_pct": wait, "data/busy_workers": busy} for wait, busy in waits_and_busy]


def test_waiting_trainers_get_another_data_worker():
    waiting = lines((40, 2), (30, 2), (20, 2))
    assert wanted_data_workers(waiting, 2, 1, 4) == 3
    assert wanted_data_workers(waiting, 4, 1, 4) == 4
    assert wanted_data_workers(waiting[:2], 2, 1, 4) == 2  # too few lines since the last change
    assert wanted_data_workers(lines((40, 2), (0, 2), (40, 2)), 2, 1, 4) == 2  # one pause is no shortage


def test_idle_data_workers_go():
    assert wanted_data_workers(lines(*[(0, 0.6)] * 3), 3, 1, 4) == 2
    assert wanted_data_workers(lines(*[(0, 0.6)] * 3), 3, 3, 4) == 3
    assert wanted_data_workers(lines(*[(0, 1.5)] * 3), 3, 1, 4) == 3  # two would be busy three quarters of the time
    assert wanted_data_workers(lines(*[(3, 0.6)] * 3), 3, 1, 4) == 3
    assert wanted_data_workers(lines(*[(0, 0.0)] * 3), 1, 1, 4) == 1


def test_growing_and_shrinking_come_to_rest():
    """A run that needs 2.4 workers' time: whatever it begins with, it ends at a number and stays there."""
    for start in range(1, 7):
        current, seen = start, []
        for _ in range(20):
            wait = max(0.0, 100 * (1 - current / 2.4))
            current = wanted_data_workers(lines(*[(wait, min(current, 2.4))] * 3), current, 1, 6)
            seen.append(current)
        assert len(set(seen[-8:])) == 1, seen
        assert 3 <= seen[-1] <= 4
