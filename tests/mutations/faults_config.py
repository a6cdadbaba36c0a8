"""Faults of the wiring: a default replaces a value of the config in a call."""

from __future__ import annotations

from tests.mutations.fault import Fault
from tests.mutations.keys import KEYS

_RUN = "sigray.orchestrator.run."
_SUPERVISOR = "sigray.orchestrator.run.supervisor:"
_HERE = "tests/test_keys_arrive.py::test_"
_DRIVER = "tests/orchestrator/run/test_supervisor.py::test_a_run_"
_RESUME = "tests/orchestrator/run/test_resume.py::test_a_changed_key_is_refused_or_free"


def _of(key: str) -> tuple[str, ...]:
    return KEYS[key]


FAULTS = [
    # driver -> job of the training workers
    Fault(
        "devices_per_worker is lost",
        _RUN + "worker_group:train_job",
        "config.cluster.num_devices",
        "4",
        _of("cluster.devices_per_worker"),
    ),
    Fault(
        "cpus_per_worker is lost",
        _RUN + "worker_group:train_job",
        "config.cluster.cpus_per_worker",
        "1",
        (f"{_HERE}threads_of_a_training_worker",),
    ),
    Fault(
        "micro_batch_size is lost",
        _RUN + "worker_group:train_job",
        "config.micro_batch_size(num_workers)",
        "None",
        _of("train.micro_batch_size"),
    ),
    # job -> training worker
    Fault(
        "save_every_steps is lost",
        "sigray.workers.training.saver:Saver.may_save",
        "self._job.checkpoint.save_every_steps",
        "500",
        _of("checkpoint.save_every_steps"),
    ),
    Fault(
        "storage_timeout_s is lost for the ledger",
        "sigray.workers.training.saver:Saver.close",
        "self._job.checkpoint.storage_timeout_s",
        "900",
        _of("checkpoint.storage_timeout_s"),
    ),
    Fault(
        "max_loss_ratio is lost",
        "sigray.workers.training.log_window:LogWindow.__init__",
        "job.train.max_loss_ratio",
        "None",
        _of("train.max_loss_ratio"),
    ),
    Fault(
        "keep_newest and the like are lost",
        "sigray.workers.training.saver:Saver.__init__",
        "                job.checkpoint,",
        "                type(job.checkpoint)(),",
        _of("checkpoint.keep_newest"),
    ),
    # driver -> Ray
    Fault(
        "seed of the data-shard workers is lost",
        _RUN + "driver:_RayLife.__init__",
        "seed=config.run.seed",
        "seed=0",
        _of("run.seed"),
    ),
    Fault(
        "shrink_after_s is lost",
        _SUPERVISOR + "Supervisor._wait_for_capacity",
        "cluster.shrink_after_s",
        "10",
        _of("cluster.shrink_after_s"),
    ),
    Fault(
        "grow_after_s is lost",
        _SUPERVISOR + "Supervisor._grow",
        "self.config.cluster.grow_after_s",
        "60",
        _of("cluster.grow_after_s"),
    ),
    Fault(
        "hang_timeout_s is lost",
        _SUPERVISOR + "Supervisor.__post_init__",
        "self.config.cluster.hang_timeout_s",
        "1800",
        _of("cluster.hang_timeout_s"),
    ),
    Fault(
        "max_failures_per_hour is lost",
        _SUPERVISOR + "Supervisor._decide",
        "self.config.cluster.max_failures_per_hour",
        "10",
        _of("cluster.max_failures_per_hour"),
    ),
    Fault(
        "worker_timeout_s is lost",
        _RUN + "worker_group:WorkerGroup.trainer",
        "config.data.worker_timeout_s",
        "120",
        _of("data.worker_timeout_s"),
    ),
    Fault(
        "CPUs of data-shard workers are not counted",
        _RUN + "ray_session:_own_resources",
        "data.cpus_per_worker",
        "1",
        _of("data.cpus_per_worker"),
    ),
    Fault(
        "a Ray has room for one trial only",
        _RUN + "ray_session:_own_resources",
        "max(1, num_trials)",
        "1",
        (f"{_HERE}a_sweep_has_room_for_all_its_trials",),
    ),
    Fault(
        "resources of training workers are lost",
        "sigray.orchestrator.resources:worker_resources",
        "{**resources, **cluster.resources_per_worker}",
        "resources",
        _of("cluster.resources_per_worker"),
    ),
    Fault(
        "CPUs of data-shard workers are not reserved",
        "sigray.workers.data.pool:DataPool._start",
        "num_cpus=data.cpus_per_worker",
        "num_cpus=1",
        _of("data.cpus_per_worker"),
    ),
    Fault(
        "block_size is lost where a trial is expected",
        _RUN + "trial:Rungs.__init__",
        "config.data.block_size",
        "128",
        (f"{_HERE}a_trial_reads_on_from_its_block",),
    ),
    Fault(
        "batch_size of an evaluation is lost",
        "sigray.workers.evaluation.features:WorkerGroup.images",
        "self._evaluation.batch_size",
        "256",
        _of("eval.batch_size"),
    ),
    # the config itself
    Fault(
        "languages are lost",
        "sigray.workers.config:DataConfig._fill_languages_in",
        'for language, share in content["languages"].items()',
        'for language, share in {next(iter(content["languages"])): total}.items()',
        _of("data.languages"),
    ),
    Fault(
        "resume accepts another num_lanes",
        "sigray.orchestrator.config:FIXED_ON_RESUME",
        '"data.num_lanes",',
        "",
        (f"{_RESUME}[data.num_lanes]",),
    ),
    Fault(
        "resume accepts another shuffle_window",
        "sigray.orchestrator.config:FIXED_ON_RESUME",
        '"data.shuffle_window",',
        "",
        (f"{_RESUME}[data.shuffle_window]",),
    ),
    Fault(
        "resume refuses another micro-batch",
        "sigray.orchestrator.config:_FREE_ON_RESUME",
        '"train.micro_batch_size",',
        "",
        (f"{_RESUME}[train.micro_batch_size]",),
    ),
    Fault(
        "a resume takes the datasets in another order",
        "sigray.workers.data.manifest:Manifest.differences",
        "if [shard.dataset for shard in self.shards] != [shard.dataset for shard in now.shards]",
        "if False",
        (f"{_HERE}a_resume_refuses_the_same_datasets_in_another_order",),
    ),
    Fault(
        "a resume takes another count of a shard's samples",
        "sigray.workers.data.manifest:Manifest.differences",
        "if shard.num_samples != after[url].num_samples",
        "if False",
        ("tests/workers/data/test_manifest.py::test_another_order_or_count_of_the_same_shards_is_a_difference",),
    ),
    # values that the driver computes and passes on
    Fault(
        "the steps that are left out do not reach the decision about the next bad one",
        _SUPERVISOR + "Supervisor._decide",
        "read_left_out(self._storage)",
        "[]",
        (f"{_DRIVER}goes_back_until_ten_steps_are_left_out[10]",),
    ),
    Fault(
        "a run grows only if all of its workers fit once more",
        _SUPERVISOR + "Supervisor._grow",
        "other - size",
        "other",
        (f"{_DRIVER}grows_if_the_difference_fits[2-asked1]",),
    ),
    Fault(
        "a run that fails has trained for no time",
        _SUPERVISOR + "Supervisor.run",
        "time.monotonic() - self._training_since",
        "0.0",
        (f"{_DRIVER}that_fails_says_how_long_it_trained",),
    ),
    Fault(
        "micro_batch_size is lost with a range of workers",
        "sigray.orchestrator.config:RunConfig.micro_batch_size",
        "micro or batch // largest",
        "batch // largest",
        ("tests/orchestrator/test_config.py::test_micro_batches_of_a_range_of_workers[10-expected1]",),
    ),
    Fault(
        "the training workers meet at the host of Ray's first one",
        "sigray.orchestrator.run.backends:_GlooBackend.on_start",
        "order[0], get_address_and_port",
        "0, get_address_and_port",
        ("tests/orchestrator/run/test_backends.py::test_all_workers_meet_at_the_host_of_rank_0",),
    ),
]
