"""What a fault is. The lists stand beside this file, one for each part of the product."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One small change of the product that a test must notice.

    Attributes:
        says: what is wrong with it, in a few words.
        symbol: the function that is changed, `package.module:Class.method`; of C code, `losses/fused.c:function`.
        old: text that stands exactly once in that function.
        new: text in its place.
        tests: pytest node ids; each is green without the fault, and at least one fails by an assertion with it.
    """

    says: str
    symbol: str
    old: str
    new: str
    tests: tuple[str, ...]
