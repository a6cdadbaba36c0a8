"""What a caller of `train` may follow while the run goes on."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Takes a run's lines of metrics and evaluations; may ask the run to stop.

    Attributes:
        must_stop: whether the run shall write a last checkpoint and end. The run reads it twice a second.
    """

    must_stop: bool

    def line(self, metrics: dict[str, float]) -> None:
        """Take a line of metrics. A step that is repeated after a restart comes again."""

    def evaluation(self, result: dict[str, Any]) -> None:
        """Take the evaluation of a checkpoint."""
