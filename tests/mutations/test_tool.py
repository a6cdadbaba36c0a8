"""The tool itself, on a tree of a few lines: which faults are caught, and which cannot be judged."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutations.__main__ import fault_lists, main, run
from tests.mutations.fault import Fault
from tests.mutations.runner import passed_tests
from tests.mutations.source import changed, check

TREE = Path(__file__).parents[2]
PRODUCT = """
LIMIT, BOUND = 3, 5


class Shop:
    @property
    def price(self):
        return 2

    def total(self, count):
        assert count >= 0, "an invariant"
        return count * self.price


def name():
    return "tea"
"""
TESTS = """
import pytest
from shop import Shop, name

def test_total():
    assert Shop().total(3) == 6

@pytest.mark.parametrize("count", [0, 1])
def test_more(count):
    assert Shop().total(count) <= 2

def test_refused():
    with pytest.raises(AssertionError):
        Shop().total(-1)

def test_blind():
    Shop().total(3)
    name()

def test_leaves_a_process():
    import os, pathlib, subprocess
    pathlib.Path(os.environ["LEFT"]).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    assert name() == "tea"

@pytest.mark.skip
def test_skipped(): ...

def test_red():
    assert name() == "coffee"
"""
C = """
#define LIMIT 120 /* of 120 */
#define LOOP(x) \\
    x + 1; \\
    x + 2;
int other(int x);
static inline int other(int x) { return x; }
static float sum(const float *x,
                 int size) {
    if (size) { return 0; }
    return other(size);
}
"""


@dataclass(frozen=True)
class AtTheEnd:
    says: str
    file: str
    append: str
    tests: tuple[str, ...]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "shop.py").write_text(PRODUCT)
    (tmp_path / "tests" / "test_shop.py").write_text(TESTS)
    (tmp_path / "sum.c").write_text(C)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def fault(says: str, symbol: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(says, symbol, old, new, tuple(f"tests/test_shop.py::{test}" for test in tests))


def test_the_parts_are_all_faults_once(monkeypatch, capsys):
    def listed(*words: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["mutations", "--list", *words])
        main()
        return capsys.readouterr().out.splitlines()

    parts = [listed("--part", f"{number}/4") for number in (1, 2, 3, 4)]
    assert sorted(itertools.chain(*parts)) == sorted(listed())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(SystemExit):
        listed("--part", "5/4")


def test_what_is_caught_and_what_is_not(tree, capsys):
    total = "shop:Shop.total"
    faults = [
        fault("caught", total, "*", "+", "test_blind", "test_total"),
        fault("caught by a missing error", total, "assert count >= 0", "assert True", "test_refused"),
        fault("survives", "shop:name", "tea", "mate", "test_blind"),
        fault("crashes at import", "shop:name", "def name", "name = 1 / 0\ndef name", "test_total"),
        fault("crashes", total, "count * ", "{}[count] * ", "test_more"),
        fault("breaks an assertion of the product", total, ">= 0", ">= 9", "test_total"),
        fault("is never done", "shop:name", "return", "import os; os._exit(3)\n    return", "test_blind"),
        fault("names a skipped test", "shop:name", "tea", "mate", "test_skipped"),
        fault("names a red test", "shop:name", "tea", "mate", "test_red"),
        fault("names no test", "shop:name", "tea", "mate", "test_none"),
        AtTheEnd("caught at the end", "shop.py", "Shop.price = 3", ("tests/test_shop.py::test_total",)),
    ]
    assert run(tree, faults, libraries=(), show_where=False) == 1
    printed = capsys.readouterr().out.splitlines()
    said = {text: (word, why) for line in printed for word, text, why in re.findall(r"(\w+) .*: (.*?)  \[(.*)]", line)}
    assert said.pop("caught") == ("caught", "tests/test_shop.py::test_total")
    assert said.pop("caught by a missing error") == ("caught", "tests/test_shop.py::test_refused")
    assert said.pop("caught at the end") == ("caught", "tests/test_shop.py::test_total")
    reasons = {
        "survives": "its tests are green",
        "crashes at import": "ZeroDivisionError",
        "crashes": "crash in call: KeyError",
        "breaks an assertion of the product": "crash in call: AssertionError: an invariant",
        "is never done": "ended with code 3",
        "names a skipped test": "skipped",
        "names a red test": "red without a fault",
        "names no test": "there is no such test",
    }
    assert {text: word for text, (word, _) in said.items()} == dict.fromkeys(reasons, "SURVIVED")
    assert [text for text, reason in reasons.items() if reason not in said[text][1]] == []
    assert printed[-1] == "mutations=11 survivors=8"
    assert (tree / "shop.py").read_text() == PRODUCT


def test_all_caught_is_a_success_and_leaves_no_process(tree, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT", str(tmp_path / "left"))
    (tree / "tests" / "test_new.py").write_text(TESTS)  # a file that git does not know yet
    price = Fault("other price", "shop:Shop.price", "2", "3", ("tests/test_new.py::test_total",))
    label = Fault("other name", "shop:name", "tea", "mate", ("tests/test_new.py::test_leaves_a_process",))
    assert run(tree, [price, label], libraries=(), show_where=False) == 0
    assert not is_running(int((tmp_path / "left").read_text()))
    assert capsys.readouterr().out.splitlines()[-1] == "mutations=2 survivors=0"


def test_tests_that_passed_before_do_not_run_without_a_fault(tree, capsys):
    """Shown by a report that is wrong: a fault of a red test is judged as if the test were green without it."""
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", "-p", "no:cacheprovider", "tests"]
    subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), "LEFT": "left"}, check=False)
    passed = passed_tests(tree / "report.xml")
    names = "test_total", "test_more[0]", "test_more[1]", "test_refused", "test_blind", "test_leaves_a_process"
    assert passed.keys() == {f"tests/test_shop.py::{name}" for name in names}
    passed["tests/test_shop.py::test_red"] = 0.0
    red = fault("names a red test", "shop:name", "tea", "mate", "test_red")
    more = fault("names examples", "shop:Shop.total", "*", "+", "test_more")
    assert run(tree, [red, more], passed=passed, libraries=(), show_where=False) == 0
    assert "2 tests are green without a fault" in capsys.readouterr().out


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("symbol", "old", "problem"),
    [
        ("shop:Shop.cost", "2", "no such symbol"),
        ("shop:price", "2", "no such symbol"),  # it is in a class
        ("shop:Shop.price", "3", "there 0 times"),
        ("shop:Shop.total", "count", "there 3 times"),
        ("shops:Shop.total", "count", "No such file"),
        ("shop:Shop.price", "return 2", "no Python"),
        ("sum.c:none", "x", "no such symbol"),
    ],
)
def test_a_fault_that_cannot_be_put_in_is_named(tree, symbol, old, problem):
    (found,) = check(tree, [fault("says", symbol, old, "return )", "test_total")])
    assert found.startswith(f"{symbol}: says: ")
    assert problem in found


def test_three_faults_a_function_and_none_twice(tree):
    four = [fault(f"says {new}", "shop:Shop.price", "2", new, "test_total") for new in "3456"]
    assert check(tree, four[:3]) == []
    assert check(tree, four) == ["shop:Shop.price: 4 faults, at most 3 may be in one function"]
    assert check(tree, four[:1] * 2) == ["shop:Shop.price: says 3: is there 2 times"]


@pytest.mark.parametrize(
    ("symbol", "old", "new"),
    [
        ("sum.c:LIMIT", "LIMIT 120", "LIMIT 9"),
        ("sum.c:LOOP", "x + 2", "x + 3"),
        ("sum.c:other", "{ return x; }", "{ return 0; }"),
        ("sum.c:sum", "return other(size);\n}", "return 1;\n}"),
    ],
)
def test_c_functions_and_macros_are_found(tree, symbol, old, new):
    path, text = changed(tree, fault("says", symbol, old, new))
    assert (str(path), text) == ("sum.c", C.replace(old, new))


def test_constants_and_decorators_belong_to_what_is_found(tree):
    assert "LIMIT, BOUND = 4, 5" in changed(tree, fault("says", "shop:LIMIT", "3", "4"))[1]
    assert "@property" not in changed(tree, fault("says", "shop:Shop.price", "    @property\n", ""))[1]


def test_each_fault_fits_the_tree():
    assert check(TREE, [fault for faults in fault_lists().values() for fault in faults]) == []
