"""What a user asks the callback for, checked before the first step; and the stages of a run."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.training_args import ParallelMode

from ..batches.batch import read_batches
from ..batches.steps import is_none_or_positive
from ..config.defaults import AUTO, CANDIDATES, DEFAULT_SCORE
from ..config.limits import parse_budgets, parse_rules
from ..config.recipe import Recipe
from ..costs.measured import PHASES
from ..errors import DataError, OrderError, PlanError, check_choice
from ..repair.repairs import CHOICES as REPAIRS
from ..scores import METHODS
from ..scores.methods import GRADIENT_METHODS
from ..scores.normaliser import own_loss
from ..search.solver import STRATEGIES
from ..stock.layouts import LAYOUTS
from ..types import COSTS, LATENCY, Budget, LatencyTable, is_integer

logger = logging.getLogger(__name__)

WHENS = ("end", "begin", "gradual")
SOURCES = ("private", "training")
MASKS = ("soft", "hard")
LABELS = ("auto", "data", "model")
DISCOVERED = 512  # examples among which the longest is looked for, where all are scored in training


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of `GradNASCallback` that JSON can hold; see there."""

    budget: Mapping[str, Any]
    when: str = "end"
    score: str = DEFAULT_SCORE
    search: str = "lagrangian"
    layout: str = "auto"
    rules: Mapping[str, Any] | None = None
    layers: bool = False
    num_examples: int | None = 512
    labels: str = "auto"
    schedule: str = "cubic"
    start_ratio: float = 0.1
    end_ratio: float = 0.7
    stages: int = 10
    mask: str = "soft"
    scores_from: str = "private"
    repair: str = "auto"
    output_dir: str | None = None
    latency_table: str | None = None
    latency_batch_size: int = 1
    latency_phase: str = "prefill"

    def __post_init__(self) -> None:
        check_choice("when", self.when, WHENS)
        check_choice("score", self.score, (AUTO, *METHODS))
        check_choice("search", self.search, STRATEGIES)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("labels", self.labels, LABELS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("mask", self.mask, MASKS)
        check_choice("scores_from", self.scores_from, SOURCES)
        check_choice("repair", self.repair, REPAIRS)
        parse_rules(self.rules)
        parse_budgets(self.budget, dict.fromkeys(COSTS, math.inf))
        self._check_latency()
        if not isinstance(self.layers, bool):
            raise PlanError(f"layers={self.layers!r}: needed is True or False.")
        if not is_none_or_positive(self.num_examples):
            raise PlanError(
                f"num_examples={self.num_examples!r}: needed is 1 or more, or None for all of the "
                "data."
            )
        ratios = (self.start_ratio, self.end_ratio)
        are_numbers = all(type(r) in (int, float) for r in ratios)
        if not are_numbers or not 0 <= self.start_ratio < self.end_ratio <= 1:
            raise PlanError(
                f"start_ratio={self.start_ratio!r}, end_ratio={self.end_ratio!r}: needed are "
                "shares of the training's steps with 0 <= start_ratio < end_ratio <= 1."
            )
        if not is_integer(self.stages) or self.stages < 1:
            raise PlanError(f"stages={self.stages!r}: needed is 1 or more.")
        if self.scores_from == "training":
            self._check_training()

    def _check_latency(self) -> None:
        defaults = {"latency_table": None, "latency_batch_size": 1, "latency_phase": "prefill"}
        given = [name for name, value in defaults.items() if getattr(self, name) != value]
        if given and LATENCY not in self.budget:
            raise PlanError(
                f"{given[0]}: has no effect, as no budget is in milliseconds; give "
                '{"latency_ms": …}, or omit it.'
            )
        if len(given) > 1 and self.latency_table is not None:
            raise PlanError(
                f"{given[1]}: has no effect, as latency_table says for what it was measured; omit "
                "one of the two."
            )
        check_choice("latency_phase", self.latency_phase, PHASES)
        if not is_integer(self.latency_batch_size) or self.latency_batch_size < 1:
            raise PlanError(f"latency_batch_size={self.latency_batch_size!r}: needed is 1 or more.")
        if self.latency_table is not None:
            LatencyTable.load(Path(self.latency_table).expanduser())

    def _check_training(self) -> None:
        if self.when == "begin":
            raise PlanError(
                "scores_from='training' with when='begin': there is no training before the "
                "beginning; use scores_from='private', or another when."
            )
        if self.score not in (AUTO, *GRADIENT_METHODS) or self.labels == "model":
            raise PlanError(
                f"scores_from='training' with score={self.score!r}, labels={self.labels!r}: the "
                "training's passes have gradients of the data's labels, which give "
                f"{', '.join(GRADIENT_METHODS)}; choose one, or scores_from='private'."
            )

    @property
    def riding_score(self) -> str:
        """The score of the training's own passes, of which no rows are held out to choose on."""
        return CANDIDATES[0] if self.score == AUTO else self.score

    @property
    def needs_labels(self) -> bool:
        """Whether scores come from the gradients of a loss with the data's labels."""
        return self.score in (AUTO, *GRADIENT_METHODS) and self.labels == "data"

    @property
    def sample_size(self) -> int | None:
        """Examples that are read besides the training, at most; None: all of the data."""
        is_read_once = self.scores_from == "private"
        return self.num_examples or (None if is_read_once else DISCOVERED)

    def to_dict(self) -> dict[str, Any]:
        """Arguments that make these settings again, ready for JSON."""
        rules = {
            glob: None if rule is None else rule.model_dump()
            for glob, rule in parse_rules(self.rules).items()
        }
        return {**asdict(self), "rules": None if self.rules is None else rules}


def arguments_of(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the callback that a recipe has."""
    options: dict[str, Any] = {
        "budget": recipe.target,
        "score": recipe.score,
        "search": recipe.search,
        "layout": recipe.layout,
        "repair": recipe.repair,
        "rules": recipe.rules() or None,
        "layers": "layers" in recipe.axes,
        "num_examples": recipe.num_examples,
        "labels": recipe.labels or "auto",
        "latency_table": recipe.latency_table,
        "latency_batch_size": recipe.latency_batch_size,
        "latency_phase": recipe.latency_phase,
    }
    return options | ({} if recipe.training is None else recipe.training.model_dump())


# --- what is refused before the first step --------------------------------------------------------


# Which callback prunes a model, and in the training of which state.
_PRUNES: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], weakref.ref[Any]]]
_PRUNES = weakref.WeakKeyDictionary()


def check_whole(args: Any) -> None:
    """Check that every process holds all weights.

    Raises:
        PlanError: They are sharded.
    """
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name)]
    if sharded:
        raise PlanError(
            f"{sharded[0]}: GradNASCallback reads and cuts weights in place, which are sharded "
            "here; train without the callback, and prune what was saved with GradNASPruner."
        )


def with_labels(settings: Settings, model: nn.Module, batch: Mapping[str, Any]) -> Settings:
    """Settings whose labels are those of the data, or where it has none the model's own, said so.

    Preference trainers (DPO) compute their loss without labels.

    Args:
        settings: What is asked for.
        model: The Transformers model.
        batch: Of what is scored with.

    Raises:
        DataError: There are no labels, and the model's own are not asked for or cannot be taken.
    """
    if settings.score not in (AUTO, *GRADIENT_METHODS):
        return settings if settings.labels != "auto" else replace(settings, labels="data")
    if settings.labels == "model":
        return settings
    found = next(read_batches([batch], model, None))
    if found.labels or own_loss(model, found):
        return replace(settings, labels="data")
    missing = f"found no labels among {', '.join(sorted(found.columns))} in what is scored with"
    if settings.scores_from == "training":
        raise DataError(
            f"scores_from='training': {missing}, so that the trainer's loss is not the model's "
            "own; use scores_from='private'."
        )
    if settings.labels == "data":
        raise DataError(
            f"labels='data': {missing}; give the labels that {type(model).__name__} takes, in "
            "dataloader=… if the training computes its loss without them, or use labels='model'."
        )
    logger.warning(
        "gradnas: %s: they are drawn from the predictions of the model (labels='model'); give "
        "dataloader=… of batches with labels to score with those.",
        missing,
    )
    return replace(settings, labels="model")


def check_sentence_settings(settings: Settings, body: nn.Module, owner: nn.Module) -> None:
    """Check that scores do not need the loss with which sentence-transformers trains.

    Raises:
        PlanError: They do: a module of that library computes it from the embeddings of several
            texts, and the Transformers model in it knows nothing of it.
    """
    names = f"{type(owner).__name__} around a {type(body).__name__}"
    if settings.scores_from == "training":
        raise PlanError(
            f"scores_from='training': the trainer trains a {names}, whose loss is not the model's "
            "own; use scores_from='private' with labels='model'."
        )
    if settings.needs_labels:
        raise PlanError(
            f"labels='data': the trainer trains a {names}, whose loss is not the model's own; use "
            f"labels='model', or give dataloader=… of batches with the labels of the "
            f"{type(body).__name__}."
        )


def check_only_one(callback: Any, model: nn.Module, state: Any) -> None:
    """Check that one callback prunes a model in one training.

    Raises:
        OrderError: Another one does.
    """
    if model in _PRUNES:
        training, other = (reference() for reference in _PRUNES[model])
        if training is state and other is not callback:
            raise OrderError(
                f"train: found two {type(callback).__name__}s on one trainer, needed is one, since "
                "each counts the units of the whole model; remove one of them."
            )
    _PRUNES[model] = weakref.ref(state), weakref.ref(callback)


def check_unwrapped(args: Any) -> None:
    """Check that a trainer, which is not known, can train a cut model.

    Raises:
        OrderError: It wraps the whole one for several processes.
    """
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise OrderError(
            "train: the model was cut, but the trainer still wraps the whole one for several "
            "processes; call callback.attach(trainer) before the first train()."
        )


# --- how the pruned share grows over a run --------------------------------------------------------


def _cubic(progress: float) -> float:
    """Share of the final sparsity, ``1 - (1 - p)³`` (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""
    return 1 - (1 - progress) ** 3


def _linear(progress: float) -> float:
    return progress


SCHEDULES: dict[str, Callable[[float], float]] = {"cubic": _cubic, "linear": _linear}


@dataclass(frozen=True, slots=True)
class Stage:
    """One rise of the sparsity.

    Attributes:
        begin: Step after which units of this stage start to fade.
        step: Step after which they are gone.
        share: What is pruned then, as a share of what is pruned in the end.
    """

    begin: int
    step: int
    share: float

    def fade(self, step: int) -> float:
        """Factor that takes a weight from its value after the step before to that after `step`.

        The product over all steps of the stage goes down from 1 to 0 linearly.
        """
        return (self.step - step) / (self.step - step + 1)


def make_stages(
    max_steps: int, *, schedule: str, start_ratio: float, end_ratio: float, count: int
) -> tuple[Stage, ...]:
    """Stages at even distances between two points of a run; the last one has share 1.

    A run with fewer steps than stages has fewer stages; there is always one.
    """
    start, end = start_ratio * max_steps, end_ratio * max_steps
    shares: dict[int, float] = {}
    for number in range(1, count + 1):
        step = max(1, round(start + (end - start) * number / count))
        shares[step] = SCHEDULES[schedule](number / count)
    begins = [min(round(start), min(shares) - 1), *shares]
    steps = zip(begins, shares.items(), strict=False)
    return tuple(Stage(begin, step, share) for begin, (step, share) in steps)


def budget_at(budgets: Sequence[Budget], share: float) -> dict[str, float]:
    """Limit per cost when that share of what is to go in the end is gone."""
    return {b.cost: b.total - share * (b.total - b.limit) for b in budgets}
