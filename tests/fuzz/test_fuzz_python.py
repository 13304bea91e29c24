"""Fuzzed arguments: 30 of the 100 inputs of the default run, and 300 of the 1,000 of ``-m long``."""

from __future__ import annotations

import pytest
from fuzz_python import Budgets, Loaders, Models, Searches
from fuzzing import check

SHARES = {
    "loader": (Loaders, 10),
    "budget": (Budgets, 8),
    "rules": (Budgets, 5),
    "model": (Models, 3),
    "search": (Searches, 4),
}


@pytest.fixture(scope="module")
def owners():
    """Makes what the areas of one kind share, once."""
    made = {}
    return lambda kind: made.setdefault(kind, None) or made.update({kind: kind()}) or made[kind]


@pytest.mark.leaves_state
@pytest.mark.parametrize("name", SHARES)
def test_arguments(name, owners, fuzz_seed):
    kind, count = SHARES[name]
    check(getattr(owners(kind), name), seed=fuzz_seed, count=count)


@pytest.mark.long
@pytest.mark.leaves_state
@pytest.mark.parametrize("name", SHARES)
def test_many_arguments(name, owners, fuzz_seed, fuzz_times):
    kind, count = SHARES[name]
    check(getattr(owners(kind), name), seed=fuzz_seed, count=10 * count * fuzz_times)
