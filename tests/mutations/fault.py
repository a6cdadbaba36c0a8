"""What a fault is. The lists stand beside this file, one for each part of the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Fault:
    """One small change of the product that a test must notice.

    Attributes:
        says: what is wrong with it, in a few words.
        symbol: the function that is changed, `package.module:Class.method`; of C code, `losses/fused.c:function`.
            A class or a constant of a module is named in the same way.
        old: text that stands exactly once in that function.
        new: text in its place.
        tests: pytest node ids; each is green without the fault, and at least one fails by an assertion with it.
    """

    says: str
    symbol: str
    old: str
    new: str
    tests: tuple[str, ...]


class Appended(Protocol):
    """A fault that is text at the end of a file: those of the config's keys, which `keys.py` generates."""

    @property
    def says(self) -> str: ...

    @property
    def file(self) -> str: ...

    @property
    def append(self) -> str: ...

    @property
    def tests(self) -> tuple[str, ...]: ...


AnyFault = Fault | Appended


def name_of(fault: AnyFault) -> str:
    """Where the fault is, for a person."""
    return fault.symbol if isinstance(fault, Fault) else fault.file
