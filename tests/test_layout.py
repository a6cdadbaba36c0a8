"""The direction of imports between packages and between rooms, and what a process may import or unpickle."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["native", "losses", "workers", "orchestrator", "tuning"]
# No shipped package imports these; they import the packages.
OUTSIDE = {"tests", "benchmarks", "examples"}


def imported_packages(path: Path) -> set[str]:
    """Return the imported modules, inside functions too: packages of sigray, and first names of others."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [str(node.module)]
        else:
            continue
        names |= {name.removeprefix("sigray.").split(".")[0] for name in modules}
        assert not {name.split(".")[0] for name in modules} & set(PACKAGES), f"{path}: import it as sigray.NAME"
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    allowed = set(PACKAGES[: PACKAGES.index(package) + 1])
    files = list(Path(package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported_packages(path) & (set(PACKAGES) | OUTSIDE) - allowed
        assert not wrong, f"{path} imports {wrong}"


# Rooms of a package, from low to high: a room may import itself and lower ones. Modules stand beside rooms.
ROOMS: dict[str, list[set[str]]] = {
    "workers": [
        {"siglip_vits"},
        {"named", "parse", "texts", "tower_limits", "urls"},
        {"config", "metrics", "sharding"},
        {"stores"},
        {"storage"},
        {"checkpoint"},
        {"model"},
        {"device"},
        {"data"},
        {"training", "evaluation"},
    ],
    "orchestrator": [
        {"batch", "carried_files", "device_kinds", "formatting", "plain_console", "secrets"},
        {"config", "tables"},
        {"address", "resources", "run_folder"},
        {"planning", "reports", "trackers"},
        {"cluster", "data"},
        {"run", "chaos"},
        {"cli"},
    ],
}


def imported_rooms(source: str, package: str) -> set[str]:
    """Return the rooms of a package that a source imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == f"sigray.{package}":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"sigray.{package}."):
            names.add(str(node.module).split(".")[2])
    return names


@pytest.mark.parametrize("package", ROOMS)
def test_imports_between_rooms_point_one_way(package):
    places = {path.stem if path.is_file() else path.name for path in Path(package).iterdir()}
    rooms = set().union(*ROOMS[package])
    assert places - rooms - {"__init__", "__pycache__"} == set(), "a room or module without a place in the order"
    for number, level in enumerate(ROOMS[package]):
        lower: set[str] = set().union(*ROOMS[package][:number])
        for room in level:
            files = list(Path(package, room).rglob("*.py")) or [Path(package, f"{room}.py")]
            for path in files:
                wrong = imported_rooms(path.read_text(), package) - lower - {room}
                assert not wrong, f"{path} imports {wrong}, which is not below {room}"


def test_the_direction_between_rooms_is_really_checked():
    source = (
        "def f():\n    from sigray.workers.training.step import Trainer\n    from sigray.workers import data, config\n"
    )
    assert imported_rooms(source, "workers") == {"training", "data", "config"}


def test_no_modules_import_each_other():
    imports: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in Path(package).rglob("*.py")):
        name = ".".join(["sigray", *path.with_suffix("").parts]).removesuffix(".__init__")
        found = imports[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    graph = {name: sorted(found & imports.keys() - {name}) for name, found in imports.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


MAX_LINES = 600


def test_a_long_module_says_why():
    for path in (path for package in PACKAGES for path in Path(package).rglob("*.py")):
        source = path.read_text()
        if len(source.splitlines()) > MAX_LINES:
            assert re.search(r"\blong\b", str(ast.get_docstring(ast.parse(source)))), f"{path} does not say why"


def test_losses_and_the_training_loop_know_no_ray():
    for path in [*Path("losses").glob("*.py"), *Path("workers/training").glob("*.py")]:
        assert "ray" not in imported_packages(path), path


DATA_WORKER = """
from sigray.workers.data import pool
from sigray.workers.config import ModelConfig
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.inputs import shapes
for model in (ModelConfig(name="ViT-B-32"), ModelConfig(towers={"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}})):
    shapes(model), build_tokenizer(model, 8, 49408)
"""
SLOW_IMPORTS = ["torch", "open_clip", "transformers", "timm", "torchvision", "torch._dynamo", "ray.train"]


@pytest.mark.parametrize(
    ("process", "absent"),
    [
        (DATA_WORKER, SLOW_IMPORTS),
        ("from sigray.workers.data.stream_registry import StreamRegistry", ["torch", "ray", "PIL"]),
        (
            "from sigray.orchestrator.run.backends import GlooConfig\n"
            "from ray.train.v2._internal.execution.controller import *",
            ["torch"],
        ),
        ("from sigray.orchestrator.run.monitor import RunMonitor, RayHooks", ["torch"]),
    ],
    ids=["data worker", "stream registry", "Ray Train's controller", "monitor"],
)
def test_processes_that_need_no_towers_start_without_them(process, absent):
    """A run starts some ten processes on one machine; the imports decide how long that takes."""
    script = f"import sys\n{process}\nprint(*[name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def accelerator_calls(path: Path) -> list[str]:
    """Return imports of torch_xla and uses of torch.cuda, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found += [
            f"{name} in line {node.lineno}"
            for name in names
            if name.split(".")[0] == "torch_xla" or name in ("torch.cuda", "torch.backends.cuda")
        ]
    return found


def test_only_two_files_know_an_accelerator():
    known = {Path("workers/device.py"), Path("orchestrator/run/backends.py")}
    files = [path for package in PACKAGES for path in Path(package).rglob("*.py")]
    for path in set(files) - known:
        assert not accelerator_calls(path), f"{path}: {accelerator_calls(path)}"
    assert accelerator_calls(Path("workers/device.py"))


UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# The rasteriser's own child process, over a pipe.
PICKLES_TO_ITSELF = {Path("examples/emoji36/build.py"), Path("workers/data/processes.py")}


def unsafe_reads(path: Path) -> list[str]:
    """Return the calls that would run a file's content as code, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [f"{alias.name} in line {node.lineno}" for alias in node.names if alias.name in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in UNPICKLING:
            found.append(f"{node.module} in line {node.lineno}")
        elif isinstance(node, ast.Call):
            name, said = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            is_unsafe = (
                (name.endswith("torch.load") and said.get("weights_only") != "True")
                or said.get("allow_pickle") == "True"
                or said.get("trust_remote_code", "False") != "False"
                or said.get("shell") == "True"
                or name
                in (
                    "eval",
                    "exec",
                    "os.system",
                    "os.popen",
                    "torch.hub.load",
                    "yaml.load",
                    "yaml.unsafe_load",
                    "yaml.full_load",
                )
                or name.endswith((".read_pickle", ".unsafe_load"))
            )
            if is_unsafe:
                found.append(f"{name} in line {node.lineno}")
    return found


def test_nothing_that_is_read_can_run_code():
    files = {path for package in [*PACKAGES, "benchmarks"] for path in Path(package).rglob("*.py")}
    assert len(files) > 50
    for path in files - PICKLES_TO_ITSELF:
        assert not unsafe_reads(path), f"{path}: {unsafe_reads(path)}"
    for path in PICKLES_TO_ITSELF:
        assert all(found.startswith("pickle in line") for found in unsafe_reads(path)), path


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusts)",
        "torch.hub.load(repository, name)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "eval(text)",
        "pandas.read_pickle(path)",
    ],
)
def test_each_way_to_run_code_is_really_found(line, tmp_path):
    path = tmp_path / "unsafe.py"
    path.write_text(f"def f():\n    {line}\n")
    assert len(unsafe_reads(path)) == 1
    path.write_text("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nmodule.eval()\nmodel.load(path)\n")
    assert unsafe_reads(path) == []


def test_the_direction_is_really_checked(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from sigray.orchestrator.config import RunConfig\n")
    assert imported_packages(path) == {"orchestrator"}


def imported_tests(source: str) -> list[str]:
    """Return the test modules that a source names, also in strings of code for other processes."""
    return re.findall(r"tests\.(?:\w+\.)*test_\w+|from tests(?:\.\w+)* import (?:[\w, ]*\b)?test_\w+", source)


def test_no_test_imports_another():
    """Shared code is in tests/helpers, so that a test module can move and be collected alone."""
    files = [path for path in Path("tests").rglob("*.py") if path != Path("tests/test_layout.py")]
    assert len(files) > 50
    for path in files:
        own = ".".join(path.with_suffix("").parts)  # a module may be named by itself, as in model.image_tower
        others = {name for name in imported_tests(path.read_text()) if name != own}
        assert not others, f"{path} names {others}"


@pytest.mark.parametrize(
    "line",
    [
        "from tests.losses.test_sigmoid import scalars",
        "from tests.workers import test_step",
        "from tests.workers import data, test_step",
        "import tests.workers.test_step",
        "from tests.test_layout import imported_tests",
        'PROGRAM = "from tests.workers.test_xla import main; main()"',
    ],
)
def test_each_way_to_import_a_test_is_found(line):
    assert len(imported_tests(f"import os\n{line}\n")) == 1
    assert not imported_tests("from tests.helpers.steps import part_of\n# tests/workers/training/test_step.py\n")
