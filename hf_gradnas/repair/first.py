"""What a repair looks for on a few examples before it starts: the same on all processes.

Knows the main process's first examples; what is looked for is in `streams` and `narrow`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..batches.batch import Batch, check_batch, to_device
from ..batches.longest import from_main
from ..running.processes import Processes
from ..scores.losses import inputs_to_sample
from ..types import Axis, Plan
from .narrow import Narrow, find_narrow
from .readers import Found, Reader
from .streams import find_readers

TRACED = 4
"""Examples that readers are looked for with, at most: the trace keeps all that a forward makes."""
MEMORY_RATIO = 0.25
"""Share of the free memory that waiting forwards may hold by default."""


def first_readers(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    plan: Plan,
    batches: Sequence[Batch],
    processes: Processes,
) -> Found:
    """Readers and gates of a plan, found on the main process's first examples: the same on all."""
    call, examples = _first_call(model, batches, processes)
    with processes.joint():
        return find_readers(model, axes, plan.kept, call, examples=examples)


def first_narrow(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    plan: Plan,
    found: Found,
    batches: Sequence[Batch],
    processes: Processes,
) -> Narrow:
    """Copies of weights that pruned forwards run with, tried on the same examples.

    Args:
        model: The whole model.
        axes: All its axes.
        plan: What stays.
        found: Its readers; what is compared alone keeps its whole input.
        batches: This process's.
        processes: All that repair together.
    """
    readers = [reader for gate in found.gates for reader in gate.readers]
    alone = {reader.path for reader in readers if isinstance(reader, Reader) and reader.alone}
    call, _ = _first_call(model, batches, processes)
    run = partial(model, **call)
    with processes.joint():
        return find_narrow(model, axes, plan.kept, run, but_at=alone)


def _first_call(
    model: PreTrainedModel, batches: Sequence[Batch], processes: Processes
) -> tuple[dict[str, Any], int]:
    """Arguments of a forward of the main process's first examples, and how many they are."""
    own = _first_examples(batches[0]) if batches else {}
    columns = from_main(own, processes)
    with processes.joint():
        batch = check_batch(0, columns, find_labels(type(model)))
        inputs, _ = inputs_to_sample(model, batch)
        return to_device(inputs, model), batch.examples


def _first_examples(batch: Batch) -> Mapping[str, Any]:
    """Columns of so many examples that they can be traced; of all where a column counts others."""
    tensors = [value for value in batch.columns.values() if isinstance(value, Tensor)]
    if any(value.shape[:1] != (batch.examples,) for value in tensors):
        return batch.columns
    return batch.select(list(range(min(TRACED, batch.examples))))


def default_bound(model: nn.Module) -> float:
    """A share of the free memory where the model is, in bytes."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return MEMORY_RATIO * torch.cuda.mem_get_info(device)[0]
    return MEMORY_RATIO * float(psutil.virtual_memory().available)
