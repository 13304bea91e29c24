"""Neurons that stay, chosen again for what least squares can mend; the widths stay as planned.

Scores say what a unit is worth while all other weights are as they are. A repair changes them, so
that a unit whose output the others can make up for may go. Of every pruned axis of neurons, the
upper half by score of what the plan keeps stays. The rest is chosen anew by backward elimination
(optimal brain surgeon, Hassibi & Stork 1993; of whole columns as in ZipLM, Kurtic et al. 2023,
arXiv 2302.04089): with x the inputs of the out-projection in the whole model, w_j the weights that
read unit j, and

    H = Σ x xᵀ + ridge·mean(diag Σ x xᵀ)·I,

those units go that cost least after the best update of all other weights, ``‖w_j‖² / [H⁻¹]_jj``;
weights and H⁻¹ are updated. We take several at a time, and only choose: the new weights themselves
are found by the repair, from the pruned model's own inputs.

Knows neurons, their inputs and weights; costs and budgets do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..batches.batch import Batch, run_model
from ..errors import RepairError
from ..running.processes import Processes
from ..scores.losses import inputs_to_sample
from ..search.prediction import with_prediction
from ..types import Axis, Plan, Scores
from .closeness import at_least_float32, running
from .first import default_bound, first_readers
from .paused import Conductor, Forward
from .pieces import Masks, decoder_path, masks_of, read_parts, real_positions
from .readers import Gate, Place, Reader, weight_of
from .ridge import add_gram, empty_gram, sum_over

Progress = Callable[[int, int | None], None]

RIDGE = 0.01
"""Strength of the ridge, in units of the mean diagonal of ``Σ x xᵀ``."""
STEP = 16
"""Units that go at a time."""
EVERY = 2
"""Of so many batches that are not held out, one is read."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """An axis of neurons that loses some, and the layer that reads them.

    Attributes:
        axis: The axis.
        reader: Its out-projection, which the repair can fit.
    """

    axis: Axis
    reader: Reader


def swap_neurons(  # noqa: PLR0913 - the settings of one step, all with defaults
    model: PreTrainedModel,
    axes: Sequence[Axis],
    plan: Plan,
    scores: Scores,
    batches: Iterable[Any],
    *,
    processes: Processes | None = None,
    num_examples: int | None = None,
    progress: Progress | None = None,
    spill: str | Path | None = None,
    memory_bytes: float | None = None,
) -> Plan:
    """Choose anew which neurons stay, as many as before in every layer.

    What the repair holds out is not read, so that it can tell whether the other neurons are better.
    One forward of the whole model per second batch of the rest: all wait at a layer until it is
    chosen for, so that the sums of one layer are in memory at a time. Its inverse in float64 is
    made on the main process.

    Args:
        model: The whole model, before the cut.
        axes: All its axes.
        plan: What stays.
        scores: ``(size,)`` per axis; those of the plan, to predict its loss again.
        batches: Dicts for ``model(**batch)``, as for scoring; only a decoder reads labels.
        processes: All that work together, each on its share of the batches.
        num_examples: Use the first so many examples, over all processes; None: all.
        progress: Called on the main process with steps done and their number.
        spill: Folder for states that do not fit into memory; None: the system's temporary one.
        memory_bytes: What waiting forwards may hold in memory; None: a quarter of what is free.

    Returns:
        The plan with other neurons, and their predicted loss. The same plan where there is nothing
        to swap: axes that lose all or nothing, or whose out-projection a repair leaves as it is.

    Raises:
        DataError: There is no batch, or the model fails on one.
        RepairError: Activations are not finite, one example only, or no room to spill to.
    """
    processes = processes or Processes()
    pruned = [axis for axis in axes if _may_swap(axis, plan)]
    if not pruned:
        return plan
    kept = dict(plan.kept)
    with running(model):
        parts = read_parts(model, batches, num_examples, processes)
        own = [p.batch for p in parts if not p.is_held_out and p.number % EVERY == 0]
        sites = _sites(model, axes, pruned, plan, own, processes)
        bound = default_bound(model) if memory_bytes is None else memory_bytes
        conductor = _conductor(model, sites, memory_bytes=bound, folder=spill)
        with closing(_choices(sites, conductor, own, plan, scores, processes)) as choices:
            for done, (name, units) in enumerate(choices, 1):
                kept[name] = units
                if progress is not None and processes.is_main:
                    progress(done, len(sites))
    return _predicted(replace(plan, kept=kept), plan, scores)


def _may_swap(axis: Axis, plan: Plan) -> bool:
    """Whether an axis loses some units, columns of one layer that no other axis ties."""
    is_free = axis.is_columns and not axis.tied and axis.parent is None
    return is_free and 0 < len(plan.kept[axis.name]) < axis.size


def _sites(
    model: PreTrainedModel,
    axes: Sequence[Axis],
    pruned: Sequence[Axis],
    plan: Plan,
    batches: Sequence[Batch],
    processes: Processes,
) -> list[Site]:
    """The axes whose out-projection the repair can fit, in running order."""
    found = first_readers(model, axes, plan, batches, processes)
    readers = {
        reader.path: reader
        for gate in found.gates
        for reader in gate.readers
        if isinstance(reader, Reader) and not reader.alone
    }
    axis_of = {axis.taps[0].module: axis for axis in pruned}
    sites = []
    for path in found.order:
        axis, reader = axis_of.get(path), readers.get(path)
        if axis is None or reader is None or not isinstance(reader.module, nn.Linear | Conv1D):
            continue
        if set(reader.kept) == set(plan.kept[axis.name]):  # nothing else prunes its inputs
            inputs = cast(Tensor, reader.module.weight).shape[reader.input_dim]
            sites += [Site(axis, reader)] if inputs == axis.size else []
    return sites


# --- sums -----------------------------------------------------------------------------------------


def _conductor(model: nn.Module, sites: Sequence[Site], **options: Any) -> Conductor:
    """Lets forwards wait at the inputs of all sites."""
    gates = [Gate(Place(s.reader.path, "input", 0), (s.reader,), (1.0,)) for s in sites]
    return Conductor(model, gates, may_wait=False, **options)


def _choices(
    sites: Sequence[Site],
    conductor: Conductor,
    batches: Sequence[Batch],
    plan: Plan,
    scores: Scores,
    processes: Processes,
) -> Generator[tuple[str, tuple[int, ...]]]:
    """Name of the axis and units that stay, site by site; one site's sums are there at a time."""
    with conductor.attached():
        waiting = [_begin(conductor, batch) for batch in batches]
        for number, site in enumerate(sites):
            name = site.axis.name
            gram = _gram(site, number, waiting, conductor, processes)
            choose = partial(_chosen, site, gram, plan.kept[name], scores.values[name])
            units = processes.from_main(choose)
            del gram, choose
            yield name, units


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A forward of the whole model that waits at the inputs of sites, and its real positions."""

    forward: Forward
    batch: Batch
    masks: Masks


def _begin(conductor: Conductor, batch: Batch) -> _Waiting:
    model = cast(PreTrainedModel, conductor.model)
    inputs, mask = inputs_to_sample(model, batch)
    run = partial(run_model, model, batch.index, inputs)
    return _Waiting(conductor.start(run, is_pruned=False), batch, masks_of(inputs, mask))


def _gram(
    site: Site,
    number: int,
    waiting: Sequence[_Waiting],
    conductor: Conductor,
    processes: Processes,
) -> Tensor:
    """Lower triangle of ``Σ x xᵀ`` ``(size, size)`` over real positions, of all processes.

    Args:
        site: Whose inputs x are.
        number: Of its gate.
        waiting: Forwards that have not passed it.
        conductor: Lets them run as far as there.
        processes: All that work together.

    Raises:
        RepairError: Activations are not finite, or there is no room to spill to.
    """
    gram = empty_gram(site.axis.size, cast(Tensor, site.reader.module.weight))
    decoder = decoder_path(cast(PreTrainedModel, conductor.model))
    with processes.joint():
        for one in waiting:
            forward = one.forward
            conductor.load(forward)
            while forward.gate < number and not forward.is_done:
                conductor.go_on(forward)
            if forward.gate == number and not forward.is_done:
                _add_rows(gram, site.reader.path, one, decoder)
            conductor.rest(forward)
    sum_over(gram, processes)
    return gram


def _add_rows(gram: Tensor, path: str, waiting: _Waiting, decoder: str | None) -> None:
    """Add the real positions of a layer's input ``(…, size)``, at which a forward waits."""
    x = cast(Tensor, waiting.forward.tensor)
    places = real_positions(x, path, masks=waiting.masks, decoder=decoder)
    rows = at_least_float32(x.flatten(0, -2))
    rows = rows if places is None else rows[places.to(rows.device)]
    if not math.isfinite(float(rows.sum())):
        raise RepairError(
            f"{path}: its inputs are not finite on batch {waiting.batch.index}, so that no neurons "
            "can be chosen by them; load the model in float32 or bfloat16, leave the batch out, "
            "or repair nothing."
        )
    add_gram(gram, rows)


# --- choice ---------------------------------------------------------------------------------------


def _chosen(site: Site, gram: Tensor, kept: Sequence[int], scores: np.ndarray) -> tuple[int, ...]:
    """Units of an axis that stay, sorted; those that are kept now where its equations are singular.

    Args:
        site: The axis.
        gram: Lower triangle of ``Σ x xᵀ`` ``(size, size)`` in float64.
        kept: Units that the plan keeps.
        scores: ``(size,)``.
    """
    order = np.argsort(-scores[list(kept)], kind="stable")
    first = [int(kept[place]) for place in order[: (len(kept) + 1) // 2]]
    reader = site.reader
    weight = weight_of(reader, range(site.axis.size)).flatten(1)
    weight = weight if reader.input_dim == 0 else weight.t()  # (size, outputs)
    if reader.outputs is not None:
        weight = weight[:, list(reader.outputs)]
    left = eliminated(gram, weight.to(gram), len(kept), first=first)
    return tuple(kept) if left is None else left


def eliminated(
    gram: Tensor,
    weight: Tensor,
    count: int,
    *,
    first: Sequence[int] = (),
    ridge: float = RIDGE,
    step: int = STEP,
) -> tuple[int, ...] | None:
    """Units that are left when those that least squares mends best went, one group after another.

    Args:
        gram: ``Σ x xᵀ`` ``(size, size)`` in float64; its lower triangle is read.
        weight: ``(size, outputs)`` in float64; it is not changed.
        count: How many are left.
        first: Units that stay in any case, `count` of them at most.
        ridge: In units of the mean diagonal of `gram`.
        step: Units that go at a time; the lower index first where they are worth the same.

    Returns:
        Sorted units; None where the equations are singular.
    """
    matrix = gram.tril(-1)
    matrix = matrix + matrix.t()
    diagonal = gram.diagonal()
    matrix.diagonal().copy_(diagonal + ridge * diagonal.mean())
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return None
    inverse, weight = torch.cholesky_inverse(factor), weight.clone()
    del matrix, factor
    stays = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    free = stays.clone()  # what may go
    free[list(first)] = False
    while (over := int(stays.sum()) - count) > 0:
        units = (free & stays).nonzero().flatten()
        cost = weight[units].square().sum(1) / inverse.diagonal()[units]
        gone = units[cost.argsort(stable=True)[: min(step, over)]]
        # The block formula of an inverse without some rows and columns, and of its solutions.
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone]).t()  # (size, gone)
        weight -= share @ weight[gone]
        inverse -= share @ inverse[gone]
        stays[gone] = False
    return tuple(stays.nonzero().flatten().tolist())


def _predicted(swapped: Plan, plan: Plan, scores: Scores) -> Plan:
    """The swapped plan with the loss that its own scores predict."""
    if plan.score != scores.metadata.get("method", ""):
        return swapped
    change = 0.0
    for name, units in plan.kept.items():
        went, came = set(units) - set(swapped.kept[name]), set(swapped.kept[name]) - set(units)
        values = np.asarray(scores.values[name], dtype=np.float64)
        change += math.fsum(values[sorted(went)]) - math.fsum(values[sorted(came)])
    if plan.loss_unit:
        change = with_prediction(replace(plan, loss_increase=change), scores).loss_increase
    return replace(swapped, loss_increase=plan.loss_increase + change)
