"""Faults of the linear probe."""

from tests.mutations.fault import Fault

_PROBE = "tests/workers/evaluation/test_linear_probe.py"

FAULTS = [
    Fault(
        "ties of penalties are resolved the other way",
        "sigray.workers.evaluation.linear_probe:_choose_penalty",
        "best = max(best, (hits, penalty))",
        "best = (hits, penalty) if hits >= best[0] else best",
        (f"{_PROBE}::test_clouds_apart_are_named_and_unknown_classes_are_wrong",),
    ),
    Fault(
        "the bias has a penalty too",
        "sigray.workers.evaluation.linear_probe:fit_logistic",
        "weights[:, :-1].square()",
        "weights.square()",
        (f"{_PROBE}::test_the_solution_is_newtons",),
    ),
    Fault(
        "images of unknown classes do not count",
        "sigray.workers.evaluation.linear_probe:linear_probe",
        "== truth).double().mean()",
        "== truth)[truth >= 0].double().mean()",
        (f"{_PROBE}::test_clouds_apart_are_named_and_unknown_classes_are_wrong",),
    ),
]
