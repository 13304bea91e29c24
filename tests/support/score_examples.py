"""Examples of mixed lengths in batches of any size, and how scores are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zoo
from families import structure_of
from torch import nn

from hf_gradnas.types import Axis, Scores

EXAMPLES = 32
IGNORED = -100


def build(family: str, **kwargs: Any) -> tuple[Any, tuple[Axis, ...], dict[str, torch.Tensor]]:
    """A tiny model, its axes and one padded batch."""
    model, inputs = zoo.build(family, **kwargs)
    return model, structure_of(family, **kwargs).axes, inputs


def examples_of(
    family: str, count: int = EXAMPLES, *, longest: int = 13
) -> list[dict[str, torch.Tensor]]:
    """Unpadded examples of mixed lengths, each a batch of one."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in torch.randint(4, longest + 1, (count,), generator=generator).tolist():
        ids = torch.randint(3, zoo.VOCAB, (1, length), generator=generator)
        target = torch.randint(3, zoo.VOCAB, (1, 2 + length // 2), generator=generator)
        classes = torch.randint(0, zoo.LABELS, (1,), generator=generator)
        of_tokens = {"t5": target, "bart": target, "llama": ids, "opt": ids}
        labels = of_tokens.get(family, classes)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def in_batches(examples: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of examples, padded on the right to the longest of each."""
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        ids = _padded([example["input_ids"] for example in part], 0)
        mask = _padded([torch.ones_like(example["input_ids"]) for example in part], 0)
        labels = [example["labels"] for example in part]
        joined = _padded(labels, IGNORED) if labels[0].dim() > 1 else torch.cat(labels)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": joined})
    return batches


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence([row[0] for row in rows], True, value)


def assert_equal(found: Scores, expected: Mapping[str, Any], rtol: float = 1e-9) -> None:
    """Compare up to `rtol` of each axis's largest score."""
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        values = np.asarray(value)
        assert np.abs(found.values[name] - values).max() <= rtol * np.abs(values).max(), name
