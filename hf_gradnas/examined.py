"""A model in hand: what was found out about it, and how it does with a plan, before it is cut.

Knows discovery, checks, repair and trial, which need no scores; the other steps are in `pruner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from .batches.batch import to_device
from .batches.longest import Batch, check_inputs, from_main, longest_of_all, reiterable
from .blueprint.offloaded import find_offloaded
from .checkpoint.apply import apply_plan, check_uncut
from .checkpoint.prunable import find_prunables
from .checkpoint.savable import check_savable
from .config.limits import check_rules, parse_budgets, parse_rules
from .costs.measured import measure_table
from .errors import DataError, OrderError, check_choice
from .masks import masked
from .repair.least_squares import find_repair
from .repair.repairs import Repair, check_repair, check_unsharded, repaired
from .running.kernels import warn_of_kernels
from .running.offloading import is_offloaded
from .running.processes import Processes
from .running.wrappers import body_of, check_parameters, uncompiled
from .search.solver import check_budgets
from .stock.layouts import LAYOUTS
from .surgery.cut import check_plan
from .types import Basis, Budget, CostModel, LatencyTable, Plan, Prunable, Structure
from .types.outlines import by_kind, outline

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Progress = Callable[[int, int | None], None]


class ExaminedModel:
    """A model with its axes, layout and costs; `GradNASPruner` has the steps after that.

    Args:
        model: As of `GradNASPruner`, and so are the others.
        layout: ``auto``, ``stock`` or ``per_layer``.
        rules: What must stay.
        layers: Whether whole layers may go, too.
        accelerator: Of the processes that work together.

    Raises:
        PlanError: An unknown layout or rule.
        StructureError: It is no Transformers model, or adapters are in or around it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layout: str,
        rules: Mapping[str, Any] | None,
        layers: bool,
        accelerator: Accelerator | PartialState | None,
    ) -> None:
        check_choice("layout", layout, LAYOUTS)
        self.model, self._owner = body_of(model)
        self._processes = Processes(accelerator)
        self.rules = parse_rules(rules)
        self.layout = self._requested = layout
        self._layers = layers
        self.layout_reason = ""
        self._prunable: Prunable | None = None
        self._others: tuple[Prunable, ...] = ()
        self._checkpoint: Mapping[str, str] = {}
        self._checked: set[tuple[Budget, ...]] = set()
        self._plan: Plan | None = None
        self._applied = False

    def __repr__(self) -> str:
        found, plan = self._prunable, self._plan
        rows = {
            "model": type(self.model).__name__,
            "layout": self.layout,
            "units": by_kind({axis.name: axis.size for axis in found.axes}) if found else "",
            "kept": by_kind(plan.sizes, plan.counts()) if plan else "",
        }
        return outline(type(self).__name__, rows)

    @property
    def prunable(self) -> Prunable:
        """What can be pruned in the model, in which layout, and what it costs.

        Raises:
            OrderError: Neither `discover` nor `score` was called.
        """
        found: Prunable = need(self._prunable, "structure", "discover(batch) or score(dataloader)")
        return found

    @property
    def basis(self) -> Basis:
        """What plans are made from besides scores, also where the model is not.

        Raises:
            OrderError: Neither `discover` nor `score` was called.
        """
        return Basis.of((self.prunable, *self._others), self._checkpoint)

    @property
    def structure(self) -> Structure:
        """Axes of the model, and what was refused.

        Raises:
            OrderError: Neither `discover` nor `score` was called.
        """
        return self.prunable.structure

    @property
    def costs(self) -> dict[str, CostModel]:
        """Closed forms of the costs, by name; one that is added here and to `totals` counts too.

        Raises:
            OrderError: Neither `discover` nor `score` was called.
        """
        return cast(dict[str, CostModel], self.prunable.costs)

    @property
    def totals(self) -> dict[str, float]:
        """Costs of the unpruned model, by name.

        Raises:
            OrderError: Neither `discover` nor `score` was called.
        """
        return cast(dict[str, float], self.prunable.totals)

    def discover(
        self,
        batch: Batch,
        *,
        flops_length: int | None = None,
        every_layout: bool = False,
        checkpoint: Mapping[str, str] | None = None,
    ) -> Structure:
        """Find and prove the axes, decide the layout, and count the costs.

        Args:
            batch: Keyword arguments of the model's forward (tensors are moved to its device).
            flops_length: Tokens of the one sequence that FLOPs are counted for; None: the batch's.
            every_layout: Examine the layouts that are not chosen, too, so that the scores alone
                say what a plan in any of them needs.
            checkpoint: What the model was loaded from, unchanged since; see `types.Basis`.

        Raises:
            CheckpointError: The model's config or generation config cannot be saved.
            DataError: The batch or a length cannot be the model's.
            StructureError: Nothing in the model can be pruned, a rule's glob matches nothing, or
                the model could not be saved and loaded as it is (see `check_savable`).

        Warns:
            GradNASWarning: The model's attention kernel is one that nothing is proved with.
        """
        check_uncut("discover", is_cut=self._applied)
        is_away = is_offloaded(self.model)
        check_parameters(self.model, "discover", offloaded=is_away)
        try:
            check_inputs(batch, self.model, flops_length)
        except DataError:
            check_savable(self.model)  # a head that was replaced may be at fault, not the data
            raise
        given: dict[str, Any] = {"rules": self.rules, "flops_length": flops_length}
        given["layers"] = self._layers
        # A caller without gradients, as evaluation has it: the search needs some.
        with (
            uncompiled(),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._processes.joint(),
        ):
            batch = to_device(from_main(batch, self._processes), self.model)
            check_savable(self.model, batch)
            find = find_offloaded if is_away else find_prunables
            given |= {"layout": self._requested, "every": every_layout}
            found, *others = find(self.model, batch, **given)
        if self._processes.is_main:
            warn_of_kernels(self.model)
        check_rules(self.rules, found.structure)
        self._others, self._checkpoint = tuple(others), dict(checkpoint or {})
        self.layout, self.layout_reason = found.layout, found.layout_reason
        self._prunable = found
        return found.structure

    def measure_latency(
        self,
        batch: Batch,
        *,
        batch_size: int = 1,
        length: int | None = None,
        phase: str = "prefill",
        progress: Progress | None = None,
        **timing: Any,
    ) -> LatencyTable:
        """Time the sub-layers at several widths, here and as the model is, and budget by it.

        A minute or so, once for a machine: `LatencyTable.save` keeps it for `use_latency`.

        Args:
            batch: As for `discover`; the first example is repeated.
            batch_size: Examples at once.
            length: Tokens of each; None: the batch's.
            phase: ``"prefill"``, a forward of all tokens, or ``"decode"``, one of the next token.
            progress: Called with widths done and their number.
            **timing: ``clock`` and ``seconds`` of `costs.latency.medians_ms`.

        Raises:
            BudgetError: The times of this model do not add up (channels), or were not measured.
            OrderError: Neither `discover` nor `score` was called, or the model is cut already.
            PlanError: The phase is unknown.
        """
        check_uncut("measure_latency", is_cut=self._applied)
        found = self.prunable
        given = {"batch_size": batch_size, "length": length, "phase": phase, **timing}
        if progress is not None:
            given["progress"] = progress
        if found.layout == "per_layer":
            given["cut_whole"] = partial(_cut_whole, found=found)
        table = self._processes.from_main(lambda: measure_table(self.model, found, batch, **given))
        self.use_latency(table)
        return table

    def use_latency(
        self, table: LatencyTable | str | Path, *, device: str | None = None
    ) -> LatencyTable:
        """Take a table for budgets of ``latency_ms``; it may be of another machine than this one.

        It is returned, read where a file is given.

        Args:
            table: As `measure_latency` gives it, or the file that it was saved to.
            device: Type of the device that it has to be of, such as ``"cuda"``; None: any.

        Raises:
            BudgetError: It is of a model of another structure, or of another device; or the file
                holds none.
            OrderError: Neither `discover` nor `score` was called.
        """
        found = self.prunable
        if not isinstance(table, LatencyTable):
            table = self._processes.from_main(partial(LatencyTable.load, table))
        self._prunable = table.priced(found, device=device)
        return table

    def save_latency(self, table: LatencyTable, file: str | Path) -> None:
        """Write a table, by the main process."""
        self._processes.from_main(lambda: table.save(file))

    def check(self, budget: Mapping[str, Any]) -> tuple[Budget, ...]:
        """Read a budget, and check that it can be reached; warns, once, if it is near the lowest.

        Raises:
            BudgetError: It cannot be read, or not be reached; the message says what can.
        """
        budgets = parse_budgets(budget, self.totals, self.prunable.absent)
        warns = self._processes.is_main and budgets not in self._checked
        check_budgets(self.prunable, budgets, rules=self.rules, warns=warns)
        self._checked.add(budgets)
        return budgets

    def repair(
        self,
        plan: Plan,
        dataloader: Iterable[Batch],
        *,
        num_examples: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Repair:
        """Find new weights for the layers that read what a plan prunes, by least squares.

        Comes before the cut; the model is as it was. `masked` and `apply` take the result.

        Args:
            plan: What will be pruned.
            dataloader: As for `score`; labels are not read except by a decoder. Every fifth batch
                is held out.
            num_examples: Use the first so many examples; None: all.
            progress: Called with layers done and their number.
            **options: Further arguments of `repair.least_squares.find_repair`.

        Raises:
            DataError: Batches that the model cannot run.
            OrderError: The model is cut already.
            PlanError: The plan does not fit this model.
            RepairError: Activations are not finite, one example only, or no room on the disk.
            StructureError: The weights are sharded.
        """
        self._check_whole("repair", offloaded=True)
        dataloader = self._discovered(dataloader, num_examples)
        plan = check_plan(self.structure.axes, plan)
        options |= {"num_examples": num_examples, "progress": progress}
        axes, processes = self.structure.axes, self._processes
        return find_repair(self.model, axes, plan, dataloader, processes=processes, **options)

    def masked(self, plan: Plan, repair: Repair | None = None) -> AbstractContextManager[None]:
        """Try a plan without cutting: inside the ``with``, pruned units are multiplied by 0.

        Args:
            plan: What is pruned.
            repair: New weights for it, in force inside the ``with`` too.

        Raises:
            PlanError: The plan does not fit this model.
            RepairError: The repair is that of another plan or model.
            StructureError: The weights are sharded, and there is a repair.
        """
        check_uncut("masked", is_cut=self._applied)
        given, plan = plan, check_plan(self.structure.axes, plan)
        context = masked(self.model, self.structure.axes, plan.kept)
        if repair is not None:
            check_unsharded(self.model, "masked")
            check_repair(repair, self.model, plan, given)
            context = repaired(self.model, repair, context)
        return uncompiled(context)

    def _check_whole(self, step: str, *, offloaded: bool = False) -> None:
        """Check that the model is not cut, and all of it is on this process.

        Raises:
            OrderError: It was cut.
            StructureError: The weights are sharded.
        """
        if self._applied:
            raise OrderError(
                f"{step}: this model was cut already, and a repair compares it with the whole one; "
                f"load the original again, and call {step}(plan, dataloader) before apply(plan, "
                "repair)."
            )
        check_unsharded(self.model, step, offloaded=offloaded)

    def _discovered(self, dataloader: Iterable[Batch], limit: int | None) -> Iterable[Batch]:
        """The same batches, to be read again once `discover` has seen the longest of them."""
        if self._prunable is None:
            dataloader = reiterable(dataloader, self.model, limit)
            self.discover(longest_of_all(dataloader, self.model, limit, self._processes))
        return dataloader

    def _cut_plan(self, step: str) -> Plan:
        """The plan that the model was cut to."""
        if self._plan is None:
            found = "failed when it was cut" if self._applied else "is not cut yet"
            advice = "load it again and make a new pruner" if self._applied else "call apply(plan)"
            raise OrderError(f"{step}: the model {found}; {advice} first.")
        return self._plan


def need(value: Any, what: str, call: str) -> Any:
    """What an earlier step found.

    Raises:
        OrderError: The step was not taken; the message names its call.
    """
    if value is None:
        raise OrderError(f"{what}: not known yet; call {call} first.")
    return value


def _cut_whole(
    model: PreTrainedModel, kept: Mapping[str, Sequence[int]], *, found: Prunable
) -> None:
    """Cut a model with its config, as `GradNASPruner.apply` does."""
    units = {name: tuple(each) for name, each in kept.items()}
    sizes = {axis.name: axis.size for axis in found.axes}
    apply_plan(model, Plan(units, sizes, found.layout), found.structure, found.space)
