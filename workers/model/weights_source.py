"""Finds the files that `model.init_from` names, and what stands beside them.

    a folder    of transformers or timm (config.json), of open_clip (open_clip_config.json), of `sigray export`
    a file      of tensors, in such a folder or alone
    a URL       of either; a copy is kept on this machine
    hf-hub:ORG/NAME    a repository of the Hugging Face hub, or its copy in huggingface_hub's cache

Without torch, so that a process that reads only what a model expects of its inputs stays light.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sigray.workers.checkpoint.index import EMA_FILE
from sigray.workers.model.untrusted import CONFIG, HF_HUB, from_hub, is_torchscript, read_json, reason
from sigray.workers.parse import parse_yaml
from sigray.workers.storage import Storage, local_copy, url_cache
from sigray.workers.texts import first_ten
from sigray.workers.urls import STORES, is_remote

Format = Literal["transformers", "open_clip", "sigray", "timm", "big_vision", "openai", "tensors"]
"""The program that wrote the weights.
open_clip is also `sigray export`'s, sigray `sigray export --format safetensors`; tensors: no config tells."""

_INDEX = ".index.json"  # of a file in several parts, as transformers writes it
_PART = re.compile(r"-\d+-of-(\d+)\.(?:safetensors|bin)$")
_WEIGHTS = [
    name + index
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    for index in ("", _INDEX)
]
"""File names of weights; the first one that a folder has counts."""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", _INDEX)
_BESIDE = (".json", ".txt", ".model")  # endings of configs and tokenizers
_MODEL_TYPES = {"siglip", "siglip2", "clip"} | {
    f"{name}_{tower}_model" for name in ("siglip", "siglip2", "clip") for tower in ("vision", "text")
}


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from."""

    place: str  # model.init_from
    format: Format
    config: dict[str, Any]
    """Content of open_clip_config.json or config.json; empty for the format `tensors`."""
    folder: Path
    """Local folder of the files.
    Files of tokenizer and preprocessing stand here, if the source has them."""
    files: tuple[Path, ...]  # with the tensors
    tensors: frozenset[str] = frozenset()  # that an index promises


def find_weights(place: str) -> WeightsSource:
    """Find the weights at a path or URL, or in a repository.

    Raises:
        ValueError: if there are none, or a folder is of an unknown kind.
        StoreError: if a URL's store cannot be reached or refuses.
    """
    if place.startswith(f"{HF_HUB}:"):
        path = _hub_folder(place.removeprefix(f"{HF_HUB}:"))
    else:
        path = _copy(place) if is_remote(place) else Path(place)
    is_folder = path.is_dir()
    if is_folder:
        names = os.listdir(path)
        path /= _weights_file(place, names)
    if not path.is_file():
        raise ValueError(f"model.init_from: there is no file or folder {place}; every training worker needs to see it")
    files = tuple(path.parent / name for name in _parts(path))
    if is_folder and (path.parent / EMA_FILE).is_file():  # a checkpoint: its figures are those of the average
        files += (path.parent / EMA_FILE,)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"model.init_from: {place} lacks {first_ten(missing)}, which {path.name} names")
    written_by, config = _config(path)
    part = _PART.search(path.name)
    if part is not None and int(part[1]) > 1:
        raise ValueError(f"model.init_from: {place} is one file of {int(part[1])}: give their folder, or *{_INDEX}")
    return WeightsSource(place, written_by, config, path.parent, files, frozenset(_weight_map(path)))


def run_section(source: WeightsSource) -> dict[str, Any]:
    """Return the model section of the run whose checkpoint this is; empty without one.

    Its image size is that of the checkpoint's phase.
    """
    run, _, rest = source.place.rpartition("/checkpoints/")
    if not run or rest.strip("/").count("/") > 1:
        return {}
    name = rest.strip("/").partition("/")[0]
    section = _model_in(f"{run}/config.yaml")
    of_phase = _model_in(f"{run}/checkpoints/{name}/commit.json") if section else {}
    return section | {"image_size": of_phase["image_size"]} if "image_size" in of_phase else section


def _model_in(place: str) -> dict[str, Any]:
    """Return the mapping at `model` in a YAML or JSON file; empty without one."""
    try:
        content = parse_yaml(local_copy(place).read_bytes())
    except FileNotFoundError:
        return {}
    section = content.get("model") if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def _weights_file(place: str, names: Iterable[str]) -> str:
    found = next((name for name in _WEIGHTS if name in names), None)
    if found is None:
        shown = first_ten(sorted(names)) or "no files"
        raise ValueError(f"model.init_from: the folder {place} has no weights ({first_ten(_WEIGHTS)}); it has {shown}")
    return found


def _parts(path: Path) -> list[str]:
    """Return the names of the files with the tensors."""
    if not path.name.endswith(_INDEX):
        return [path.name]
    names = sorted(set(_weight_map(path).values()))
    if not names or any(Path(name).name != name for name in names):  # never a path out of the folder
        raise ValueError(
            f"model.init_from: {path} is no index of weights: weight_map must give names of files beside it"
        )
    return names


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor; empty without an index."""
    content = (read_json(path) or {}).get("weight_map") if path.name.endswith(_INDEX) else None
    return {name: str(file) for name, file in content.items()} if isinstance(content, dict) else {}


def _config(path: Path) -> tuple[Format, dict[str, Any]]:
    folder = path.parent
    if path.suffix == ".npz":
        return "big_vision", {}
    if is_torchscript(path):
        return "openai", {}
    if content := read_json(folder / CONFIG):
        return "open_clip", content
    content = read_json(folder / "config.json") or {}
    if "model_type" in content:
        if content["model_type"] not in _MODEL_TYPES:
            raise ValueError(
                f"model.init_from: {folder}/config.json names model_type {content['model_type']!r:.100}; sigray reads "
                f"{first_ten(sorted(_MODEL_TYPES))}"
            )
        return "transformers", content
    if isinstance(content.get("model"), dict) and "preprocessing" in content:
        return "sigray", content
    if "architecture" in content:
        return "timm", content
    return "tensors", {}


def _copy(url: str) -> Path:
    """Return a URL's file, or folder of weights and files beside them, here."""
    name = url.rpartition("/")[2]
    if url.endswith(_INDEX):
        return _copy(url.removesuffix(f"/{name}")) / name
    scheme = url.partition("://")[0]
    names = Storage(url).list("") if scheme in STORES and not url.endswith(_ENDINGS) else []
    if not names:
        return local_copy(url, "model.init_from")
    weights = _weights_file(url, names)

    def copy_of(name: str) -> Path:
        return local_copy(f"{url.rstrip('/')}/{name}", "model.init_from")

    by_name = {name: copy_of(name) for name in names if name.endswith(_BESIDE) or name in (weights, EMA_FILE)}
    by_name |= {name: copy_of(name) for name in _parts(by_name[weights]) if name not in by_name}
    copies = list(by_name.values())
    # Each copy has a folder of its own; here they stand side by side.
    folder = url_cache(" ".join(map(str, copies)))
    folder.mkdir(parents=True, exist_ok=True)
    for copy in copies:
        part = folder / f"{copy.name}.{os.getpid()}.tmp"
        part.unlink(missing_ok=True)
        part.symlink_to(copy)
        part.replace(folder / copy.name)
    return folder


def _hub_folder(repository: str) -> Path:
    """Return the folder of a repository's weights and the files beside them."""
    from huggingface_hub import snapshot_download

    beside = [f"*{ending}" for ending in _BESIDE]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=beside, ignore_patterns=f"*{_INDEX}"))
        is_complete = any((folder / name).is_file() for name in _WEIGHTS)
        weights = None if is_complete else next((name for name in _WEIGHTS if from_hub(repository, name)), None)
        for name in _parts(folder / weights) if weights else []:
            from_hub(repository, name)
    except Exception as error:  # of the network, or what the hub answers
        raise ValueError(
            f"model.init_from={HF_HUB}:{repository} cannot be fetched from the Hugging Face hub or its cache here: "
            f"{reason(error)}\nOn a machine with network: hf download {repository} --local-dir FOLDER; then set "
            "model.init_from=FOLDER. A private repository needs the variable HF_TOKEN"
        ) from error
    return folder
