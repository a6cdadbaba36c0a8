"""Reads models of other people: their config and weights, never their code.

transformers would import Python files that a folder brings, or ask on the terminal whether it may, if `config.json` or
`tokenizer_config.json` names them. So these files are read here first. open_clip would pass any option of a config on,
so its configs are read here too, and never by open_clip.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import io
import pickletools
import re
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sigray.workers.parse import ParseError, parse_json

if TYPE_CHECKING:
    from torch import Tensor

LOCAL_DIR = "local-dir"
HF_HUB = "hf-hub"
CONFIG = "open_clip_config.json"
_OTHERS_CONFIGS = ("config.json", "tokenizer_config.json", "adapter_config.json")
_NAMES_CODE = {"auto_map", "custom_code", "base_model_name_or_path"}  # the last one: of an adapter
_GLOBAL = re.compile(r"(?:GLOBAL|[Uu]nsupported (?:class|function)|unrecognized (?:class|function)) (\S+)")


def open_clip_folder() -> Path:
    """Folder of open_clip's files, without importing open_clip.

    The import loads transformers, timm and torch._dynamo: 3 s and 0.1 GB of a process.

    Raises:
        ImportError: if open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ImportError("open_clip is not installed: pip install open-clip-torch")
    return Path(spec.origin).parent


def read_open_clip_config(name: str) -> dict[str, Any]:
    """The config of `model.name`: open_clip's, a folder's or a repository's.

    Raises:
        ValueError: if there is none, or the file is no JSON mapping.
    """
    source, _, place = name.partition(":")
    if source in (LOCAL_DIR, HF_HUB):
        content = read_json(Path(place) / CONFIG if source == LOCAL_DIR else from_hub(place, CONFIG))
        if content is None:
            raise ValueError(f"model.name: {name} has no {CONFIG}")
        config = content.get("model_cfg", content)
        if not isinstance(config, dict):
            raise ValueError(f"model.name: {name}: model_cfg in {CONFIG} is no mapping")
        return config
    paths = {path.stem: path for path in (open_clip_folder() / "model_configs").glob("*.json")}
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=8, cutoff=0.5)
        raise ValueError(
            f"model.name: open_clip knows no model {name!r:.100}; near it: {', '.join(near) or 'none'}. A folder is "
            f"{LOCAL_DIR}:FOLDER, a repository {HF_HUB}:ORG/NAME"
        )
    return parse_json(paths[name].read_bytes())


def refuse_code(source: str) -> None:
    """Refuse a model or tokenizer of transformers that brings code.

    Args:
        source: a folder, or a repository of the Hugging Face hub.

    Raises:
        ValueError: names the file and what it wanted to load.
    """
    for file in _OTHERS_CONFIGS:
        # A folder of this name goes before the repository, as in transformers.
        path = Path(source) / file if Path(source).is_dir() else from_hub(source, file)
        for key, value in _entries(read_json(path) or {}):
            is_kernel = str(key).endswith("attn_implementation") and "/" in str(value)  # code of a repository
            if key in _NAMES_CODE or is_kernel:
                raise ValueError(
                    f"{source}/{file} names {key} {value!r:.200}, code or weights from elsewhere: sigray reads a "
                    "model's config and weights and runs no code that comes with them"
                )


def read_tensors(path: str) -> Any:
    """Return the content of a file of weights.

    It is .safetensors, .npz, TorchScript ({name: tensor}), or what torch.load reads with weights_only.

    Raises:
        ValueError: if it cannot be read; names what an unsafe file wanted to load.
    """
    import torch

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: _tensor(arrays[name]) for name in arrays}
        if script := _script_tensors(path):
            return script
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises one of a dozen types
        raise ValueError(
            f"{path} cannot be read as safetensors, or by torch.load with weights_only: {reason(error)}"
        ) from error


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    if array.dtype.kind == "V" and array.itemsize == 2:  # numpy has no bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Script:
    """Stand for every class of a TorchScript file.

    It holds the attributes and has no code.
    """


def is_torchscript(path: str | Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _script_tensors(path: str) -> dict[str, Tensor] | None:
    """Return the tensors of a TorchScript file, or None for another file.

    torch.jit.load would load the file's code. So torch.load reads a copy without the code, with weights_only.
    """
    import torch

    if not is_torchscript(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as objects:
            for name in names:
                if name.partition("/")[2].startswith(("data/", "data.pkl", "version", "byteorder")):
                    objects.writestr(name, archive.read(name))
        pickled = archive.read(next(name for name in names if name.endswith("/data.pkl")))
    named = {str(value).replace(" ", ".") for code, value, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    classes: Any = [(_Script, name) for name in named if name.startswith("__torch__.")]
    copy.seek(0)
    with torch.serialization.safe_globals(classes):
        return dict(_attributes("", torch.load(copy, map_location="cpu", weights_only=True)))


def _attributes(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    import torch

    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Script):
            yield from _attributes(f"{prefix}{name}.", value)


def reason(error: Exception) -> str:
    """First line of an error, or what a file of weights wanted to load."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    names = _GLOBAL.search(text)
    if names is not None:
        return f"it names {names[1].strip('`.,')}, which could run code; a .safetensors file cannot name any"
    if "Unsupported operand" in text:
        return "it is a pickle of another writer, which could run code; write it by torch.save, or as .safetensors"
    if not text.strip():  # an assertion of another library: its line says what it expects
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)[-1:]]
        text = ": ".join([type(error).__name__, *filter(None, lines)])
    return text.strip().splitlines()[0][:300]


def _entries(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all keys with their values, of mappings in mappings and lists too."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield key, value
        if isinstance(value, dict | list):
            yield from _entries(value)


def read_json(path: Path | None) -> dict[str, Any] | None:
    """Content of a JSON file that holds a mapping; None if there is no file."""
    if path is None or not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        content = parse_json(path.read_bytes())
        if isinstance(content, dict):
            return content
        raise ParseError("a JSON mapping expected")
    except ParseError as error:
        raise ValueError(f"{path}: {error}") from error


@functools.cache
def from_hub(repository: str, file: str) -> Path | None:
    """Return a file of a repository, here; None if the repository lacks it.

    Raises:
        ValueError: if the hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"{file} of {repository!r:.200} cannot be fetched from the Hugging Face hub: {reason(error)}"
        ) from error
