"""Put small faults into a copy of the tree, one at a time, and see whether the tests named for each notice.

The faults are the lists FAULTS of tests/mutations/faults_*.py and keys.py. First all named tests run without a fault,
but for those that passed in the report of `--passed`: one that is red or skipped is an error. A fault is caught if a
test fails by an assertion on a value while it is in; an import error, another exception, a crash or no end at all does
not count. Changes that are not committed are copied too. The last line is `mutations=N survivors=M`; the exit code is 1
if a fault survived or cannot be judged.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.mutations.fault import AnyFault, name_of
from tests.mutations.runner import LIBRARIES, Verdict, Worker, baseline, judge, passed_tests, workers
from tests.mutations.source import check

TREE = Path(__file__).resolve().parents[2]
_WHERE = "tests/mutations/where.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a list's name, a symbol, a test or a text")
    parser.add_argument(
        "--passed",
        type=Path,
        metavar="FILE",
        help="pytest's JUnit report of this tree: tests that passed there do not run without a fault again",
    )
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="each N-th of the chosen faults, from the K-th on"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    options = parser.parse_args()
    known = [(name, fault) for name, faults in fault_lists().items() for fault in faults]
    chosen = [fault for name, fault in known if _is_meant(name, fault, options.names)]
    first, step = options.part
    chosen = chosen[first - 1 :: step]
    if options.list:
        for fault in chosen:
            print(f"{name_of(fault)}: {fault.says}  [{', '.join(fault.tests)}]")
        return
    if problems := check(TREE, [fault for _, fault in known]):
        sys.exit("\n".join(problems))
    passed = passed_tests(options.passed) if options.passed else {}
    sys.exit(run(TREE, chosen, passed=passed, show_where=not options.names))


def fault_lists() -> dict[str, Sequence[AnyFault]]:
    """The faults of each list, by the list's name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("faults_*.py"))
    names += ["keys"] if Path(__file__).with_name("keys.py").exists() else []
    return {name: importlib.import_module(f"tests.mutations.{name}").FAULTS for name in names}


def run(
    tree: Path,
    faults: Sequence[AnyFault],
    *,
    passed: Mapping[str, float] = MappingProxyType({}),
    libraries: Sequence[str] = LIBRARIES,
    show_where: bool,
) -> int:
    """Judge each fault, print what came of it; the exit code.

    Args:
        passed: seconds of tests that are known to be green without a fault.
    """
    began = time.monotonic()
    lock = threading.Lock()
    survivors = 0

    def done(fault: AnyFault, verdict: Verdict) -> None:
        nonlocal survivors
        word = "caught" if verdict.caught else "SURVIVED"
        with lock:
            survivors += not verdict.caught
            print(f"{word:8} {verdict.seconds:5.1f} s  {name_of(fault)}: {fault.says}  [{verdict.says}]", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, workers(tree, Path(folder), libraries) as made:
        if show_where and not _all_import_the_copy(made[0]):
            return 1
        seconds, red = baseline(made, [test for fault in faults for test in fault.tests], passed)
        print(f"{len(seconds)} tests are green without a fault, {time.monotonic() - began:.0f} s so far", flush=True)
        sound = []
        for fault in faults:
            if found := [f"{test}: {red[test]}" for test in fault.tests if test in red]:
                done(fault, Verdict(False, 0, "; ".join(found)))
            else:
                sound.append(fault)
        judge(made, sound, seconds, done)
    print(f"{time.monotonic() - began:.0f} s")
    print(f"mutations={len(faults)} survivors={survivors}", flush=True)
    return int(survivors > 0)


def _all_import_the_copy(worker: Worker) -> bool:
    """Print which file each kind of process imports; whether all are the copy's."""
    answer = worker.run([_WHERE], 300, options=["--noconftest"])  # which has tiers, and none is meant here
    calls = [line for line in answer["seen"] if line["phase"] == "call"]
    for line in calls:
        print(line["printed"].strip() or line["test"])
    failed = [line for line in answer["seen"] if line["outcome"] == "failed"]
    for line in failed:
        print(f"{line['test']}: {line['says']}")
    if answer["ended"] or not calls:
        print(answer["ended"], answer["log"])
    return bool(calls) and not failed and not answer["ended"]


def _part(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise argparse.ArgumentTypeError(f"{text}: K/N expected, such as 1/4")
    return int(first), int(step)


def _is_meant(name: str, fault: AnyFault, wanted: Sequence[str]) -> bool:
    texts = [name, name_of(fault), fault.says, *fault.tests]
    return not wanted or any(word in text for word in wanted for text in texts)


if __name__ == "__main__":
    main()
