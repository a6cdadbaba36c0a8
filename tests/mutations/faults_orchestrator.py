"""Faults of orchestrator/."""

from tests.mutations.fault import Fault

_SECRETS = "tests/orchestrator/test_secrets.py"

FAULTS = [
    Fault(
        "private keys are not looked for",
        "orchestrator.secrets:PRIVATE_KEY",
        "-----BEGIN",
        "-----BEGUN",
        (f"{_SECRETS}::test_a_secret_is_refused_and_not_repeated",),
    ),
]
