"""A fence around a run's storage: training workers whose driver has lost the run write nothing more into it.

A driver that dies, or its machine, may leave training workers that go on. The next driver's lease names another owner;
what they would write then, checkpoints and ledger, is refused here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sigray.workers.storage import Storage

LEASE_FILE = "lease.json"


class RunTakenOver(RuntimeError):
    """Another driver has the run."""


@dataclass(frozen=True)
class Fence:
    """Compares the run's lease with the one under which these training workers were started.

    Args:
        storage: of the run.
        owner: of the lease then; None where nobody leases runs.
    """

    storage: Storage
    owner: str | None

    def check(self) -> None:
        """Called before each write.

        Raises:
            RunTakenOver: where the lease names another owner.
            OSError: where the storage cannot say.
        """
        if self.owner is None:
            return
        try:
            owner = json.loads(self.storage.read(LEASE_FILE))["owner"]
        except (FileNotFoundError, ValueError):
            return  # the driver has ended, or is just writing: nobody else has it
        if owner != self.owner:
            raise RunTakenOver(f"{self.storage.uri} has another driver by now: nothing more is written from here")
