"""Fuzzed files: 70 of the 100 inputs of the default run, and 700 of the 1,000 of ``-m long``.

Another seed: ``pytest tests/fuzz -m long --fuzz-seed 7``; ``--fuzz-times 2`` doubles the inputs.
"""

from __future__ import annotations

import pytest
import zoo
from fuzz_files import Checkpoint, DataFiles, Pruning, Recipes
from fuzzing import check

SHARES = {
    "data_file": (DataFiles, 20),
    "recipe": (Recipes, 12),
    "plan_file": (Pruning, 8),
    "plan_object": (Pruning, 8),
    "scores_file": (Pruning, 6),
    "resume_file": (Pruning, 6),
    "document": (Checkpoint, 5),
    "record": (Checkpoint, 5),
}


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """Makes what the areas of one kind share, once."""
    made = {}

    def owner(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.__name__)
            if kind is Checkpoint:
                model, inputs = zoo.build("bert")
                made[kind] = Checkpoint(folder, model, [inputs])
            elif kind is Pruning:
                made[kind] = Pruning(folder, *zoo.build("bert"))
            else:
                made[kind] = kind(folder)
        return made[kind]

    return owner


@pytest.mark.parametrize("name", SHARES)
def test_files(name, owners, fuzz_seed):
    kind, count = SHARES[name]
    check(getattr(owners(kind), name), seed=fuzz_seed, count=count)


@pytest.mark.long
@pytest.mark.parametrize("name", SHARES)
def test_many_files(name, owners, fuzz_seed, fuzz_times):
    kind, count = SHARES[name]
    check(getattr(owners(kind), name), seed=fuzz_seed, count=10 * count * fuzz_times)
