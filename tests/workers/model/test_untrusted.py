"""Folders, files and repositories of an attacker: config and weights are read, nothing that comes with them runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.helpers.data import TOWERS
from tests.helpers.hub import hub

BERT = {
    "model_type": "bert",
    "vocab_size": 49408,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
MAPPED = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": [None, "evil.Fast"]}}
TRUSTING = {"hf_tokenizer_name": "any", "tokenizer_kwargs": {"trust_remote_code": True}}
# What each command and worker reads.
READ = """
import json, sys
from sigray.workers.config import ModelConfig
from sigray.orchestrator.run.preflight import check_tokenizer
from sigray.workers.model.init_weights import build_initial_model, check_initial_weights
from sigray.workers.model.towers import build_bare_model, build_model, check_model

READERS = {"check": check_model, "tokenize": check_tokenizer, "export": build_bare_model, "train": build_model}
WITH_WEIGHTS = {"start": check_initial_weights, "embed": build_initial_model}
errors = {}
for name, content in json.load(open(sys.argv[1])).items():
    errors[name] = {}
    for command, read in (READERS | (WITH_WEIGHTS if "init_from" in content else {})).items():
        try:
            read(ModelConfig(**content))
        except ValueError as error:
            errors[name][command] = str(error)
print(json.dumps(errors))
"""
# The same folder where transformers may trust it: if it wrote no canary, the others would prove nothing.
CONTROL = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"


class Touch:
    """A process that unpickles this runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


class Attacker:
    """Folders and files that would write the canary, and model sections that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.cases: dict[str, dict[str, Any]] = {}
        self.expected: dict[str, tuple[str, set[str]]] = {}

    def add(self, name: str, section: dict[str, Any], readers: str, pattern: str) -> None:
        self.cases[name] = section
        self.expected[name] = pattern, set(readers.split())

    def write(self, file: str, content: dict[str, Any] | list[Any]) -> Path:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    def transformers_folder(self, name: str, **config: Any) -> Path:
        folder = self.write(f"{name}/config.json", {**BERT, **config}).parent
        source = f"open({str(self.canary)!r}, 'w')\nfrom transformers import BertConfig as Config, BertModel as Model\n"
        (folder / "evil.py").write_text(source)
        return folder

    def open_clip_name(self, name: str, text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        config = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **(text or {})}, **more}
        return {"name": f"local-dir:{self.write(f'{name}/open_clip_config.json', {'model_cfg': config}).parent}"}


def add_folders(attacker: Attacker) -> None:
    towers, everything = "check export train", "check tokenize export train"
    mapped = attacker.transformers_folder("mapped", model_type="evil", **MAPPED)
    attacker.write("adapter/adapter_config.json", {"base_model_name_or_path": str(mapped)})
    pickled = attacker.transformers_folder("pickled")
    torch.save({"a": Touch(attacker.canary)}, pickled / "pytorch_model.bin")
    for folder, readers, pattern in (
        (mapped, towers, r"mapped/config.json names auto_map {'AutoConfig'"),
        (attacker.transformers_folder("known", **MAPPED), towers, "known/config.json names auto_map"),
        (
            attacker.transformers_folder("nested", deep=[{"deeper": MAPPED}]),
            towers,
            "nested/config.json names auto_map",
        ),
        (
            attacker.transformers_folder("adapter"),
            towers,
            "adapter_config.json names base_model_name_or_path '.*mapped",
        ),
        (
            attacker.transformers_folder("kernel", _attn_implementation="evil/kernel"),
            towers,
            "kernel/config.json names _attn_implementation 'evil/kernel'",
        ),
        (pickled, "check train", r"it names posix\.system, which could run code"),
    ):
        text = {"hf_model_name": str(folder)}
        for kind, section in {
            "towers": {"towers": {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **text}}},
            "name": attacker.open_clip_name(f"open_clip_{folder.name}", text),
        }.items():
            attacker.add(f"{kind} {folder.name}", section, readers, pattern)
    named = r"text_cfg\.tokenizer_kwargs names 'trust_remote_code'"
    attacker.add("trusting", attacker.open_clip_name("trusting", TRUSTING), everything, f"trusting: {named}")
    trusting = {"towers": {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **TRUSTING}}}
    attacker.add("trusting towers", trusting, everything, rf"towers\.{named}")
    attacker.write("tokenizer/tokenizer_config.json", MAPPED)
    tokenizer = attacker.open_clip_name("tokenizer", {"hf_tokenizer_name": "any"})
    attacker.add("tokenizer", tokenizer, "tokenize", r"tokenizer/tokenizer_config\.json names auto_map")
    vision = {**TOWERS["vision_cfg"], "timm_model_name": f"local-dir:{mapped}"}
    pattern = "timm_model_name='local-dir:.*' names a folder or a repository"
    attacker.add("timm", attacker.open_clip_name("timm", vision_cfg=vision), everything, pattern)
    coca = attacker.open_clip_name("coca", multimodal_cfg={})
    attacker.add("coca", coca, everything, "coca: multimodal_cfg: a CoCa model has a decoder")
    broken = attacker.open_clip_name("broken")
    (attacker.folder / "broken" / "open_clip_config.json").write_text("[" * 100_000)
    attacker.add("broken", broken, everything, r"broken/open_clip_config\.json: not JSON")
    attacker.add("a list", attacker.open_clip_name("list"), everything, r"list/open_clip_config\.json: a JSON mapping")
    attacker.write("list/open_clip_config.json", [])
    missing = {"name": f"local-dir:{attacker.folder / 'none'}"}
    attacker.add("missing", missing, everything, r"none has no open_clip_config\.json")


def add_files(attacker: Attacker) -> None:
    touch = Touch(attacker.canary)
    names = r"cannot be read.* it names posix\.system, which could run code"
    for file, save, pattern in (
        ("zip.pt", lambda path: torch.save({"state_dict": touch}, path), names),
        ("old.bin", lambda path: torch.save([touch], path, _use_new_zipfile_serialization=False), names),
        ("plain.pth", lambda path: path.write_bytes(pickle.dumps(touch, protocol=2)), names),
        ("new.pth", lambda path: path.write_bytes(pickle.dumps(touch)), "cannot be read"),
        ("pickle.safetensors", lambda path: path.write_bytes(pickle.dumps(touch)), "cannot be read"),
        ("keys.pt", lambda path: torch.save({0: torch.zeros(1)}, path), "holds no mapping of names to tensors"),
        ("evil.ts", lambda path: save_script(path, touch), names),
    ):
        path = attacker.folder / file
        save(path)
        section = {"towers": TOWERS, "init_from": str(path)}
        attacker.add(file, section, "start embed", f"model.init_from: {re.escape(str(path))} {pattern}")


def save_script(path: Path, content: Any) -> None:
    """A TorchScript file whose objects are an ordinary pickle."""
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickle.dumps(content, protocol=2) if name.endswith("/data.pkl") else data)


def run(program: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, that answers yes to every question."""
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=variables, input="y\n" * 99, capture_output=True, text=True, check=False)


def add_repository(attacker: Attacker) -> dict[str, bytes]:
    """Add a model of the hub; returns the files of its repository, a/b."""
    folder = attacker.transformers_folder("repository", model_type="evil", **MAPPED)
    attacker.open_clip_name("repository", {"hf_model_name": "a/b", "hf_tokenizer_name": "a/b"})
    everything = "check tokenize export train"
    attacker.add("repository", {"name": "hf-hub:a/b"}, everything, r"a/b/config\.json names auto_map")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_code_of_a_folder_or_file_runs_and_the_refusal_names_it(tmp_path):
    attacker = Attacker(tmp_path)
    add_folders(attacker)
    add_files(attacker)
    files = add_repository(attacker)
    cases = attacker.write("cases.json", attacker.cases)
    with hub(files) as url:
        # The library's switch must not open our reads.
        variables = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        done = run(READ, cases, **variables)
    assert done.returncode == 0, done.stderr
    assert not attacker.canary.exists()
    errors = json.loads(done.stdout)
    for name, (pattern, readers) in attacker.expected.items():
        assert errors[name].keys() == readers, (name, errors[name])
        assert all(re.search(pattern, message) for message in errors[name].values()), errors[name]
    done = run(CONTROL, tmp_path / "mapped", HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert attacker.canary.exists(), done.stderr


def test_a_module_beside_a_config_is_not_found(tmp_path):
    """`sigray` has its own folder on the path of modules, and not the one in which it is called."""
    (tmp_path / "evil.py").write_text("open('canary', 'w')\n")
    (tmp_path / "sigray").mkdir()
    (tmp_path / "sigray" / "evil.py").write_text("open('canary', 'w')\n")
    content = {
        "run": {"name": "evil"},
        "data": {"shards": "none"},
        "model": {"towers": TOWERS, "image_tower": "evil:tower"},
        "train": {"num_samples": 8, "global_batch_size": 8},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    sigray = Path(sys.executable).parent / "sigray"
    command = [sys.executable, str(sigray), "plan", "run.yaml", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.image_tower='evil:tower': No module named 'evil'; it must be installed" in done.stderr
    assert not (tmp_path / "canary").exists()
