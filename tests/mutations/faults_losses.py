"""Faults of losses/, the C included."""

from tests.mutations.fault import Fault

_FUSED = "tests/losses/test_fused.py"

FAULTS = [
    Fault(
        "the product of (1 + e) is folded too late",
        "losses/terms.h:MAX_TERMS",
        "TERMS 120",
        "TERMS 240",
        (f"{_FUSED}::test_exponentials_and_logarithms_over_the_whole_range",),
    ),
]
