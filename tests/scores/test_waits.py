"""The host waits once a batch for a device: for the sums of the batch.

Counted is everything that the host waits for on a device of Python (`other_device`): numbers that
it reads in any type, results whose shape depends on numbers (``nonzero``, an index by a mask,
``unique``, ``bincount``), copies from the device, and copies to it that are not from pinned memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from places import SUPPORT

SUMS = "hf_gradnas/scores/measure.py: _to_copy from the device in _values"
BATCH = "hf_gradnas/running/copies.py: _to_copy from the device in _brought"
EXPERTS = "hf_gradnas/routing.py: tolist in run_experts"
MOE_LAYERS = 2


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What one batch more waits for, by case."""
    command = [sys.executable, str(SUPPORT / "device_process.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("case", ["tempered", "drawn"])
@pytest.mark.parametrize("place", ["host", "prepared"])
def test_a_batch_waits_for_its_sums_alone(found: dict[str, Any], case: str, place: str) -> None:
    assert found[f"llama, {case}, {place}"]["waits"] == {SUMS: 1}


@pytest.mark.parametrize("case", ["tempered", "drawn"])
def test_a_batch_that_is_on_the_device_comes_in_one_copy(found: dict[str, Any], case: str) -> None:
    assert found[f"llama, {case}, device"]["waits"] == {SUMS: 1, BATCH: 1}


def test_a_mixture_asks_once_a_layer_who_was_chosen(found: dict[str, Any]) -> None:
    assert found["mixtral, fisher, host"]["waits"] == {SUMS: 1, EXPERTS: MOE_LAYERS}


def test_scores_are_the_same_wherever_batches_are(found: dict[str, Any]) -> None:
    assert len(found) == 9
    assert all(case["is_same"] for case in found.values())
