"""One pruning run over one training: what is pruned so far, and what comes next.

Knows steps, stages and masks; the events are in `callback`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batches.longest import longest_of_all
from ..batches.steps import by_length
from ..checkpoint.folders import usable_target
from ..checkpoint.savable import check_savable
from ..errors import GradNASWarning, ScoresError
from ..pruner import GradNASPruner
from ..repair.repairs import Repair, install_repair, mended, swaps
from ..report import say_repair
from ..running.processes import Processes
from ..surgery.cut import check_plan
from ..types import Axis, Budget, Plan, Scores
from .latency import set_latency
from .resuming import Progress, forget_best, load_tensors, save_tensors
from .riding import SEEN, TrainingScores, check_ridable
from .scoring import (
    Batches,
    private_scores,
    training_scores,
    undisturbed,
    without_lost,
    without_zeros,
)
from .settings import Settings, Stage, budget_at, make_stages, with_labels
from .told import NAME, Clock, tell_result
from .weights import WeightMask, check_maskable, is_masked

logger = logging.getLogger(__name__)


class Run:
    """Prunes one model over one training.

    Args:
        settings: What is asked for.
        model: The unwrapped model, or one of sentence-transformers around it.
        batches: What to score with; can be read more than once.
        args: The trainer's arguments.
        target: Where the cut model is saved.

    Attributes:
        trained: The model as the trainer has it.
        model: The Transformers model.
        progress: What is pruned so far.
        scores: What the latest plan was made from.
    """

    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        batches: Batches,
        args: Any,
        target: Path,
    ) -> None:
        self.settings, self.trained = settings, model
        self.progress = Progress()
        self.scores: Scores | None = None
        self._args, self._batches, self._target = args, batches, target
        self._sorted = by_length(batches, settings.score, num_examples=settings.num_examples)
        self._processes = Processes(args.distributed_state)
        self._pruner = GradNASPruner(
            model,
            score=settings.score,
            search=settings.search,
            layout=settings.layout,
            rules=settings.rules,
            layers=settings.layers,
            accelerator=args.distributed_state,
        )
        self.model = self._pruner.model
        self._budgets: tuple[Budget, ...] = ()
        self._stages: tuple[Stage, ...] = ()
        self._riding: TrainingScores | None = None
        self._mask: WeightMask | None = None
        self._fading: WeightMask | None = None
        self._warned = False
        self.clock = Clock()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes of the whole model."""
        return tuple(self._pruner.structure.axes)

    @property
    def is_cut(self) -> bool:
        """Whether the model is cut."""
        return self.progress.is_cut

    # -- the beginning -----------------------------------------------------------------------

    def begin(self, state: Any, saved: Mapping[str, Any] | None, checkpoint: Path) -> None:
        """Find what can be pruned, check the budget, and go on from a checkpoint if there is one.

        Raises:
            BudgetError: The budget cannot be reached.
            DataError: There are no labels, or no data.
            StructureError: Nothing can be pruned, or not while training.
        """
        settings = self.settings
        batch = self._discover(resumes=saved is not None)
        if settings.when != "end":
            check_maskable(self.model, self._pruner.structure.axes, self._pruner.rules)
        if settings.when == "gradual":
            self._stages = make_stages(
                state.max_steps,
                schedule=settings.schedule,
                start_ratio=settings.start_ratio,
                end_ratio=settings.end_ratio,
                count=settings.stages,
            )
        if settings.scores_from == "training":
            self._ride(batch)
        if saved is not None:
            self._resume(saved, checkpoint)
        elif settings.when == "begin":
            self._score()
            plan, repair = self._mended(self._plan(1.0))
            if repair is not None:
                install_repair(self.model, repair)
            self._set(plan, is_final=True)
            forget_best(state)  # of a training without the callback

    def cut_at_once(self) -> None:
        """Score and cut before training."""
        self._discover(resumes=False)
        self._score()
        plan, repair = self._mended(self._plan(1.0))
        self.progress.plan, self.progress.is_final = plan, True
        self._cut(plan, repair)

    def _discover(self, *, resumes: bool) -> Mapping[str, Any]:
        """Find the axes with the longest of the batches, check the budget, and return the batch."""
        limit = self.settings.sample_size
        check_savable(self.model)  # a wrong head is told before labels that do not fit the config
        with self._undisturbed():
            batch = longest_of_all(self._batches, self.model, limit, self._processes)
            self.settings = with_labels(self.settings, self.model, batch)
            # An earlier run, or one that was broken off, may have left masks.
            with without_zeros(self.model) if is_masked(self.model) else nullcontext():
                self._pruner.discover(batch)
            more: dict[str, Any] = {"processes": self._processes, "target": self._target}
            set_latency(self._pruner, self.settings, batch, resumes=resumes, **more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._budgets = self._pruner.check(self.settings.budget)
        for warning in caught:  # it is near the lowest
            logger.warning("gradnas: %s", warning.message)
        return batch

    def _undisturbed(self) -> AbstractContextManager[None]:
        return undisturbed(self.model, self._args.seed, self._batches)

    def _ride(self, batch: Mapping[str, Any]) -> None:
        check_ridable(self._args)
        window = self.settings.num_examples
        with self._undisturbed():
            self._riding = TrainingScores(
                self.model,
                self._pruner.structure.axes,
                method=self.settings.riding_score,
                batch=batch,
                window=None if window is None else -(-window // self._processes.count),
            )

    def _resume(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Go on from what a checkpoint keeps."""
        progress = Progress.from_dict(saved)
        self.progress.stage, self.progress.run_id = progress.stage, progress.run_id
        self.progress.scores, self.progress.repair = progress.scores, progress.repair
        if progress.is_final:
            self._stages = ()  # also if this training is longer
        axes = self._pruner.structure.axes  # plans are checked before anything is changed
        plan, coming = (p and check_plan(axes, p) for p in (progress.plan, progress.coming))
        if plan is not None:
            self._set(plan, is_final=progress.is_final)
        if coming is not None:
            self._prepare(coming)
        if self._riding is None or not self._processes.is_main:  # it goes on with all sums
            return
        tensors = load_tensors(checkpoint, run_id=progress.run_id)
        if tensors is None:
            warnings.warn(
                f"{checkpoint}: holds no sums of scores of this run (the process was killed while "
                "it was written, or output_dir is another); scores of the training's passes begin "
                "anew.",
                GradNASWarning,
                stacklevel=2,
            )
        else:
            self._riding.load(tensors)

    # -- events ------------------------------------------------------------------------------

    def before_pass(self) -> None:
        """Measure the next forward, where scores come from the training."""
        if self._riding is not None and not self.progress.is_final:
            self._riding.arm()

    def after_pass(self) -> None:
        """Add what its backward gave."""
        if self._riding is not None:
            self._riding.collect()

    def mask_again(self) -> None:
        """Set masked units to zero, which the optimizer moved."""
        if self._mask is not None:
            self._mask.zero()

    def after_step(self, state: Any) -> None:
        """Fade, or end a stage, and begin the next."""
        step = state.global_step
        while self.progress.stage < len(self._stages):
            stage = self._stages[self.progress.stage]
            is_soft = self.settings.mask == "soft"
            if is_soft and step >= stage.begin and self.progress.coming is None:
                self._score()
                self._prepare(self._plan(stage.share))
            if is_soft and stage.begin < step < stage.step and self._fading is not None:
                self._fading.scale(stage.fade(step))
            if step < stage.step:
                break
            if not is_soft:
                self._score()
                self.progress.coming = self._plan(stage.share)
            self._end()
        self.forget_best(state)

    def forget_best(self, state: Any) -> None:
        """Forget which checkpoint is best while the budget is not met."""
        if self._stages and not self.progress.is_final:
            forget_best(state)

    def save(self, checkpoint: Path, *, writes: bool) -> None:
        """Write sums of scores, over all processes, beside a checkpoint."""
        if self._riding is None:
            return
        tensors = {name: tensor.cpu() for name, tensor in self._riding.tensors().items()}
        for name, tensor in tensors.items():
            if name != SEEN:
                tensors[name] = torch.from_numpy(self._processes.sum(tensor.double().numpy()))
        if not writes:
            return
        said = (
            f"{checkpoint}: found no such folder to save sums of scores in (a hyperparameter "
            "search has one for each trial, which only hp_name=… tells the callback)."
        )
        if checkpoint.is_dir():
            try:
                save_tensors(checkpoint, tensors, run_id=self.progress.run_id)
            except ScoresError as error:
                said = str(error)
            else:
                return
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{said} A training that goes on from this checkpoint sums them up anew.",
                GradNASWarning,
                stacklevel=2,
            )

    def release(self) -> None:
        """Take every hook off the model."""
        if self._riding is not None:
            self._riding.release()

    def logs(self) -> dict[str, float]:
        """What is kept now, as shares of the whole model's costs."""
        totals, plan = self._pruner.totals, self.progress.plan
        costs = totals if plan is None else plan.costs
        values = {f"{NAME}/kept_{n}": costs[n] / totals[n] for n in totals if n in costs}
        if self.settings.when == "gradual":
            values[f"{NAME}/stage"] = float(self.progress.stage)
        return values

    def tell(self, folder: Path) -> None:
        """Say what is left, where it is and how long pruning took, by the main process."""
        if self.progress.plan is not None and self._processes.is_main:
            tell_result(self.progress.plan, self._pruner.totals, folder, self.clock)

    # -- the end -----------------------------------------------------------------------------

    def finish(self, state: Any) -> None:
        """Cut the model to the budget; score it first where it is not masked to it.

        Raises:
            StructureError: It could not be saved any more; it is whole then.
        """
        self.release()
        check_savable(self.model)
        plan, repair = self.progress.plan, None
        if plan is None or not self.progress.is_final:
            if self._stages:
                warnings.warn(
                    f"Training ended at step {state.global_step}, before the last stage "
                    f"(step {self._stages[-1].step}): the model is cut to its budget now, and not "
                    "trained after it.",
                    GradNASWarning,
                    stacklevel=2,
                )
            self._score()
            plan, repair = self._mended(self._plan(1.0))
            self._set(plan, is_final=True)
        self._cut(plan, repair)

    def write(self, target: Path, processing_class: Any) -> Path:
        """Save the cut model, and return where; all processes wait for the main one."""
        told = self.progress
        document = {"scores": dict(told.scores), "callback": self.settings.to_dict()}
        document |= {"repair": dict(told.repair)} if told.repair else {}
        find = partial(usable_target, overwrite=True, source=self._pruner.model.name_or_path)
        target = self._processes.from_main(partial(find, target))
        save = self._pruner.save_pretrained
        return save(target, processing_class, overwrite=True, document=document)

    def _cut(self, plan: Plan, repair: Repair | None) -> None:
        self.release()
        self._pruner.apply(plan, repair)
        self.progress.is_cut = True
        self._mask, self._fading, self._riding = None, None, None
        self._batches = self._sorted = ()

    # -- parts -------------------------------------------------------------------------------

    def _score(self) -> None:
        """Measure what every unit is worth now."""
        settings = self.settings
        if self._riding is not None:
            scores = training_scores(self._pruner, self._riding, self._processes)
        else:
            with self._undisturbed():
                more = {"num_examples": settings.num_examples, "labels": settings.labels}
                scores = private_scores(self._pruner, self._sorted, seed=self._args.seed, **more)
        self.scores = without_lost(scores, self._pruner, self.progress.kept)
        self.progress.scores = self.scores.metadata
        self._pruner.use_scores(self.scores)

    def _mended(self, plan: Plan) -> tuple[Plan, Repair | None]:
        """A plan and its repair; as it is where it trained masked."""
        if self.settings.repair == "none" or self.settings.when == "gradual":
            return plan, None
        pruner, limit = self._pruner, self.settings.sample_size
        batches = by_length(self._batches, num_examples=limit)
        swap = pruner.swap if swaps(self.settings.repair, pruner.scores) else None
        given = swap, pruner.repair, self._processes
        with self._undisturbed():
            plan, found = mended(plan, batches, *given, num_examples=limit)
        if found is not None:
            self.progress.repair = record = found.record()
            logger.info("gradnas: %s", say_repair(record))
        return plan, found

    def _plan(self, share: float) -> Plan:
        """Plan for the budget, or on the way to it."""
        budget = self.settings.budget if share >= 1 else budget_at(self._budgets, share)
        with warnings.catch_warnings():  # near the lowest: a stage on the way is not asked for
            warnings.simplefilter("ignore", GradNASWarning)
            plan = self._pruner.plan(budget)
        if self.scores is not None and plan.score in self.scores.methods:
            self.progress.scores = self.scores.of(plan.score).metadata
        return plan

    def _prepare(self, plan: Plan) -> None:
        """Let the units that a plan prunes fade from now on."""
        self.progress.coming = plan
        self._fading = WeightMask(self.model, self._pruner.structure.axes, plan.kept, whole=False)

    def _end(self) -> None:
        """Mask what the stage prunes."""
        plan, self.progress.coming, self._fading = self.progress.coming, None, None
        self.progress.stage += 1
        if plan is not None:
            self._set(plan, is_final=self.progress.stage == len(self._stages))
            logger.info("gradnas: stage %d, kept %s", self.progress.stage, self.logs())

    def _set(self, plan: Plan, *, is_final: bool) -> None:
        """Mask the units that a plan prunes; for good, if it is the final one."""
        self.progress.plan, self.progress.is_final = plan, is_final
        if self.settings.when != "end":
            axes = self._pruner.structure.axes
            self._mask = WeightMask(self.model, axes, plan.kept, whole=is_final)
            self._mask.zero()
