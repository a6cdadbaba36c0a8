"""`sigray export`: write a run's checkpoint for other programs, with a model card.

The folder is written under a temporary name and renamed at the end, so a folder with the final name is complete. In a
bucket, the model card is written last.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.resources
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.run_folder import EXPORTED, SUMMARY, RunFolder, check_inputs, evaluation_name
from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.tar import DataError
from sigray.workers.parse import ParseError, parse_json
from sigray.workers.storage import Storage
from sigray.workers.texts import first_ten
from sigray.workers.training.phases import phase_of_checkpoint, phases_of

CARD = "README.md"
MAX_DIFFERENCE = 1e-5
"""Largest difference of a feature with which an open_clip export is accepted."""
_MAX_TEXTS = 2000  # to compare
_SOME_TEXTS = ("a photo of a cat", "two dogs, one ball", "rain")


def export_run(
    config: RunConfig,
    info: CheckpointInfo,
    form: str,
    out: str | None,
    *,
    weights: str | None = None,
    with_decoder: bool = False,
    overwrite: bool,
) -> tuple[str, list[str]]:
    """Write a checkpoint as `workers/model/export.py` can; return place and remarks.

    An export for open_clip or transformers is loaded by it, and its features are compared.

    Args:
        form: open_clip, transformers, safetensors or onnx.
        out: the folder to write, or its s3:// URL; None: RUN/export/FORM.
        weights: ema or last; None: ema if the checkpoint has it.
        with_decoder: keep the captioning decoder, which the form safetensors alone can.
        overwrite: delete an earlier export first.

    Raises:
        ConfigError: if the folder is in use, the model cannot be exported, or the checkpoint has no average or decoder.
        CheckpointError: for a damaged checkpoint.
        RuntimeError: if a package is missing, or the exported model computes other features.
    """
    from sigray.workers.model.export import EXPORTERS, LOADERS, compare
    from sigray.workers.model.init_weights import build_trained_model
    from sigray.workers.model.towers import TRAINING_PARTS, num_parameters

    check_decoder(form, with_decoder=with_decoder)
    if with_decoder and config.model.decoder is None:
        raise ConfigError(f"--with-decoder: {config.storage_uri} was trained without one (model.decoder=null)")
    phase = phase_of_checkpoint(phases_of(config), info.step)
    config = config.model_copy(update={"model": phase.model, "loss": phase.loss, "optim": phase.optim})
    ema = info.has_ema if weights is None else weights == "ema"
    if ema and not info.has_ema:
        raise ConfigError(
            f"{info.name} of {config.storage_uri} holds no average of the weights (train.ema={config.train.ema}; it "
            "begins with the first step): leave out --weights, or give a checkpoint that has ema.safetensors"
        )
    place = Storage(out or config.folder / "export" / form)
    path = Path(place.uri)
    is_used = place.exists("") or (not place.is_local and bool(place.list("")))
    if is_used and not overwrite:
        raise ConfigError(f"{place.uri} exists: give another --out, or --overwrite")
    if is_used:
        check_inputs(place, config.model_dump(mode="json", exclude={"run"}))
        others = [name for name in place.walk() if not any(fnmatch.fnmatch(name, known) for known in EXPORTED)]
        if others or (place.is_local and (path.is_symlink() or not path.is_dir())):
            what = first_ten(others) or "it is a file or link"
            raise ConfigError(f"{place.uri} is no folder of an export: {what}. Give another --out")
    if form in LOADERS and config.model.image_tower is not None:
        raise ConfigError(
            f"{form} has no image tower of other packages (model.image_tower={config.model.image_tower}): "
            "use --format onnx or safetensors"
        )
    run = RunFolder(config)
    module = build_trained_model(run.storage, info, config.model, ema=ema).eval()
    if place.is_local:
        path.parent.mkdir(parents=True, exist_ok=True)
    remarks = []
    if phase.number:
        remarks.append(f"weights of the run's phase {phase.number}: {', '.join(phase.changes)}")
    if info.has_ema:
        half_life = f"half-life {config.train.ema:,} samples"
        remarks.append(
            f"weights: their average ({half_life})" if ema else "weights: of the last step, not their average"
        )
    left_out = {name for name in TRAINING_PARTS if hasattr(module, name) and not (with_decoder and name == "decoder")}
    if left_out:
        sizes = {name: num_parameters(module.get_submodule(name)) for name in sorted(left_out)}
        parts = ", ".join(f"{name} ({size:,} parameters)" for name, size in sizes.items())
        remedy = "; --format safetensors --with-decoder keeps the decoder" if "decoder" in left_out else ""
        remarks.append(f"left out: {parts}{remedy}")
    for name in left_out:
        delattr(module, name)
    kept = config.model.decoder if with_decoder else None
    config = config.model_copy(update={"model": config.model.model_copy(update={"decoder": kept, "heads": None})})
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent if place.is_local else None) as parent:
        staging = Path(parent) / path.name
        staging.mkdir()
        EXPORTERS[form](module, config.model, staging)
        if form in LOADERS:
            texts = _texts_of(config)
            found = compare(form, staging, module, config.model, texts)
            largest = max(found.image_difference, found.text_difference)
            if largest > MAX_DIFFERENCE:
                raise RuntimeError(
                    f"the exported model's features differ by {largest:.2g} in plain {form}, by more than "
                    f"{MAX_DIFFERENCE:g}: nothing was written"
                )
            remarks.append(f"loaded in {form}: features differ by {largest:.1e} at most")
            if found.other_tokens is None:
                remarks.append("tokenizer not compared: open_clip reads it with transformers, which is not installed")
            elif found.other_tokens:
                remarks.append(
                    f"tokenizer: {len(found.other_tokens)} of {found.num_texts} prompts give other tokens in {form}, "
                    f"which cleans texts in another way, such as {found.other_tokens[0]!r}"
                )
            else:
                remarks.append(f"tokenizer: the same tokens in {form} for all of {found.num_texts} prompts")
        (staging / CARD).write_text(
            model_card(
                config,
                info,
                form,
                run.manifest(),
                _figures(run, info, ema=ema),
                num_parameters(module),
                remarks,
                is_average=ema,
            )
        )
        if place.is_local:
            if path.exists():
                shutil.rmtree(path)
            staging.rename(path)
        else:  # the card comes last: with it, the export is complete
            place.delete(CARD)
            place.delete_files(place.walk())
            for file in sorted(staging.iterdir(), key=lambda file: file.name == CARD):
                place.upload(file, file.name)
    return place.uri, remarks


def check_decoder(form: str, *, with_decoder: bool) -> None:
    """Refuse a decoder in a form that has no place for it.

    Raises:
        ConfigError: names the form.
    """
    if with_decoder and form != "safetensors":
        raise ConfigError(f"--format {form} has no place for a captioning decoder: --with-decoder needs safetensors")


def model_card(
    config: RunConfig,
    info: CheckpointInfo,
    form: str,
    manifest: Manifest,
    figures: dict[str, Any],
    num_parameters: int,
    remarks: list[str],
    *,
    is_average: bool = False,
) -> str:
    """Return the README.md of an exported model: usage, data, recipe and results.

    Args:
        figures: `zero_shot`, `retrieval` and `languages` of the checkpoint's evaluation; empty without one.
        is_average: whether the weights are the average of the run's.
    """
    from jinja2 import Environment, StrictUndefined

    from sigray.workers.model.export import preprocessing
    from sigray.workers.model.inputs import tokenizer_file

    template = importlib.resources.files("sigray.orchestrator.run").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["percent"] = lambda rate: f"{rate:.2%}"
    return environment.from_string(template).render(
        config=config,
        info=info,
        form=form,
        manifest=manifest,
        **{name: figures.get(name, {}) for name in ("zero_shot", "retrieval", "languages")},
        million_parameters=num_parameters / 1e6,
        preprocessing=preprocessing(config.model),
        remarks=remarks,
        is_average=is_average,
        has_file=tokenizer_file(config.model) is not None,
    )


def _texts_of(config: RunConfig) -> list[str]:
    """Return the zero-shot prompts of the run's sets; some other texts without sets."""
    from sigray.workers.evaluation.datasets import classes_of

    texts: list[str] = []
    for spec in config.eval.sets.values():
        if spec.classes:
            with contextlib.suppress(DataError):  # the class file may have been moved since the run
                names = [entry["name"] for entry in classes_of(spec)]
                texts += [template.replace("{}", name) for template in spec.templates for name in names]
    return list(dict.fromkeys(texts))[:_MAX_TEXTS] or list(_SOME_TEXTS)


def _figures(run: RunFolder, info: CheckpointInfo, *, ema: bool) -> dict[str, Any]:
    """Return the evaluation of the exported weights from the run's records, if any."""
    for name in (evaluation_name(info.step), SUMMARY):
        local = run.path / name
        with contextlib.suppress(OSError, ParseError):
            content = parse_json(local.read_bytes() if local.exists() else run.storage.read(name))
            if isinstance(content, dict) and content.get("samples_seen") == info.samples_seen:
                return content if ema or not info.has_ema else content.get("without_ema", {})
    return {}
