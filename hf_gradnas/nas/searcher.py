"""The search of mode ``gradnas``: scores from gradients, then bisection over the degradation.

The degradation of an hparam at a choice is the sum of the scores of the units that the choice
prunes. Every hparam takes its smallest choice whose degradation is at most a threshold, and the
smallest threshold that meets the constraints is found by bisection over the thresholds that exist:
unlike an absolute tolerance, that does not depend on the unit of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.prunable import rehearsed
from ..checkpoint.savable import check_savable
from ..config.limits import (
    format_amount,
    parse_budgets,
    percent_up,
    say_lowest,
    warn_near_lowest,
)
from ..costs.counting import counted
from ..errors import BudgetError, DataError, OrderError, StructureError
from ..running.wrappers import check_parameters
from ..search.solver import find_plan
from ..stock.space import find_stock_space
from ..types import Budget, Prunable, Scores, Structure
from ..verification import find_structure
from .arguments import DEFAULTS, named_arguments, probe_arguments, sanitize, unwrap
from .gradients import Setup
from .hparams import Hparam, make_hparams, needed_space
from .scoring import Pass, load_scores, measure_scores, save_scores, seen_by_all


class GradientBinarySearcher:
    """Search a converted model for the sizes with the least degradation within constraints.

    Attributes:
        SETUP_GRADIENT_FUNC: Set-up functions by module type. A function takes the module and
            returns its `GradientDataManager` and the handle that removes its hook; it replaces the
            built-in masks of every hparam inside a module of that type.
        sensitivity_map: Degradation by choice, per hparam name, after `before_search`.
    """

    SETUP_GRADIENT_FUNC: ClassVar[dict[type[nn.Module], Setup]] = {}

    def __init__(self) -> None:
        self.sensitivity_map: dict[str, dict[int, float]] = {}
        self.best: dict[str, Any] = {}
        self.config: dict[str, Any] = self.default_search_config
        self.history: dict[str, list[Any]] = {"threshold": [], "constraints": [], "satisfied": []}
        self.prunable = Prunable(Structure(()), {}, {})
        self.original: dict[str, float] = {}
        self.budgets: tuple[Budget, ...] = ()

    @property
    def default_search_config(self) -> dict[str, Any]:
        """Settings of `search` and their defaults.

        ``data_loader`` and ``loss_func`` have to be given. ``reduce`` says how the degradations of
        hparams become one score: ``"max"``, as the reference does, or ``"sum"``, as its text says;
        with ``"sum"`` the plan with the least total degradation is searched. ``average_scores`` and
        ``score_convergence_*`` are those of the reference's last release, off by default.
        """
        return {**DEFAULTS, "verbose": PartialState().is_main_process}

    @property
    def hparam_names_for_search(self) -> set[str]:
        """Last parts of the names of hparams that a size is chosen for; the others stay whole."""
        return {"out_features", "out_channels", "num_attention_heads", "num_key_value_heads"}

    def sanitize_search_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """A complete copy of the settings; the given mapping stays as it is.

        Raises:
            DataError: ``data_loader`` or ``loss_func`` is missing, or ``forward_loop`` is given.
            PlanError: A setting is unknown or has a value that it cannot have.

        Warns:
            GradNASWarning: ``score_func`` is given: the score of this mode replaces it.
        """
        return sanitize(config or {}, self.default_search_config, self.gradnas_score_func)

    @staticmethod
    def gradnas_score_func(model: nn.Module) -> float:
        """Minus the degradation of a searched model at its active choices: 0 when it is whole.

        The degradation of an hparam is the sum of its pruned scores. Over hparams the reference
        takes the largest, although its text says the sum: ``reduce`` of the search decides.

        Raises:
            OrderError: The model was not converted.
        """
        space = needed_space(model)
        values = [h.degradation(h.active) for h in space.hparams.values()]
        return 0.0 - (max(values, default=0.0) if space.reduce == "max" else sum(values))

    def search(
        self,
        model: nn.Module,
        constraints: Mapping[str, Any],
        dummy_input: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Score, search and select; the model itself is not cut.

        Args:
            model: A converted model, or its distributed wrapper.
            constraints: Upper limits by cost, such as ``{"flops": "60%", "params": 5e6}``.
            dummy_input: Arguments of the forward that FLOPs are counted for, at its batch size: a
                tensor, a tuple, or a tuple that ends in a dict of keywords.
            config: See `default_search_config`.

        Returns:
            `best`: ``config`` (size per hparam name), ``constraints`` (cost per name), ``score``
            (`gradnas_score_func`) and ``metric`` (the same, under the reference's name).

        Raises:
            BudgetError: A constraint cannot be read or met.
            DataError: Batches, losses or the dummy input that the model cannot be scored with.
            OrderError: The model was not converted, or is cut already.
            StructureError: Nothing in the model can be searched.
        """
        self.config = self.sanitize_search_config(config)
        self.model: nn.Module = unwrap(model)
        if not isinstance(constraints, Mapping):
            raise BudgetError(
                f"constraints: found {constraints!r:.60}, needed a mapping from a cost to its "
                'limit, such as {"flops": "60%"}.'
            )
        self.constraints, self.dummy_input = dict(constraints), dummy_input
        self.history = {"threshold": [], "constraints": [], "satisfied": []}
        self.before_search()
        self.run_search()
        return self.best

    def before_search(self) -> None:
        """Find the hparams, check the constraints, and build the sensitivity map."""
        space = needed_space(self.model)
        if space.is_exported:
            raise OrderError(
                f"{type(self.model).__name__}: was searched and cut already; convert it again."
            )
        space.reduce = self.config["reduce"]
        if self.dummy_input is None:
            raise DataError(
                "dummy_input: found none, needed arguments of the forward to count FLOPs with; "
                "give a tensor, a tuple, or a tuple that ends in a dict of keywords."
            )
        if space.structure is None:
            check_parameters(self.model, "search")
            space.probe = probe_arguments(self.model, self.dummy_input)
            check_savable(self.model, space.probe)
            space.structure = self._find_structure(space.probe)
            space.hparams = make_hparams(self.model, space.structure, space.config)
        searched = self._searched()
        if not searched:
            raise StructureError(
                f"GradientBinarySearcher: no searchable hparams found in "
                f"{type(self.model).__name__}: all {len(space.hparams)} have one choice; give "
                "finer ratios or a smaller divisor in the mode's config."
            )
        self._check_constraints(searched)
        self._score(searched)
        self.sensitivity_map = {
            name: {choice: h.degradation(choice) for choice in h.choices}
            for name, h in searched.items()
        }
        self._keep(searched)

    def run_search(self) -> None:
        """Find the best choices and make them active."""
        choices = self._bisect() if self.config["reduce"] == "max" else self._least_sum()
        space = needed_space(self.model)
        for name, choice in choices.items():
            space.hparams[name].active = choice
        score = self.gradnas_score_func(self.model)
        self.best = {
            "config": {name: h.active for name, h in space.hparams.items()},
            "constraints": self._cost_of(choices),
            "score": score,
            "metric": score,
            "is_satisfied": True,
        }
        if self.config["verbose"]:
            self._show()

    def state_dict(self) -> dict[str, Any]:
        """What a search found: ``best``, ``sensitivity_map``, and ``history`` of its steps.

        ``original`` has the costs of the whole model.
        """
        return {
            "best": self.best,
            "original": self.original,
            "sensitivity_map": self.sensitivity_map,
            "history": self.history,
            "iter_num": len(self.history["threshold"]),
        }

    def _find_structure(self, probe: Mapping[str, Any]) -> Structure:
        """Proved axes; of a Transformers model those that it can be saved and loaded without."""
        structure = find_structure(self.model, probe)
        if not isinstance(self.model, PreTrainedModel):
            return structure
        stock = find_stock_space(self.model, structure)
        return rehearsed(self.model, structure, probe, lambda _: (stock, "per_layer", ""))[0]

    def _searched(self) -> dict[str, Hparam]:
        hparams, kinds = needed_space(self.model).hparams, self.hparam_names_for_search
        return {
            name: hparam
            for name, hparam in hparams.items()
            if len(hparam.choices) > 1 and name.rpartition(".")[2] in kinds
        }

    def _check_constraints(self, searched: Mapping[str, Hparam]) -> None:
        """Read the constraints, and check that each can be met, before any scoring."""
        space = needed_space(self.model)
        inputs = named_arguments(self.model, self.dummy_input)
        structure = space.needed_structure()
        self.prunable = counted(self.model, structure, inputs)
        self.original = dict(self.prunable.totals)
        self.budgets = parse_budgets(self.constraints, self.original, self.prunable.absent)
        least = self._cost_of({name: h.choices[0] for name, h in searched.items()})
        for budget in self.budgets:
            if least[budget.cost] > budget.limit:
                held = say_lowest(
                    self.prunable.costs[budget.cost], least[budget.cost], budget.total
                )
                raise BudgetError(
                    f"constraint {budget.cost}: {100 * budget.ratio:.4g}% "
                    f"({format_amount(budget.limit)}) cannot be met; the smallest choices "
                    f"everywhere reach {percent_up(least[budget.cost] / budget.total)}%. "
                    f"{f'{held} ' if held else ''}Raise it, "
                    "or allow smaller ratios or a smaller divisor in the mode's config."
                )
        warn_near_lowest(least, self.budgets)

    def _cost_of(self, choices: Mapping[str, int]) -> dict[str, float]:
        counts = needed_space(self.model).counts(choices)
        return {name: cost.of(counts) for name, cost in self.prunable.costs.items()}

    def _meets(self, choices: Mapping[str, int]) -> bool:
        costs = self._cost_of(choices)
        return all(costs[budget.cost] <= budget.limit for budget in self.budgets)

    def _score(self, searched: Mapping[str, Hparam]) -> None:
        """Give every hparam its scores in descending order, from the checkpoint if there is one."""
        config, file = self.config, self.config["checkpoint"]
        setups = self.SETUP_GRADIENT_FUNC
        scores = None if file is None else load_scores(file, self.model, searched, setups=setups)
        is_known = seen_by_all(scores is not None)  # every process asks, or they would wait
        if scores is None or not is_known:
            work = Pass(
                batches=config["data_loader"],
                loss_func=config["loss_func"],
                collect_func=config["collect_func"],
                max_iter=config["max_iter_data_loader"],
                average=config["average_scores"],
                tolerance=config["score_convergence_tol"],
                patience=config["score_convergence_patience"],
                min_updates=config["score_convergence_min_updates"],
                verbose=config["verbose"],
            )
            scores = measure_scores(self.model, searched, work, setups=setups)
        for name, hparam in searched.items():
            values = torch.from_numpy(np.asarray(scores[name], dtype=np.float64))
            ordered = values.sort(descending=True, stable=True)
            hparam.score_tensor = ordered.values
            hparam.order = tuple(ordered.indices.tolist())

    def _keep(self, searched: Mapping[str, Hparam]) -> None:
        """Write the checkpoint, on the main process."""
        file = self.config["checkpoint"]
        if file is None or not PartialState().is_main_process:
            return
        scores = {}
        for name, hparam in searched.items():
            scores[name] = np.empty(hparam.axis.size)
            scores[name][list(hparam.order)] = hparam.score_tensor
        text = json.dumps(self.sensitivity_map)
        save_scores(
            file,
            self.model,
            searched,
            scores,
            sensitivity=text,
            setups=self.SETUP_GRADIENT_FUNC,
        )

    def _bisect(self) -> dict[str, int]:
        """Choices at the smallest threshold that meets the constraints.

        The largest one does: there every hparam takes its smallest choice, which was checked.
        """
        thresholds = sorted(
            {v for values in self.sensitivity_map.values() for v in values.values()}
        )
        low, high = 0, len(thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            if self._try(thresholds[middle]):
                high = middle
            else:
                low = middle + 1
        return self._at(thresholds[high])

    def _at(self, threshold: float) -> dict[str, int]:
        """Smallest choice of every hparam whose degradation is at most the threshold."""
        return {
            name: min(choice for choice, value in values.items() if value <= threshold)
            for name, values in self.sensitivity_map.items()
        }

    def _try(self, threshold: float) -> bool:
        """Whether the choices at a threshold meet the constraints; noted in the history."""
        choices = self._at(threshold)
        is_satisfied = self._meets(choices)
        self.history["threshold"].append(threshold)
        self.history["constraints"].append(self._cost_of(choices))
        self.history["satisfied"].append(is_satisfied)
        return is_satisfied

    def _least_sum(self) -> dict[str, int]:
        """Choices with the least sum of degradations."""
        space, searched = needed_space(self.model), self._searched()
        axes = space.needed_structure().axes
        values = {axis.name: np.zeros(axis.size) for axis in axes}
        choices: dict[str, tuple[int, ...]]
        choices = {axis.name: (axis.size,) for axis in axes if axis.parent is None}
        for hparam in searched.values():
            values[hparam.axis.name][list(hparam.order)] = hparam.score_tensor
            choices[hparam.axis.name] = tuple(c // hparam.width for c in hparam.choices)
        plan = find_plan(self.prunable, Scores(values), self.budgets, choices=choices)
        return {n: len(plan.kept[h.axis.name]) * h.width for n, h in searched.items()}

    def _show(self) -> None:
        """Print what was found, on the main process."""
        space, table = needed_space(self.model), Table("hparam", "chosen", "of", "degradation")
        for name, h in space.hparams.items():
            table.add_row(name, str(h.active), str(h.max), f"{h.degradation(h.active):.3g}")
        costs = self.best["constraints"]
        table.caption = "\n".join(
            f"{b.cost}: {format_amount(costs[b.cost])} of {format_amount(b.total)} "
            f"({100 * costs[b.cost] / b.total:.2f} %)"
            for b in self.budgets
        )
        Console(stderr=True).print(table)
