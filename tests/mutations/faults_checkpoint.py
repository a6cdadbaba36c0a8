"""Faults of what a run keeps: checkpoints, their commit and their number, ledger, fence, lease, hung workers."""

from __future__ import annotations

from tests.mutations.fault import Fault

_CHECKPOINT, _LEDGER = "tests/workers/test_checkpoint.py::test_", "tests/workers/test_ledger.py::test_"
_LEASE, _LAUNCH = "tests/orchestrator/test_lease.py::test_", "tests/orchestrator/test_launch.py::test_"
_DURABLE = (f"{_CHECKPOINT}files_are_durable_before_the_commit_mark",)
_BEST = (f"{_LAUNCH}the_best_checkpoint_is_kept",)

FAULTS = [
    Fault(
        "a checkpoint is committed without waiting for the ledger",
        "workers.checkpoint:CheckpointWriter._write",
        "not all(map(self._storage.exists, after))",
        "False",
        (f"{_CHECKPOINT}is_committed_after_the_files_of_other_ranks",),
    ),
    Fault(
        "the training loop does not name the ledger's files",
        "workers.train:_Saver.save",
        "after=ledger",
        "after=()",
        (f"{_LEDGER}a_checkpoint_waits_for_the_ledgers_of_all_ranks",),
    ),
    Fault(
        "a checkpoint waits for its own rank's ledger only",
        "workers.ledger:ledger_files",
        "for rank in range(world_size)",
        "for rank in range(1)",
        (f"{_LEDGER}a_checkpoint_waits_for_the_ledgers_of_all_ranks",),
    ),
    Fault(
        "the fence is not checked again before the commit",
        "workers.checkpoint:CheckpointWriter._write",
        "self._fence.check()",
        "pass",
        (f"{_CHECKPOINT}a_run_that_is_lost_while_the_files_are_written_is_not_committed",),
    ),
    Fault(
        "the fence lets every owner through",
        "workers.fence:Fence.check",
        "if owner != self.owner:",
        "if False:",
        (f"{_LEASE}the_fence_lets_through_the_owner_alone",),
    ),
    Fault(
        "writes in the background do not look at the fence",
        "workers.background:BackgroundWriter._persist",
        "self._fence.check()",
        "pass",
        (f"{_LEDGER}ranks_that_a_dead_driver_left_write_no_rows",),
    ),
    Fault(
        "a dead attempt's ledger files are kept",
        "workers.ledger:Ledger.__init__",
        "int(match[2]) > first_step",
        "int(match[1]) > first_step",
        (f"{_LEDGER}what_a_dead_attempt_wrote_beyond_its_checkpoint_goes[0]",),
    ),
    Fault(
        "each rank deletes a dead attempt's ledger files",
        "workers.ledger:Ledger.__init__",
        "if rank == 0:",
        "if True:",
        (f"{_LEDGER}what_a_dead_attempt_wrote_beyond_its_checkpoint_goes[1]",),
    ),
    Fault(
        "the ledger does not say what was replaced",
        "workers.ledger:_parquet",
        "np.concatenate(replaced)",
        "np.zeros_like(np.concatenate(replaced))",
        (f"{_LEDGER}rows_come_back_as_they_entered_the_loss",),
    ),
    Fault(
        "rows are written again with each checkpoint",
        "workers.ledger:Ledger.write",
        "self._rows, self._first_step = [], steps_done",
        "self._rows, self._first_step = [*rows], steps_done",
        (f"{_LEDGER}rows_come_back_as_they_entered_the_loss",),
    ),
    Fault(
        "a checkpoint's files are not synced",
        "workers.storage:Storage.write_hashed",
        "os.fsync(opened.fileno())",
        "pass",
        _DURABLE,
    ),
    Fault(
        "the commit mark is not synced",
        "workers.storage:Storage.write",
        "os.fsync(file.fileno())",
        "pass",
        _DURABLE,
    ),
    Fault(
        "a folder that is new is not synced in the one above it",
        "workers.storage:Storage._make_folder",
        "_sync_folder(parent)",
        "pass",
        _DURABLE,
    ),
    Fault(
        "what was saved changes while it is written",
        "workers.checkpoint:CheckpointWriter._copy",
        "return host.copy_(whole(value.detach()))",
        "return value.detach()",
        (f"{_CHECKPOINT}training_may_go_on_while_it_is_written",),
    ),
    Fault(
        "the best checkpoint is deleted",
        "workers.checkpoint:delete_superseded",
        "best[0] if best else None",
        "None",
        _BEST,
    ),
    Fault(
        "the newest figure passes for the best",
        "orchestrator.launch:_Run._mark_best",
        "figure > best[1]",
        "True",
        _BEST,
    ),
    Fault(
        "keep_best is not looked at",
        "orchestrator.launch:_Run._mark_best",
        "if path is None:",
        "if True:",
        _BEST,
    ),
    Fault(
        "milestones are not kept",
        "workers.checkpoint:superseded",
        "kept.add(info.name)",
        "pass",
        (f"{_CHECKPOINT}milestones_are_kept",),
    ),
    Fault(
        "one more checkpoint is kept",
        "workers.checkpoint:superseded",
        "infos[-config.keep_newest :]",
        "infos[-config.keep_newest - 1 :]",
        _BEST,
    ),
    Fault(
        "a checkpoint that was put off is left out",
        "workers.checkpoint:is_due",
        "steps_done // steps > saved_step // steps",
        "steps_done % steps == 0",
        (f"{_CHECKPOINT}when_one_is_due[config3-13-9-0-True]",),
    ),
    Fault(
        "a damaged checkpoint keeps its mark",
        "workers.checkpoint:load_newest",
        'storage.delete(f"{FOLDER}/{other}/{COMMIT}")',
        "pass",
        (f"{_CHECKPOINT}a_damaged_one_loses_its_mark",),
    ),
    Fault(
        "lines of metrics behind the checkpoint come back",
        "workers.committed:read_metrics",
        "if int(name[11:21]) <= last_step:",
        "if True:",
        (f"{_CHECKPOINT}metrics_come_back_without_what_was_not_committed",),
    ),
    Fault(
        "a lease is renewed more seldom than it lives",
        "orchestrator.lease:RunLease._renew",
        "self._stop.wait(_RENEW_S)",
        "self._stop.wait(_LIFETIME_S + _RENEW_S)",
        (f"{_LEASE}two_renewals_may_fail_before_a_lease_ends",),
    ),
    Fault(
        "one failed renewal ends a lease",
        "orchestrator.lease:RunLease._renew",
        "self._stop.wait(_RENEW_S)",
        "self._stop.wait(_LIFETIME_S / 2)",
        (f"{_LEASE}two_renewals_may_fail_before_a_lease_ends",),
    ),
    Fault(
        "a driver that ends leaves its lease",
        "orchestrator.lease:RunLease.__exit__",
        "self._storage.delete(LEASE_FILE)",
        "pass",
        (f"{_LEASE}a_second_driver_is_refused_and_told_whom",),
    ),
    Fault(
        "workers that hang are never killed",
        "orchestrator.launch:_Run._kill_if_hung",
        "ray.kill(worker)",
        "pass",
        (f"{_LAUNCH}training_workers_of_which_nothing_is_heard_are_killed",),
    ),
    Fault(
        "workers are killed although they were heard",
        "orchestrator.launch:_Run._take_events",
        "self._heard_at = time.monotonic()",
        "self._heard_at = self._heard_at or time.monotonic()",
        (f"{_LAUNCH}what_is_heard_puts_the_hang_off",),
    ),
    Fault(
        "hung workers are killed at every look until they are gone",
        "orchestrator.launch:_Run._kill_if_hung",
        "self._heard_at = time.monotonic()",
        "pass",
        (f"{_LAUNCH}training_workers_of_which_nothing_is_heard_are_killed",),
    ),
]
