"""Check a run before anything starts: shards, batch, model, sets, memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.planning.plan import check_memory
from sigray.orchestrator.resources import check_slices
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.tracker_process import check_trackers
from sigray.workers.config import ModelConfig
from sigray.workers.data.manifest import Manifest, lines_of_progress, scan_shards
from sigray.workers.data.shard_list import in_threads
from sigray.workers.data.tar import DataError
from sigray.workers.named import find_named
from sigray.workers.texts import ten_lines

if TYPE_CHECKING:
    from torch import nn

    from sigray.workers.data.embedding_store import EmbeddingStore, StoreFormat
    from sigray.workers.storage import Storage
    from sigray.workers.training.phases import Phase


def check_run(config: RunConfig, display: Display, *, saved: Manifest | None, is_trial: bool) -> Manifest:
    """Check a run's config against its shards; return the manifest of the shards.

    Args:
        saved: the manifest that the run began with; None: the run begins now.
        is_trial: the sweep has checked model, sets, memory and trackers.

    Raises:
        ConfigError, DataError, OSError: for what the user can fix.
    """
    from sigray.workers.data.worker import check_batch
    from sigray.workers.training.phases import mixes_of

    for name in config.cluster.train_callbacks:
        find_named(name, "cluster.train_callbacks")
    if not is_trial:
        check_trackers(config.run.trackers)
    manifest = scan(config, display, is_old=saved is not None and saved.is_old)
    check_batch(manifest, config.data, config.run.seed, config.train.global_batch_size, mixes_of(config))
    if saved is not None:
        changed = saved.differences(manifest)
        if changed:
            shown = ten_lines(changed)
            raise DataError(f"the shards changed since the run began, so its order cannot be continued:\n  {shown}")
    if not is_trial:
        check_model_and_sets(config, is_begun=saved is not None)
        check_memory(config)
    if config.model.init_from is not None and saved is None:
        from sigray.workers.model.init_weights import check_initial_weights

        display.say(check_initial_weights(config.model).text())
    return manifest


def with_inputs(config: RunConfig, say: Callable[[str], None], begun: RunConfig | None = None) -> RunConfig:
    """Return a run's config with towers and the inputs that its model expects.

    Args:
        say: shows a remark.
        begun: the config of the run, if it goes on.

    Raises:
        ValueError, StoreError: as `take_inputs`.
    """
    from sigray.workers.data.embedding_store import EmbeddingStore
    from sigray.workers.model.inputs import inputs_of
    from sigray.workers.model.trained_inputs import take_inputs

    kept: dict[str, Any] = {}
    wanted = config.model
    if begun is not None:
        kept = inputs_of(begun.model)
        if wanted.name is None and wanted.towers is None:  # the run has its towers, whatever the weights say now
            own = begun.model
            taken: dict[str, Any] = {"name": own.name, "towers": own.towers, "token_bottleneck": own.token_bottleneck}
            taken["image_size"] = wanted.image_size or own.image_size
            if wanted.decoder is not None:
                taken["decoder"] = wanted.decoder.filled_from(own.decoder)
            wanted = wanted.model_copy(update=taken)
    elif config.embeddings.store is not None:
        kept = EmbeddingStore(config.embeddings.store).image_inputs()
    model, remarks = take_inputs(wanted, kept)
    for remark in remarks:
        say(remark)
    return config.model_copy(update={"model": model})


def scan(config: RunConfig, display: Display, *, is_old: bool = False) -> Manifest:
    """Return the manifest of a run's shards, or of their embeddings in a store.

    Headers of unknown shards are read: in tasks of the cluster that the run joins, else in threads of this process.

    Args:
        is_old: count by the rules of a run that began until November 2026.
    """
    from sigray.workers.data.pool import in_tasks

    progress = lines_of_progress(display.say)

    def show(done: int, total: int) -> None:
        if done:
            progress(done, total)
        else:
            display.say(f"reading the headers of {total:,} shards")

    parallel_map = in_tasks if cluster_address(config) else in_threads
    manifest = scan_shards(config.data.shards, config.data, show, parallel_map, is_old=is_old)
    if config.embeddings.store is None:
        return manifest
    return check_store(config).manifest(manifest, config.data, parallel_map)


def longer_text(saved: RunConfig, wanted: RunConfig, storage: Storage) -> str:
    """Return what a larger train.num_samples does to the learning rate."""
    from sigray.workers.checkpoint.index import newest_checkpoint
    from sigray.workers.training.optim import learning_rate
    from sigray.workers.training.phases import phase_at, phases_of

    newest = newest_checkpoint(storage)
    seen = newest[0].samples_seen if newest else 0
    batch = wanted.train.global_batch_size

    def rate(config: RunConfig) -> float:
        phase = phase_at(phases_of(config), seen // batch)
        return learning_rate(phase.optim, phase.schedule.place(seen), phase.schedule.length)

    lengths = f"train.num_samples={wanted.train.num_samples:,}, {saved.train.num_samples:,} so far"
    if rate(saved) == rate(wanted):
        return f"{lengths}: the run goes on as if it had begun with the larger number"
    return (
        f"{lengths}: from {seen:,} samples on, the learning rate is that of optim.schedule={wanted.optim.schedule} to "
        f"the larger number: {rate(wanted):.3g} there instead of {rate(saved):.3g}"
    )


def check_model_and_sets(config: RunConfig, *, is_begun: bool = False) -> None:
    """Check the model, as `check_model_config`, and samples of the held-out sets."""
    from sigray.workers.evaluation.set_checks import check_sets

    check_model_config(config, is_begun=is_begun)
    check_sets(config.eval, config.data, config.embeddings.store)


def check_model_config(config: RunConfig, *, is_begun: bool = False, reads_tokenizer: bool = True) -> None:
    """Check shapes, tokenizer, towers, optimizer and TPU slice.

    Args:
        is_begun: whether the run exists, so that its model stays as it is.
        reads_tokenizer: whether the tokenizer's file is here, or may be fetched.
    """
    from sigray.workers.model.tokenizer import check_tokenizer_keys
    from sigray.workers.model.towers import check_model, layer_scales
    from sigray.workers.training.optim import parameter_groups
    from sigray.workers.training.phases import phases_of
    from sigray.workers.training.student import views_of

    module = check_model(config.model)
    if not is_begun:
        check_tokenizer_keys(config.model)
    if reads_tokenizer:
        check_tokenizer(config.model, module.get_submodule("text"), is_begun=is_begun)
    parameter_groups(module, config.optim, layer_scales(module, config.model, config.optim.layer_decay))
    for phase in phases_of(config):
        if phase.number:
            module = check_border(f"phases.{phase.number - 1}", module, phase)
        if phase.loss.distill is not None:
            views_of(phase.loss.distill, module.get_submodule("visual.trunk"))
    check_slices(config.cluster)


def check_border(key: str, before: nn.Module, phase: Phase) -> nn.Module:
    """Check that a model can go on in a phase; return the phase's model.

    Args:
        key: of the phase in the config.
        before: the model of the phase before, on the meta device as the result.

    Raises:
        ValueError: a pattern of init_fresh matches no parameter, or a tensor cannot be resized to phase.image_size.
    """
    import torch

    from sigray.workers.model.init_weights import resize
    from sigray.workers.model.towers import check_model

    try:
        module = check_model(phase.model)
    except ValueError as error:
        raise ValueError(f"{key}.image_size={phase.model.image_size}: {error}") from None
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    fresh: set[str] = set()
    for pattern in phase.init_fresh:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        fresh |= matched
        if not matched:
            shown = ", ".join(names[:: max(1, len(names) // 8)])
            raise ValueError(
                f"{key}.init_fresh={pattern!r} matches no parameter that trains; their names are such as {shown}"
            )
    here = module.state_dict()
    for name, tensor in before.state_dict().items():
        wanted = here[name].shape
        if tensor.shape == wanted or name in fresh:
            continue
        if resize(name, torch.zeros(tensor.shape), here[name], module).shape != wanted:
            raise ValueError(
                f"{key}.image_size={phase.model.image_size}: {name} {list(tensor.shape)} cannot be resized to "
                f"{list(wanted)}: keep the image size, or make it fresh by init_fresh"
            )
    return module


def check_tokenizer(model: ModelConfig, text_tower: nn.Module | None = None, *, is_begun: bool = False) -> None:
    """Check the tokenizer against the text tower.

    Args:
        text_tower: as built from the config; None: the config alone counts.
        is_begun: as for `check_model_config`.
    """
    from sigray.workers.model.inputs import shapes
    from sigray.workers.model.tokenizer import build_tokenizer, check_pads, check_pooling, find_caption_ends
    from sigray.workers.model.towers import masked_token

    _, context_length, vocab_size = shapes(model)
    if text_tower is not None:
        vocab_size = cast(int, text_tower.vocab_size)
    tokenize = build_tokenizer(model, context_length, vocab_size)
    if model.decoder is not None:
        find_caption_ends(model, tokenize)
    if is_begun:
        return
    check_pooling(model, context_length, tokenize)
    masked = masked_token(text_tower) if text_tower is not None else None
    if masked is not None:
        check_pads(context_length, tokenize, masked)


def check_store(config: RunConfig) -> EmbeddingStore:
    """Return a run's embedding store if the run's tower and preprocessing made it.

    Builds the image tower to take its fingerprint.

    Raises:
        StoreError: if there is no store, or another tower or preprocessing made it.
    """
    store, key, _ = open_store(config)
    store.check(key)
    return store


def open_store(config: RunConfig) -> tuple[EmbeddingStore, dict[str, Any], StoreFormat]:
    """Return a run's embedding store, unread, with its expected key and format."""
    import torch

    from sigray.workers.data.embedding_store import EmbeddingStore, StoreFormat, store_key
    from sigray.workers.model.image_towers import tower_sha256
    from sigray.workers.model.init_weights import build_initial_model
    from sigray.workers.model.inputs import tower_config
    from sigray.workers.model.towers import check_model

    if config.embeddings.store is None:
        raise ConfigError("embeddings.store is not set: give the folder or s3:// prefix of the store")
    check_model(config.model)
    torch.manual_seed(config.run.seed)
    tower = build_initial_model(config.model).eval().get_submodule("visual")
    sha256 = tower_sha256(tower)
    key = store_key(config.model, config.data, config.embeddings, sha256=sha256, precision=config.train.precision)
    dim = tower_config(config.model)["embed_dim"]
    store_format = StoreFormat(config.embeddings.dtype, dim, config.embeddings.num_views)
    return EmbeddingStore(config.embeddings.store), key, store_format
