"""What is found out on a few examples before a repair starts, the same on all processes.

That is which layers read pruned units, and forwards that compute no more than stays. A masked
forward computes all neurons and multiplies most by 0. Where linear layers alone hold the neurons of
an axis, and all their rows are its own, copies of what stays take their place while a pruned
forward runs. That this equals the masked model is tried on a sample, since code between the layers
may count neurons.

Knows axes, weights and first examples; knows nothing of what is fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..batches.batch import Batch, check_batch, to_device
from ..batches.longest import from_main
from ..errors import described
from ..masks import masked
from ..running.hooks import tensor_at
from ..running.lending import Make, give, lender_of
from ..running.memory import free_memory
from ..running.offloading import device_of, loader_of
from ..running.processes import Processes
from ..scores.losses import inputs_to_sample
from ..surgery.rows import Kept, Rows, kept_rows, shapes_of
from ..types import Axis, Plan
from .memory import tensors_of
from .readers import Found, Reader, input_dim
from .streams import find_readers

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28
"""Bytes that all copies of a model may take; the same everywhere, as they change the rounding."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """Copies of parameters without the rows of neurons that go.

    Attributes:
        weights: By full name; none of what is offloaded.
        rows: What stays of each, by dimension.
        axes: Names of the axes that need no mask with them.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    axes: frozenset[str] = frozenset()

    def masks(self, kept: Kept) -> Kept:
        """What is still to be masked of what stays."""
        return {name: units for name, units in kept.items() if name not in self.axes}

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of other values of a parameter; all where it has no copy here."""
        return _part(tensor, self.rows.get(name, {}))

    def given(self, model: nn.Module) -> list[tuple[nn.Module, str, Make]]:
        """What modules of a whole model compute with (`give`); copies of what is offloaded anew."""
        found: list[tuple[nn.Module, str, Make]] = []
        for name, dims in self.rows.items():
            path, _, leaf = name.rpartition(".")
            make = partial(_part, dims=dims)
            if name in self.weights:
                make = partial(_instead, self.weights[name])
            found.append((model.get_submodule(path), leaf, make))
        return found


@contextmanager
def pruned(model: nn.Module, axes: Sequence[Axis], kept: Kept, narrow: Narrow) -> Iterator[None]:
    """Run a whole model as if only the kept units were there, with copies where there are some."""
    with ExitStack() as undo:
        undo.enter_context(masked(model, axes, narrow.masks(kept)))
        undo.callback(lender_of(model).abandon)
        for module, name, make in narrow.given(model):
            give(module, name, make, undo)
        yield


def find_narrow(
    model: nn.Module,
    axes: Sequence[Axis],
    kept: Kept,
    run: Callable[[], Any],
    *,
    but_at: Collection[str] = (),
) -> Narrow:
    """Copies for all axes that allow it, in order, as far as there is room; none if it fails.

    Args:
        model: The whole model.
        axes: All its axes.
        kept: Kept units per axis name.
        run: Runs the model on a sample, and gives its output.
        but_at: Paths of out-projections of which the inputs stay whole.
    """
    rows: Rows = {}
    names: set[str] = set()
    size = 0.0
    for axis in axes:
        more = {} if axis.taps[0].module in but_at else _rows_of(model, axis, kept)
        size += sum(_bytes_of(tensor_at(model, name), dims) for name, dims in more.items())
        if size > MOST_BYTES:
            break
        if more and not more.keys() & rows.keys():
            rows |= more
            names.add(axis.name)
    own = {name: (tensor_at(model, name).detach(), dims) for name, dims in rows.items()}
    weights = {name: _part(*pair) for name, pair in own.items() if not pair[0].is_meta}
    narrow = Narrow(weights, rows, frozenset(names))
    return narrow if not names or _agrees(model, axes, kept, narrow, run) else Narrow()


def _rows_of(model: nn.Module, axis: Axis, kept: Kept) -> Rows:
    """What stays of the tensors of an axis; nothing where they are not linear layers' of its own.

    A layer whose inputs or outputs are only in part of this axis is split by its size afterwards.
    """
    if not axis.is_columns or axis.tied or axis.parent is not None:
        return {}
    if len(kept.get(axis.name, range(axis.size))) == axis.size:
        return {}
    shapes = shapes_of(model)
    left = kept_rows(shapes, [axis], {axis.name: ()})
    if any(rows for dims in left.values() for rows in dims.values()):
        return {}
    for name in left:
        module = model.get_submodule(name.rpartition(".")[0])
        is_plain = isinstance(module, nn.Linear) and input_dim(module) is not None
        is_here = loader_of(module) is not None or not tensor_at(model, name).is_meta
        if not (is_plain and is_here):
            return {}
    return kept_rows(shapes, [axis], kept)


def _bytes_of(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> float:
    """Size of what stays of a tensor."""
    size = float(tensor.nbytes)
    for dim, rows in dims.items():
        size *= len(rows) / max(tensor.shape[dim], 1)
    return size


def _instead(tensor: Tensor, _: Tensor) -> Tensor:
    return tensor


def _part(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    for dim, rows in dims.items():
        index = torch.tensor(rows, dtype=torch.long, device=tensor.device)
        tensor = tensor.index_select(dim, index)
    return tensor


def _agrees(
    model: nn.Module, axes: Sequence[Axis], kept: Kept, narrow: Narrow, run: Callable[[], Any]
) -> bool:
    """Whether the model puts out the same with the copies as with masks, to half its digits."""
    with masked(model, axes, kept):
        wanted = _values_of(run())
    try:
        with pruned(model, axes, kept, narrow):
            found = _values_of(run())
    except Exception as error:  # whatever the code between the layers does with other sizes
        logger.info("repair: masks alone, as the model does not run without: %s", described(error))
        return False
    if not wanted or [value.shape for value in found] != [value.shape for value in wanted]:
        return False
    return all(
        bool((one - other).norm() <= torch.finfo(other.dtype).eps ** 0.5 * other.norm())
        for one, other in zip(found, wanted, strict=True)
    )


def _values_of(output: Any) -> list[Tensor]:
    """Real tensors of an output."""
    return [value for value in tensors_of((output,)) if value.is_floating_point()]


# --- on the first examples ------------------------------------------------------------------------


TRACED = 4
"""Examples that readers are looked for with, at most: more would tell no more."""
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
    device = device_of(model)
    if device.type == "cuda":
        return MEMORY_RATIO * torch.cuda.mem_get_info(device)[0]
    return MEMORY_RATIO * float(free_memory())
