"""One fault for each key of `RunConfig`: the run reads the key's default instead of the value that was set.

A fault is text for the end of a config module: a property in the place of the field. What is validated, saved and
compared on resume is still the set value, as where a line of the wiring drops a key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from sigray.orchestrator.config import RunConfig
from sigray.workers.config import Section

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class KeyFault:
    """A key that does not arrive.

    Attributes:
        says: what is wrong.
        file: module to change, relative to the root of the tree.
        append: text for the end of that file.
        tests: pytest node ids; each is green without the fault, and at least one fails by an assertion with it.
    """

    says: str
    file: str
    append: str
    tests: tuple[str, ...]


# What is read for a key that has no default, or for which the default would crash the reader: an expression of the
# value that was set.
_OTHER = {
    "run.name": "'other'",
    "data.shards.*.weight": "value / 2 if value > 1 else value",
    "model.towers": "value and value | {'embed_dim': value['embed_dim'] // 2}",
    "model.name": "value and 'ViT-B-32'",
    "train.num_samples": "value // 2",
    "train.global_batch_size": "value // 2",
    "train.label_noise.kind": "'image' if value == 'text' else 'text'",
    "train.label_noise.fraction": "value / 2",
    "cluster.tpu_type": "'TPU-V5P'",
    "cluster.tpu_topology": "'1x2x4'",
    "optim.num_timescale_samples": "value and 2 * value",
    "loss.caption_weight": "value / 2",
    "phases.*.start": "value / 2 if value >= 1 else value",
    "optim.groups.*.match": "'text.*' if value.startswith('visual') else 'visual.*'",
}


_HERE = "tests/test_keys_arrive.py::"
_ASKED = (f"{_HERE}test_ray_is_asked_for_the_workers_that_the_config_wants",)
_DEVICES = (f"{_HERE}test_training_workers_open_their_devices[cluster1-opened1-False-GlooConfig]",)
_SLICE = (f"{_HERE}test_a_slice_is_reserved_as_a_whole",)
_STEPS = (f"{_HERE}test_steps_lines_and_checkpoints",)
_FOLDERS = (f"{_HERE}test_a_run_lies_where_the_config_says",)
_LEAP = (f"{_HERE}test_a_loss_that_leaps_is_left_out",)
_STEP = f"{_HERE}test_how_a_step_goes_through_the_towers"
_LOSS = f"{_HERE}test_the_loss_that_is_computed"
_CAPTIONS = (f"{_HERE}test_the_decoder_that_captions",)
_STUDENT = (f"{_HERE}test_the_student_and_its_views",)
_OPTIMIZER = (f"{_HERE}test_the_optimizer_of_a_run",)
_RATES = (f"{_HERE}test_learning_rates_of_a_run",)
_ORDER = (f"{_HERE}test_the_order_and_the_first_weights_follow_the_config",)
_MIXED = (f"{_HERE}test_mixed_datasets_keep_their_weights",)
_MEMBERS = (f"{_HERE}test_members_that_are_read",)
_CROPS = (f"{_HERE}test_crops",)
_AHEAD = (f"{_HERE}test_blocks_that_are_asked_for_ahead",)
_BUCKET = (f"{_HERE}test_how_a_bucket_is_reached",)
_SHARD_CACHE = (f"{_HERE}test_remote_shards_are_kept_where_the_config_says",)
_EVALUATION = (f"{_HERE}test_what_an_evaluation_measures_and_how",)
_INPUTS = (f"{_HERE}test_inputs_as_the_config_says",)
_MODEL = (f"{_HERE}test_the_model_that_is_trained",)
_STORE = (f"{_HERE}test_embeddings_are_stored_and_read_as_the_config_says",)
_NOISE = (f"{_HERE}test_labels_are_corrupted_as_asked[text-0.5]",)

_PHASES = "tests/workers/training/test_phases.py::"
_BORDER = (f"{_PHASES}test_a_border_resizes_and_refreshes_what_it_names",)
_OF_PHASES = (f"{_PHASES}test_the_phases_of_a_run_do_what_they_say",)

KEYS: dict[str, tuple[str, ...]] = {
    "run.name": _FOLDERS,
    "run.dir": _FOLDERS,
    "run.storage": _FOLDERS,
    "run.seed": _ORDER,
    "run.trackers": (f"{_HERE}test_trackers_are_checked_and_fed",),
    "data.shards.*.weight": _MIXED,
    "data.image_keys": _MEMBERS,
    "data.captions": _MEMBERS,
    "data.languages": _MEMBERS,
    "data.num_lanes": _ORDER,
    "data.shuffle_window": _ORDER,
    "data.crop": _CROPS,
    "data.crop_scale": _CROPS,
    "data.crop_ratio": _CROPS,
    "data.max_image_pixels": (f"{_HERE}test_images_with_too_many_pixels_are_refused",),
    "data.block_size": _AHEAD,
    "data.num_workers": _ASKED,
    "data.cpus_per_worker": _ASKED,
    "data.resources_per_worker": _ASKED,
    "data.prefetch_batches": _AHEAD,
    "data.shared_blocks": (f"{_HERE}test_blocks_that_a_data_shard_worker_keeps",),
    "data.cache_mib": (f"{_HERE}test_decoded_images_are_kept_for_the_next_epoch[0]",),
    "data.worker_timeout_s": _ASKED,
    "data.max_bad_fraction": (f"{_HERE}test_bad_samples_above_the_rate_stop_the_run",),
    "data.allow_unclosed": (f"{_HERE}test_a_tar_without_closing_blocks_is_accepted",),
    "data.stores.s3_endpoint": _BUCKET,
    "data.stores.gs_endpoint": _BUCKET,
    "data.stores.az_endpoint": _BUCKET,
    "data.stores.requester_pays": (f"{_HERE}test_who_pays_for_requests",),
    "data.stores.signed_urls": (f"{_HERE}test_presigned_urls_come_from_the_file_of_the_config",),
    "data.stores.region": _BUCKET,
    "data.stores.profile": _BUCKET,
    "data.stores.anonymous": (f"{_HERE}test_a_public_bucket_is_asked_without_a_signature",),
    "data.stores.num_connections": _BUCKET,
    "data.stores.read_timeout_s": _BUCKET,
    "data.stores.deadline_s": _BUCKET,
    "data.shard_cache": _SHARD_CACHE,
    "data.shard_cache_gib": _SHARD_CACHE,
    "model.name": ("tests/workers/model/test_towers.py::test_named_open_clip_model",),
    "model.towers": _MODEL,
    "model.image_size": _MODEL,
    "model.image_tower": (f"{_HERE}test_a_tower_of_a_function",),
    "model.tokenizer": (f"{_HERE}test_the_tokenizer_of_a_file",),
    "model.tokenizer_sha256": (f"{_HERE}test_another_tokenizer_than_the_configs_is_refused",),
    "model.token_bottleneck": _MODEL,
    "model.decoder.layers": _CAPTIONS,
    "model.decoder.width": _CAPTIONS,
    "model.decoder.heads": _CAPTIONS,
    "model.decoder.bias": _CAPTIONS,
    "model.heads.hidden": _STUDENT,
    "model.heads.bottleneck": _STUDENT,
    "model.heads.prototypes": _STUDENT,
    "model.init_from": (f"{_HERE}test_weights_to_begin_with[fresh0]",),
    "model.init_fresh": (f"{_HERE}test_weights_to_begin_with[fresh1]",),
    "model.init_logit_scale": _MODEL,
    "model.init_logit_bias": _MODEL,
    "model.locked": _MODEL,
    "model.trained_blocks": _MODEL,
    "model.image_mean": _MODEL,
    "model.image_std": _MODEL,
    "model.image_resize": _INPUTS,
    "model.image_interpolation": _INPUTS,
    "model.image_fill": _INPUTS,
    "model.text_clean": _INPUTS,
    "model.text_pad_id": _INPUTS,
    "model.text_pad_side": _INPUTS,
    "train.num_samples": _STEPS,
    "train.global_batch_size": _STEPS,
    "train.micro_batch_size": (f"{_STEP}[micro_batch_size]",),
    "train.activation_checkpointing": (f"{_STEP}[activation_checkpointing]",),
    "train.compile_blocks": (f"{_HERE}test_blocks_are_compiled",),
    "train.precision": (f"{_STEP}[precision]",),
    "train.log_every_steps": _STEPS,
    "train.on_bad_loss": _LEAP,
    "train.max_loss_ratio": _LEAP,
    "train.ema": ("tests/workers/training/test_ema.py::test_a_checkpoint_holds_the_average_of_what_trains",),
    "train.ledger": (f"{_HERE}test_every_pair_is_written_to_the_ledger",),
    "train.label_noise.kind": _NOISE,
    "train.label_noise.fraction": _NOISE,
    "embeddings.store": _STORE,
    "embeddings.dtype": _STORE,
    "embeddings.num_views": _STORE,
    "embeddings.batch_size": _STORE,
    "loss.name": (f"{_LOSS}[loss2-expected2]",),
    "loss.negatives": (f"{_LOSS}[loss3-expected3]",),
    "loss.negatives_fraction": (f"{_LOSS}[loss1-expected1]",),
    "loss.caption_weight": _CAPTIONS,
    "loss.caption_parallel": _CAPTIONS,
    "loss.distill.local_weight": _STUDENT,
    "loss.distill.masked_weight": _STUDENT,
    "loss.distill.num_local_views": _STUDENT,
    "loss.distill.local_size": _STUDENT,
    "loss.distill.global_scale": _STUDENT,
    "loss.distill.local_scale": _STUDENT,
    "loss.distill.mask_fraction": _STUDENT,
    "loss.distill.predicts": _STUDENT,
    "loss.distill.teacher": _STUDENT,
    "loss.distill.student_temperature": _STUDENT,
    "loss.distill.teacher_temperature": _STUDENT,
    "loss.distill.balance": _STUDENT,
    "loss.distill.center_momentum": _STUDENT,
    "loss.tile_size": (f"{_LOSS}[loss0-expected0]",),
    "optim.name": (f"{_HERE}test_other_optimizers[lion]",),
    "optim.lr": _RATES,
    "optim.beta1": _OPTIMIZER,
    "optim.beta2": _OPTIMIZER,
    "optim.eps": _OPTIMIZER,
    "optim.weight_decay": _OPTIMIZER,
    "optim.groups.*.match": _OPTIMIZER,
    "optim.groups.*.lr_scale": _OPTIMIZER,
    "optim.groups.*.weight_decay": _OPTIMIZER,
    "optim.grad_clip_norm": _OPTIMIZER,
    "optim.schedule": (f"{_HERE}test_a_constant_learning_rate",),
    "optim.num_warmup_samples": _RATES,
    "optim.num_timescale_samples": (f"{_HERE}test_rsqrt_and_a_cooldown",),
    "optim.num_cooldown_samples": (f"{_HERE}test_rsqrt_and_a_cooldown",),
    "optim.weight_decay_on": _OPTIMIZER,
    "optim.layer_decay": _OPTIMIZER,
    "phases.*.start": _OF_PHASES,
    "phases.*.image_size": _BORDER,
    "phases.*.weights": (f"{_PHASES}test_each_sample_of_each_dataset_comes_once",),
    "phases.*.loss": (f"{_PHASES}test_what_a_phase_leaves_out_is_as_in_the_phase_before",),
    "phases.*.optim": _OF_PHASES,
    "phases.*.schedule": _OF_PHASES,
    "phases.*.stretch": _OF_PHASES,
    "phases.*.init_fresh": _BORDER,
    "sharding.weights": _DEVICES,
    "eval.sets.*.classes": (f"{_HERE}test_the_best_checkpoint_is_marked",),
    "eval.sets.*.class_field": _EVALUATION,
    "eval.sets.*.templates": _EVALUATION,
    "eval.sets.*.retrieval": _EVALUATION,
    "eval.sets.*.linear_probe": _EVALUATION,
    "eval.sets.*.languages": _EVALUATION,
    "eval.sets.*.language_captions": _EVALUATION,
    "eval.batch_size": _EVALUATION,
    "eval.num_workers": _ASKED,
    "eval.cpus_per_worker": _ASKED,
    "eval.accelerator": _EVALUATION,
    "eval.at_start": (f"{_HERE}test_the_initial_weights_are_evaluated",),
    "eval.pixel_baseline": _EVALUATION,
    "eval.num_sheet_images": _EVALUATION,
    "cluster.address": (f"{_HERE}test_a_cluster_that_is_there_is_joined",),
    "cluster.accelerator": (f"{_HERE}test_training_workers_open_their_devices[cluster0-opened0-True-TorchConfig]",),
    "cluster.devices_per_worker": _DEVICES,
    "cluster.tpu_type": _SLICE,
    "cluster.tpu_topology": _SLICE,
    "cluster.device": (f"{_HERE}test_a_named_device_refuses_what_does_not_fit",),
    "cluster.num_workers": _ASKED,
    "cluster.shrink_after_s": (f"{_HERE}test_a_run_shrinks_after_some_patience[40]",),
    "cluster.grow_after_s": (f"{_HERE}test_a_run_grows_after_some_training[35]",),
    "cluster.cpus_per_worker": _ASKED,
    "cluster.resources_per_worker": _ASKED,
    "cluster.max_failures_per_hour": (f"{_HERE}test_failures_within_an_hour_are_counted",),
    "cluster.hang_timeout_s": (f"{_HERE}test_training_workers_that_hang_are_killed",),
    "cluster.train_callbacks": _ASKED,
    "cluster.dashboard": _ASKED,
    "checkpoint.save_every_steps": _STEPS,
    "checkpoint.save_every_s": (f"{_HERE}test_checkpoints_by_time",),
    "checkpoint.keep_newest": _STEPS,
    "checkpoint.keep_every_samples": _STEPS,
    "checkpoint.keep_best": (f"{_HERE}test_the_best_checkpoint_is_marked",),
    "checkpoint.storage_timeout_s": (f"{_HERE}test_the_storage_may_refuse_for_so_long",),
}
"""Each key of a run, and the tests of which one fails if the key does not arrive."""

EXCEPTIONS: dict[str, str] = {
    "data.shards": "a path: without it there is no sample",
    "data.shards.*.shards": "a path: without it there is no sample",
    "eval.sets.*.shards": "a path: without it there is no sample",
}
"""Keys without a fault, and why."""


def leaf_keys() -> dict[str, tuple[type[Section], str]]:
    """Each key of a run's YAML that holds a value, with the section class and the field that it is.

    `*` stands for a name that the user chooses, and for any entry of a list.
    """
    return dict(_leaves(RunConfig, ""))


def _leaves(section: type[Section], prefix: str) -> Iterator[tuple[str, tuple[type[Section], str]]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        found = list(_alternatives(field.annotation))
        if any(nested is None for nested, _ in found):
            yield key, (section, name)
        for nested, star in found:
            if nested is not None:
                yield from _leaves(nested, f"{key}.{star}")


def _alternatives(annotation: Any) -> Iterator[tuple[type[Section] | None, str]]:
    """What may stand at a key: a section, with `*.` for one in a dict or list; None: a value."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, ""
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for part in parts[:1] if get_origin(annotation) is Annotated else parts:
            yield from _alternatives(part)
    elif get_origin(annotation) in (dict, list):
        yield next((nested for nested, _ in _alternatives(parts[-1])), None), "*."
    else:
        yield None, ""


def append_for(key: str) -> tuple[str, str]:
    """The file and the text for its end, by which reads of a key give its default."""
    section, name = leaf_keys()[key]
    field = section.model_fields[name]
    other = _OTHER.get(key)
    if other is None:
        assert not field.is_required(), f"{key}: no default, and no other value is written here"
        other = repr(field.get_default(call_default_factory=True))
    file = Path(inspect.getfile(section)).resolve().relative_to(_ROOT)
    read = f"self.__dict__[{name!r}]"
    return str(file), f"\n{section.__name__}.{name} = property(lambda self: (lambda value: {other})({read}))\n"


def _faults() -> Iterator[KeyFault]:
    for key, tests in KEYS.items():
        if key != "data.languages":  # it is read where the config is: see faults_config.py
            file, append = append_for(key)
            yield KeyFault(f"{key} does not arrive", file, append, tests)


FAULTS = list(_faults())
