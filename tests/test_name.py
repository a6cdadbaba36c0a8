"""`sigray` is the one name that is imported: what it loads, what users' files cannot hide, its origin.

short   the name itself, and a run without Ray beside a user's `losses.py`, `workers/` and `tuning.py`
long    the same under Ray; a wheel in an environment of its own that trains, sweeps and submits
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import sigray
from tests.helpers.data import write_small_run
from tests.helpers.head import Head, ray_head

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("losses", "workers", "orchestrator", "tuning", "native")
PUBLIC = {"sigmoid_loss", "ring_sigmoid_loss", "cached_backward", "RunConfig", "train", "sweep", "plan"}
STEPS = {"train": {"num_samples": 48, "global_batch_size": 16, "log_every_steps": 1}}


def python(*words: str, cwd: Path, **environment: str) -> str:
    """Return what a Python process of this environment prints."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_import_is_light(tmp_path):
    heavy = ["torch", "ray", "pydantic", "numpy", "yaml", "rich"]
    program = f"import sigray, sys; dir(sigray); print(*[name for name in {heavy} if name in sys.modules])"
    assert python("-c", program, cwd=tmp_path).split() == []


def test_public_names_have_docstrings():
    assert set(sigray.__all__) >= PUBLIC
    assert set(dir(sigray)) >= set(sigray.__all__)
    assert sigray.__doc__
    for name in sigray.__all__:
        value = getattr(sigray, name)
        assert value.__module__.startswith("sigray.")
        assert len(value.__doc__) > 30, name
    with pytest.raises(AttributeError, match="'sigray' has no attribute 'sigmoid'"):
        _ = sigray.sigmoid


def test_the_installed_sigray_brings_no_other_name(tmp_path):
    """-I: without PYTHONPATH and without the working directory, so from what is installed."""
    names = [*PACKAGES, "tests", "benchmarks", "dev", "examples", "docs", "clusters"]
    program = f"from importlib.util import find_spec; print(*[name for name in {names} if find_spec(name)])"
    assert python("-I", "-c", program, cwd=tmp_path).split() == []
    assert python("-I", "-c", "import sigray.losses.sigmoid as it; print(it.__name__)", cwd=tmp_path).strip()


def test_a_clone_in_the_working_directory_does_not_hide_the_package(tmp_path):
    (tmp_path / "sigray" / "losses").mkdir(parents=True)
    assert python("-c", "import sigray; print(sigray.__all__)", cwd=tmp_path).count("'RunConfig'") == 1


def files_below(folder: Path) -> set[str]:
    found = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return {str(path.relative_to(folder)) for path in found if path.suffix not in (".pyc", ".so")}


def mounted(path: Path) -> list[tuple[str, str]]:
    """Return (source, target) below the folder of sigray: file mounts of `ray up`, or COPY of a Dockerfile."""
    if path.suffix == ".yaml":
        mounts = yaml.safe_load(path.read_text())["file_mounts"]
        pairs = [(source, target.partition("~/sigray/")[2]) for target, source in mounts.items() if "sigray/" in target]
        return [pair for pair in pairs if pair[1]]
    copied = re.findall(r"^COPY --chown=ray (.*) /home/ray/sigray/(.*)$", path.read_text(), re.MULTILINE)
    return [(source, target or source) for sources, target in copied for source in sources.split()]


PLACES = ["cluster.yaml", "clusters/aws_gpu.yaml", "clusters/gcp_tpu.yaml", "clusters/on_premises.yaml"]


def copy_mounted(place: Path, folder: Path) -> None:
    """Copy what a node gets. rsync -a and COPY keep links: those of src/sigray need their folders beside src/."""
    for source, target in mounted(place):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder / target)


@pytest.mark.parametrize("place", [*PLACES, "clusters/Dockerfile"])
def test_a_node_gets_all_that_the_installation_needs(place, tmp_path):
    copy_mounted(ROOT / place, tmp_path)
    assert files_below(tmp_path / "src" / "sigray") == files_below(ROOT / "src" / "sigray")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert all(
        (tmp_path / name).is_file() for name in [project["readme"], *project["license-files"], "requirements.txt"]
    )


# ------------------------------------------------------------------------------- files of a user's with our names

OWN = {"losses.py": "", "workers/__init__.py": "", "workers/data.py": "", "tuning.py": "", "orchestrator.py": ""}
BARE = """
import json, losses, pathlib, torch, tuning, workers.data
from sigray.orchestrator.config import load_config
from tests.helpers.bare import train_bare

here = pathlib.Path(__file__).parent
assert [module.__file__ for module in (losses, tuning)] == [f"{here}/losses.py", f"{here}/tuning.py"]
torch.distributed.init_process_group("gloo", init_method=f"file://{here}/store", rank=0, world_size=1)
print(json.dumps(list(train_bare(0, 1, load_config("run.yaml"))["losses"])))
"""


def write_own(folder: Path, content: str) -> Path:
    for name in OWN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_a_script_beside_files_of_these_names_trains(tmp_path):
    """A run without Ray: the files are beside the script and the config, and on PYTHONPATH."""
    write_own(tmp_path, "")
    write_small_run(tmp_path, **STEPS)
    (tmp_path / "train.py").write_text(BARE)
    search = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "src")])
    assert json.loads(python("train.py", cwd=tmp_path, PYTHONPATH=search).splitlines()[-1]) == [1, 2, 3]


RUN = """
import losses, pathlib, rich.console, sigray, tuning, workers.data

here = pathlib.Path(__file__).parent
assert [module.__file__ for module in (losses, tuning)] == [f"{here}/losses.py", f"{here}/tuning.py"]
print(sigray.train(sigray.load_config("run.yaml"), rich.console.Console()).samples_seen)
"""


def test_such_a_script_trains_under_ray(own_ray, tmp_path):
    write_own(tmp_path, "")
    write_small_run(tmp_path, **STEPS)
    (tmp_path / "train.py").write_text(RUN)
    search = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    assert python("train.py", cwd=tmp_path, PYTHONPATH=search).splitlines()[-1] == "48"
    assert (tmp_path / "runs" / "small" / "report.html").exists()


# ------------------------------------------------------------------------------------------------- a wheel, installed


@pytest.fixture(scope="module")
def installed(minutes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel of this tree and the libraries, but not the installation, of the tests' own."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_mounted(ROOT / "clusters" / "Dockerfile", folder / "tree")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(folder / "tree")],
        check=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    environment = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", environment, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = folder.glob("env/lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_holds_the_package_and_its_files(installed):
    (site,) = installed.glob("env/lib/*/site-packages")
    assert files_below(site / "sigray") == files_below(ROOT / "src" / "sigray")


@pytest.fixture(scope="module")
def head(own_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as up:
        yield up


MARK = """
with open({path!r}, "a") as _file:
    _file.write(f"{{__import__('sys').argv[0].rpartition('/')[2]}} {{__name__}} {{__file__}}\\n")
"""
WORKERS = {("default_worker.py", "sigray.workers.training.train"), ("default_worker.py", "sigray.workers.data.worker")}


def test_a_wheel_trains_sweeps_and_submits(installed, head, tmp_path):
    """With a config of one's own, beside files of our names: a process that imports one of them fails the run."""
    write_own(tmp_path, "raise RuntimeError('a file of the user')")
    write_small_run(tmp_path, **STEPS, eval={"sets": {"held_out": {"shards": str(tmp_path / "train")}}})
    study = {"name": "rates", "base": "run.yaml", "dir": "sweeps", "metric": "retrieval.held_out.image_to_text_r10"}
    study |= {"budget": 48, "space": {"optim.lr": {"grid": [1e-3]}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (site,) = installed.glob("env/lib/*/site-packages")
    imported = tmp_path / "imported"
    for module in ("workers/training/train.py", "workers/data/worker.py"):
        with (site / "sigray" / module).open("a") as file:
            file.write(MARK.format(path=str(imported)))

    def run(*words: object, below: Path) -> str:
        """Return what a command prints; its processes must import sigray from below a folder."""
        imported.unlink(missing_ok=True)
        command = [str(installed / "env" / "bin" / "sigray"), *map(str, words)]
        environment = {name: value for name, value in head.environment.items() if name not in ("PYTHONPATH", "HOME")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split() for line in imported.read_text().splitlines()]
        assert {(program, module) for program, module, _ in lines} >= WORKERS
        assert [file for *_, file in lines if not Path(file).is_relative_to(below)] == []
        return done.stdout

    assert "finished at 48 samples" in run("train", "run.yaml", below=site)
    run("sweep", "study.yaml", below=site)
    results = [json.loads(line) for line in (tmp_path / "sweeps" / "rates" / "results.jsonl").read_text().splitlines()]
    assert {line["number"] for line in results if line["event"] == "result"} == {0}
    # The job carries the wheel's package. It wins over the installation of the cluster.
    words = ["train", "run.yaml", "run.name=job", f"run.storage={tmp_path}/storage"]
    assert "finished at 48 samples" in run("submit", "--address", head.address, "--", *words, below=head.folder)
    assert list((tmp_path / "storage" / "job" / "checkpoints").glob("step-*"))
