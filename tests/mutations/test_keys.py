"""The list of keys and the schema of a run name the same keys."""

from tests.mutations.keys import EXCEPTIONS, KEYS, leaf_keys


def test_each_key_of_a_run_has_a_fault_or_a_reason():
    assert sorted([*KEYS, *EXCEPTIONS]) == sorted(leaf_keys())
    assert not KEYS.keys() & EXCEPTIONS.keys()
    assert len(EXCEPTIONS) <= 15
    assert all(KEYS.values())
    assert all(EXCEPTIONS.values())
