"""Scores a model on a device beside the CPU, and prints what the host waits for, a batch.

``python device_process.py`` prints one JSON object: waits of each batch after the first by case,
and whether the scores are those of batches on the host.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
import zoo
from accelerate.data_loader import prepare_data_loader
from other_device import DEVICE, OnDevice, put, waits
from score_examples import examples_of, in_batches
from torch.utils.data import DataLoader

from hf_gradnas.scores import collect_scores
from hf_gradnas.verification import find_structure

BATCHES = 2
CASES = {
    "fisher": {"method": "fisher"},
    "tempered": {"method": "tempered", "also": ("gradnas", "balanced")},
    "drawn": {"method": "fisher", "labels": "model"},
}
FAMILIES = {"llama": ("tempered", "drawn"), "mixtral": ("fisher",)}


def places(batches: list[Any]) -> dict[str, Any]:
    """The same batches on the host, on the device, and of a loader that puts them there."""
    whole = DataLoader(batches, batch_size=None)
    return {
        "host": batches,
        "device": [{name: OnDevice(x) for name, x in batch.items()} for batch in batches],
        "prepared": prepare_data_loader(whole, device=DEVICE, put_on_device=True),
    }


def measured(model: Any, axes: Any, batches: Any, options: dict[str, Any]) -> Any:
    """Scores, and what each batch after the first adds to the waits."""
    with waits() as found:
        collect_scores(model, axes, batches, num_examples=4, **options)
        first = Counter(found)
        found.clear()
        scores = collect_scores(model, axes, batches, **options)
        more = Counter(found) - first
    return scores, {what: count / (BATCHES - 1) for what, count in more.items()}


def main() -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    for family, cases in FAMILIES.items():
        model, _ = zoo.build(family, dtype=torch.float32)
        batches = in_batches(examples_of("llama", 4 * BATCHES), 4)
        axes = find_structure(model, batches[0]).axes
        put(model)
        for case in cases:
            expected, options = None, CASES[case]
            for place, given in places(batches).items():
                scores, found = measured(model, axes, given, options)
                expected = expected or scores
                is_same = all(
                    np.array_equal(values, expected.values[name])
                    for name, values in scores.values.items()
                )
                said[f"{family}, {case}, {place}"] = {"waits": found, "is_same": is_same}
                if place == "prepared":
                    assert given.device == DEVICE
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
