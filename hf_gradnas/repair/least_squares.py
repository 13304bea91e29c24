"""Repair by least squares: new weights for the layers that read pruned units, without training.

In running order, each layer that loses inputs is fitted to what the original model has at the place
where the layer's output is seen (`streams`; best is the residual stream right after the addition):

    ΔW = argmin ‖R − XΔWᵀ‖² + α·mean(diag XᵀX)·‖ΔW‖²,    R = Z_original − Z_pruned

X are the pruned model's own inputs of the layer, with all layers before it repaired, so that R
holds their errors too. The pull is towards the present weights, not towards 0. X and R are centred,
and an intercept is fitted, only where the layer has a bias. Rows are positions that are not
padding; every fifth batch is held out: α is moved as long as the error there falls, the fit is
repeated on all rows with the best α, and kept only where the error fell. In the end the whole
repair is kept only if the KL divergence of the held-out predictions from the original's fell.

All other linear layers (queries, keys, values, the first layers of an FFN, heads) are fitted in the
same way, those that read one input x together: the map D that brings ``x + xD + c`` nearest to what
the original reads there goes into their weights, as ``Wᵀ + DWᵀ``.

FLAP (An et al. 2023, arXiv 2312.11983) mends the bias alone, Kwon et al. (2022, arXiv 2204.09656)
fit one factor per unit; here all weights that read what stays are free.

The original and the pruned model are one model, run with masks and without (`paused`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import GradNASWarning, RepairError
from ..masks import masked
from ..running.lending import lending
from ..running.offloading import is_offloaded
from ..running.processes import Processes
from ..scores.fingerprints import model_fingerprint
from ..types import Axis, Plan
from .changes import (
    Change,
    Outputs,
    change_of,
    is_centred,
    new_values,
    present_weights,
    unchanged,
    unknowns_of,
)
from .closeness import divergence_sum, prediction_of, running
from .first import Narrow, default_bound, first_narrow, first_readers, pruned
from .mapped import mapped
from .paused import Conductor, Forward
from .pieces import Part, Piece, Rows, decoder_path, make_piece, read_parts
from .readers import Feed, Reader
from .repairs import Repair, Site, lend_values, plan_digest
from .ridge import RIDGES, START, HeldOutRows, NormalEquations, best_ridge

Progress = Callable[[int, int | None], None]

TRIED = 64
"""Outputs that α is sought with, evenly spaced; of layers of less than twice as many, all."""
_ROUNDED = 16.0  # squares of so many roundings are no difference


def find_repair(  # noqa: PLR0913 - the settings of one step, all with defaults
    model: PreTrainedModel,
    axes: Sequence[Axis],
    plan: Plan,
    batches: Iterable[Any],
    *,
    processes: Processes | None = None,
    num_examples: int | None = None,
    progress: Progress | None = None,
    spill: str | Path | None = None,
    memory_bytes: float | None = None,
) -> Repair:
    """Find new weights for a plan; the model is left as it is.

    One forward of each model per batch, and one more of the pruned model for every fifth.

    Args:
        model: The whole model, before the cut.
        axes: All its axes.
        plan: What stays.
        batches: Dicts for ``model(**batch)``, as for scoring; only a decoder reads labels.
        processes: All that repair together, each on its share of the batches.
        num_examples: Use the first so many examples, over all processes; None: all.
        progress: Called on the main process with gates done and their number.
        spill: Folder for states that do not fit into memory; None: the system's temporary one.
        memory_bytes: What waiting forwards may hold in memory; None: a quarter of what is free.

    Raises:
        DataError: There is no batch, or the model fails on one.
        RepairError: Activations are not finite, one example only, or no room to spill to.

    Warns:
        GradNASWarning: There are fewer positions than unknowns in the widest layer.
    """
    processes = processes or Processes()
    with running(model), lending(model):
        parts = read_parts(model, batches, num_examples, processes)
        own = [part.batch for part in parts]
        found = first_readers(model, axes, plan, own, processes)
        narrow = first_narrow(model, axes, plan, found, own, processes)
        bound = default_bound(model) if memory_bytes is None else memory_bytes
        alone = partial(pruned, model, axes, plan.kept)
        options: Any = {"memory_bytes": bound, "folder": spill, "narrow": narrow}
        for may_wait in (True, False):
            conductor = Conductor(model, found.gates, may_wait=may_wait, **options)
            fit = _Fit(conductor, processes, spill)
            judged = fit.attempt(parts, progress, _masks(model, axes, plan, conductor), alone)
            if not processes.sum(np.array([float(conductor.has_missed)]))[0]:
                break
    _warn_if_few(fit.reading, processes)
    (examples,) = processes.sum(np.array([float(sum(batch.examples for batch in own))]))
    return Repair(
        tensors=judged[0],
        sites=(*fit.sites, *(Site(path, 0, 0, reason=why) for path, why in found.reasons.items())),
        plan=plan_digest(plan),
        model=model_fingerprint(model),
        kl_before=judged[1],
        kl_after=judged[2],
        examples=int(examples),
    )


def _masks(
    model: PreTrainedModel, axes: Sequence[Axis], plan: Plan, conductor: Conductor
) -> AbstractContextManager[None]:
    """Masks that act in pruned forwards, of what they do not leave out anyway."""
    kept = conductor.narrow.masks(plan.kept)
    return masked(model, axes, kept, when=lambda: conductor.is_pruned)


class _Fit:
    """Takes all pieces from gate to gate, and fits the readers there.

    Args:
        conductor: Lets their forwards run.
        processes: All that repair together.
        folder: Where new weights are until the model has them; None: the system's temporary one.

    Attributes:
        sites: What became of each reader.
        reading: Those of them that lose inputs.
        values: New parameters by full name, each in a file.
    """

    def __init__(
        self, conductor: Conductor, processes: Processes, folder: str | Path | None
    ) -> None:
        self.sites: list[Site] = []
        self.reading: list[Site] = []
        self.values: dict[str, Tensor] = {}
        self._folder = folder
        self._outputs = Outputs(conductor.gates, conductor.late)
        self._starts: dict[str, int] = {}  # by path without numbers: the best α of the layer before
        self._pieces: Sequence[Piece] = ()
        self._conductor, self._processes = conductor, processes
        self._decoder = decoder_path(cast(PreTrainedModel, conductor.model))
        self._is_away = is_offloaded(conductor.model)

    def attempt(
        self,
        parts: Iterable[Part],
        progress: Progress | None,
        masks: AbstractContextManager[None],
        alone: Callable[[Narrow], AbstractContextManager[None]],
    ) -> tuple[dict[str, Tensor], float, float]:
        """Fit all readers on examples, each with whether it is held out; what `judge` says."""
        conductor = self._conductor
        with conductor.before_masks(), masks, conductor.attached():
            self._pieces = [
                make_piece(conductor, part.batch, is_held_out=part.is_held_out) for part in parts
            ]
            self.run(progress)
            return self.judge(alone)

    def run(self, progress: Progress | None) -> None:
        """Fit all readers in running order.

        Raises:
            RepairError: Activations are not finite, or there is no room to spill to.
        """
        gates = self._conductor.gates
        for number, gate in enumerate(gates):
            for reader, scale in zip(gate.readers, gate.scales, strict=True):
                self.sites.append(self._fit(number, reader, scale))
                if isinstance(reader, Reader):
                    self.reading.append(self.sites[-1])
                self._outputs.seen.add(reader)
            if self._is_away:  # all go on together, so that what they run is loaded once
                for piece in self._pieces:
                    self._bring(piece, number)
                    self._rest(piece)
            if progress is not None and self._processes.is_main:
                progress(number + 1, len(gates))

    def judge(
        self, alone: Callable[[Narrow], AbstractContextManager[None]]
    ) -> tuple[dict[str, Tensor], float, float]:
        """New values of parameters, none if they are not accepted, and the divergences of both."""
        for piece in self._pieces:  # what waits is needed no more, but for predictions to compare
            if not piece.is_held_out:
                piece.pruned.stop()
                piece.original.stop()
        before, after = self._divergences(alone)
        return self.values if after < before else {}, before, after

    def _divergences(
        self, alone: Callable[[Narrow], AbstractContextManager[None]]
    ) -> tuple[float, float]:
        """Mean KL of held-out predictions from the original's, with masks alone and repaired.

        A forward that waited gives the repaired ones if it took all new weights. The order in which
        layers run may be another than in the sample: then the model is run with them.
        """
        model = cast(PreTrainedModel, self._conductor.model)
        sums = np.zeros(3)
        with self._processes.joint():
            for piece in self._pieces:
                if not piece.is_held_out:
                    continue
                self._bring(piece, len(self._conductor.gates))
                wanted = piece.original.result
                with alone(self._conductor.narrow), self._conductor.alone():
                    sums[0] += divergence_sum(prediction_of(model, piece.batch), wanted)
                found = piece.pruned.result
                if piece.pruned.took != self._outputs.found:
                    with alone(Narrow()), self._conductor.alone(), ExitStack() as undo:
                        lend_values(model, self.values, undo)
                        found = prediction_of(model, piece.batch)
                sums[1] += divergence_sum(found, wanted)
                sums[2] += int(wanted.valid.sum())
                for forward in (piece.original, piece.pruned):
                    forward.stop()
        *totals, labels = map(float, self._processes.sum(sums))
        if not labels:
            return math.nan, math.nan
        before, after = (max(total / labels, 0.0) for total in totals)  # but for rounding
        return before, after

    # -- one reader ----------------------------------------------------------------------------

    def _fit(self, number: int, reader: Reader | Feed, scale: Tensor | float) -> Site:
        """Fit one reader at a gate, and keep what it is changed by."""
        columns, outputs, like = unknowns_of(reader)
        read = partial(self._rows, number, reader, scale, held_out=True)
        every = max(outputs // TRIED, 1)
        towards = self._present(reader)
        held = HeldOutRows(read, self._processes, every=every)
        before = held.error(unchanged(towards, outputs, every))
        if not before:
            before = HeldOutRows(read, self._processes).error(unchanged(towards, outputs))
        if towards is not None:  # an output that was left out and put in again is rounded
            before *= (
                before
                >= _ROUNDED * torch.finfo(torch.promote_types(like.dtype, torch.float32)).eps ** 2
            )
        site = Site(reader.path, 0, columns, 0.0, before, before)
        if not before:
            return replace(site, reason="it is what it is in the original")
        if math.isnan(before):
            return replace(site, reason="the held-out batches do not come to it in both models")
        sums = NormalEquations.empty(columns, outputs, like)
        self._add(sums, number, reader, scale, held_out=False)
        self._outputs.forget(number)  # now all forwards are here
        sums.reduce(self._processes)
        site = replace(site, rows=sums.rows)
        find = partial(sums.solve, centred=is_centred(reader), towards=towards)
        kind = re.sub(r"\d+", "", reader.path)
        start = self._starts.get(kind, START)
        step, best = best_ridge(partial(find, every=every), held, start, many=columns > 0)
        self._starts[kind], ridge = step, RIDGES[step]
        if not best < before:
            return replace(site, reason="no new weights are closer on the held-out rows")
        if not self._processes.is_main:
            sums.clear()
        self._add(sums, number, reader, scale, held_out=True)
        sums.reduce(self._processes)
        site = replace(site, rows=sums.rows)
        solved = find(ridge, is_last=True)
        del sums, find  # the largest tensors there are
        if solved is None:
            return replace(site, reason="its equations are singular")
        change = change_of(reader, *solved, is_whole=towards is not None)
        self._keep(reader, change, like.device)
        return replace(site, ridge=ridge, error_after=best)

    def _keep(self, reader: Reader | Feed, change: Change, device: torch.device) -> None:
        """Keep new weights where they take no memory, and what forwards that wait need of them."""
        values = {n: mapped(v, self._folder) for n, v in new_values({reader: change}).items()}
        self.values |= values
        self._outputs.put(reader, change)
        if isinstance(reader, Feed):
            self._conductor.feed(reader, {name: v.to(device) for name, v in values.items()})

    def _add(
        self,
        sums: NormalEquations,
        number: int,
        reader: Reader | Feed,
        scale: Tensor | float,
        *,
        held_out: bool,
    ) -> None:
        """Add this process's rows to the sums.

        Raises:
            RepairError: Activations are not finite.
        """
        with self._processes.joint():
            for rows in self._rows(number, reader, scale, held_out=held_out):
                sums.add(rows.x, rows.residual)

    def _rows(
        self,
        number: int,
        reader: Reader | Feed,
        scale: Tensor | float,
        *,
        held_out: bool,
    ) -> Iterator[Rows]:
        """Rows of a reader of all pieces that come to its gate."""
        gate = self._conductor.gates[number]
        for piece in self._pieces:
            if piece.is_held_out != held_out:
                continue
            self._bring(piece, number)
            if piece.is_at(number, reader):
                if isinstance(reader, Feed):
                    rows = piece.fed_rows(gate, self._decoder)
                else:
                    rows = piece.rows(gate, reader, scale, self._decoder)
                if not math.isfinite(float(rows.x.sum() + rows.residual.sum())):
                    raise RepairError(
                        f"{reader.path}: its inputs or outputs are not finite on batch "
                        f"{piece.batch.index}, so that no weights can be fitted to them; load the "
                        "model in float32 or bfloat16, leave the batch out, or repair nothing."
                    )
                yield rows
            self._rest(piece)

    # -- the forwards --------------------------------------------------------------------------

    def _bring(self, piece: Piece, number: int) -> None:
        """Run both forwards of a piece as far as a gate."""
        for forward in (piece.original, piece.pruned):
            self._advance(forward, number)

    def _rest(self, piece: Piece) -> None:
        for forward in (piece.original, piece.pruned):
            self._conductor.rest(forward)

    def _advance(self, forward: Forward, number: int) -> None:
        """Run a forward as far as a gate, or a later one if it does not come there."""
        self._conductor.load(forward)
        self._outputs.settle(forward)
        while forward.gate < number and not forward.is_done:
            self._conductor.go_on(forward)
            self._outputs.settle(forward)

    def _present(self, reader: Reader | Feed) -> Callable[[range], Tensor] | None:
        """Gives present weights of a reader whose outputs are left out; None: they are not."""
        if isinstance(reader, Feed) or reader.path not in self._conductor.late:
            return None
        return partial(present_weights, reader)


def _warn_if_few(sites: Sequence[Site], processes: Processes) -> None:
    """Say so where the widest layer has more unknowns than rows."""
    short = [site for site in sites if 0 < site.rows < site.columns]
    if short and processes.is_main:
        widest = max(short, key=lambda site: site.columns)
        warnings.warn(
            f"repair: {widest.module} was fitted on {widest.rows:,} positions for "
            f"{widest.columns:,} inputs; the result is held near the present weights. Give at "
            f"least {-(-widest.columns // max(widest.rows, 1))} times the calibration examples.",
            GradNASWarning,
            stacklevel=3,
        )
