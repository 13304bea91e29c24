"""The prune command: check, score, plan, cut, save, and say what happened."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.defaults import AUTO
from ..config.recipe import QUICKSTART, Recipe
from ..config.recipe_building import build_recipe
from ..config.recipe_saving import shareable, to_yaml
from ..errors import GradNASError
from .doubts import doubts
from .early import check_early, model_folder
from .records import record
from .show import (
    Screen,
    quiet_libraries,
    show_costs,
    show_latency,
    show_metrics,
    show_plan,
    show_structure,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from ..pruner import GradNASPruner
    from ..repair import Repair
    from ..running.processes import Processes
    from ..types import Plan
    from .evaluate import Metrics
    from .measuring import Batches
    from .preparation import Job

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def prune_from_options(
    flags: Mapping[str, Any], *, settings: Iterable[str] = (), file: str | None = None
) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.
        settings: ``KEY=VALUE`` strings of ``--set``.
        file: Recipe file or name of a shipped recipe.

    Returns:
        0 done, 1 pruning or verification failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    from .launch import is_main, launched

    screen = Screen(quiet=not is_main())
    run: _Run | None = None
    try:
        recipe = build_recipe(flags, settings=settings, file=file)
        given = frozenset(recipe.model_fields_set)
        recipe = check_early(recipe, given=given)
        with launched(recipe) as (own, processes), quiet_libraries(screen):
            run = _Run(own, screen, processes, given=given)
            run.execute()
    except KeyboardInterrupt:
        screen.error(run.interruption() if run else "interrupted; nothing was written.")
        return INTERRUPTED
    except SystemExit as stop:  # SIGTERM while scoring
        screen.error(run.interruption() if run else "terminated; nothing was written.")
        return stop.code if isinstance(stop.code, int) else FAILED
    except GradNASError as error:
        say(screen, run.processes if run else None, str(error))
        return FAILED if run is not None and run.cutting else BAD_INPUT
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(
            screen,
            run.processes if run else None,
            f"out of memory ({error}); give a smaller --batch-size or --max-length.",
        )
        return FAILED
    return DONE


def run_prune(
    recipe: Recipe,
    screen: Screen,
    processes: Processes,
    *,
    given: frozenset[str],
    subset: int | None = None,
) -> None:
    """All steps of one prune, of a recipe that was checked.

    Args:
        recipe: As `check_early` leaves one.
        screen: Where to.
        processes: All that work together.
        given: Names of the options that were given.
        subset: Seed of the examples that calibrate, drawn as a sweep draws them; None: the first.

    Raises:
        GradNASError: One of the steps failed.
    """
    run = _Run(recipe, screen, processes, given=given)
    run.subset = subset
    run.execute()


def say(screen: Screen, processes: Processes | None, message: str) -> None:
    """An error: once, by the main process, unless only another one knows of it."""
    if processes is not None and not processes.is_main and not processes.have_failed:
        screen = Screen()
        message = f"process {processes.index}: {message}"
    screen.error(message)


class _Run:
    """State of one run: the recipe with its defaults filled in, and how far it came."""

    def __init__(
        self, recipe: Recipe, screen: Screen, processes: Processes, *, given: frozenset[str]
    ) -> None:
        self.recipe = recipe
        self.given = given
        self.screen = screen
        self.processes = processes
        self.cutting = False
        self.scoring = False
        self.started = time.monotonic()
        self.is_quickstart = False
        self.repository: str | None = None
        self.private = False
        self.batch: Mapping[str, Any] = {}
        self.length: int | None = None
        self.subset: int | None = None

    def execute(self) -> None:
        """All steps in order."""
        from .opening import open_model
        from .preparation import prepare, with_subset
        from .publish import push_settings
        from .repairing import mend
        from .show import show_settings

        self._check_push()
        folder = self._model_folder()
        opened = partial(prepare, self.recipe, folder=folder, given=self.given)
        job = self.processes.main_first(opened)
        if self.subset is not None:
            job = self.processes.main_first(partial(with_subset, job, self.subset))
        self.recipe = job.recipe
        show_settings(
            self.screen, [*job.settings, *push_settings(self.repository, private=self.private)]
        )
        for note in job.notes:
            self.screen.line(f"Note: {note}.")
        for warning in job.warnings:
            self.screen.warn(warning)
        load = partial(open_model, self.recipe, job, self.screen)
        model, loader, evaluation = self.processes.main_first(load)
        pruner = self._discover(model, loader, job)
        before = self._evaluate(model, evaluation, job, "Evaluating the original")
        if before is not None:
            for doubt in doubts(before, job.source.task.head, model.config):
                self.screen.warn(doubt)
        plan = self._plan(pruner, loader, job)
        own, processes = self.screen, self.processes
        plan, repair = mend(pruner, plan, loader, self.recipe, screen=own, processes=processes)
        self.cutting = True
        if self.recipe.dry_run:
            self._finish_dry_run(pruner, plan, repair, evaluation, job, before)
        else:
            self._cut_and_save(pruner, plan, repair, evaluation, job, before)
        self.screen.line(f"Done in {time.monotonic() - self.started:.1f} s.")

    def interruption(self) -> str:
        """What an interrupted run leaves behind."""
        scores = Path(self.recipe.save_scores or "")
        if self.scoring and scores.is_file():
            return (
                f"interrupted; the scores so far are in {scores}, and the same command goes on "
                "from there."
            )
        if self.cutting:
            return f"interrupted; {self.recipe.output} is as it was, complete or absent."
        return "interrupted; no model was written."

    # -- steps -------------------------------------------------------------------------------

    def _check_push(self) -> None:
        """Check that the result can be pushed, before all work.

        The recipe then forgets where to: who runs the saved one again does not mean to publish.
        """
        asked, self.private = self.recipe.push_to_hub, self.recipe.private
        self.recipe = self.recipe.model_copy(update={"push_to_hub": None, "private": False})
        if asked is not None and not self.recipe.dry_run:
            from ..hub import check_access

            check = partial(check_access, asked, private=self.private or None)
            self.repository = self.processes.from_main(check)
            self.screen.line(f"The result will be pushed to {self.repository}.")

    def _push(self, output: str) -> None:
        from .publish import push_on

        if self.repository is not None:
            push = partial(push_on, self.screen, output, self.repository, private=self.private)
            self.screen.line(f"Pushed: {self.processes.from_main(push)}")

    def _model_folder(self) -> str:
        """Where the model is; trains the quickstart model first if that was asked for."""
        from .quickstart import Training, make_quickstart

        if self.recipe.model != QUICKSTART:
            return model_folder(self.recipe.model)
        self.is_quickstart = True
        folder = Path(f"{self.recipe.output}.quickstart")
        training = Training(seed=self.recipe.seed)
        self.screen.line(f"Quickstart: training a small Llama into {folder} (about a minute).")
        with self.screen.progress("Training") as report:
            make = partial(make_quickstart, folder, training, progress=report)
            made = self.processes.from_main(make)
        self.screen.line(
            f"Perplexity of the held-out text by token frequencies: {made.unigram_perplexity:.1f}."
        )
        own = {"dataset": str(made.train), "eval_dataset": str(made.held_out)}
        own = {name: value for name, value in own.items() if name not in self.given}
        self.recipe = self.recipe.model_copy(update=own)
        return str(made.model)

    def _discover(self, model: PreTrainedModel, loader: DataLoader[Any], job: Job) -> GradNASPruner:
        from .opening import flops_length_of, make_pruner

        pruner = make_pruner(model, self.recipe, job, self.processes)
        self.batch, self.length = next(iter(loader)), flops_length_of(job)
        pruner.discover(self.batch, flops_length=self.length)
        if job.scores is not None:
            pruner.use_scores(job.scores)
        pruner.check(self.recipe.target)
        show_structure(self.screen, pruner.structure, pruner.layout, pruner.layout_reason)
        return pruner

    def _evaluate(
        self, model: PreTrainedModel, batches: Batches | None, job: Job, what: str
    ) -> Metrics | None:
        from .measuring import measure

        head = job.source.task.head
        with self.processes.joint():
            return measure(model, batches, job.evaluation, head, self.screen, what)

    def _show(self, columns: Mapping[str, Metrics], job: Job, plan: Plan) -> None:
        """Metrics of all states, and a warning where the last one lost much."""
        from .measuring import warn_of_loss

        show_metrics(self.screen, columns, str(job.evaluation))
        before, recovered = columns["before"], columns.get("recovered")
        after = recovered or columns.get("after") or columns["after (masked)"]
        is_recovered = recovered is not None
        warn_of_loss(self.screen, before, after, plan.budgets, recovered=is_recovered)

    def _plan(self, pruner: GradNASPruner, loader: DataLoader[Any], job: Job) -> Plan:
        from ..batches.ordering import by_length
        from ..repair.choice import say_tried

        if job.scores is None:
            began = time.monotonic()
            self.scoring = True
            with self.screen.progress("Scoring") as report:
                pruner.score(
                    by_length(loader, self.recipe.score),
                    labels=job.labels,
                    num_examples=len(job.calibration),
                    file=self.recipe.save_scores,
                    progress=report,
                    seed=self.recipe.seed,
                )
            self.scoring = False
            self.screen.line(
                f"Scored {len(job.calibration)} examples in {time.monotonic() - began:.1f} s; "
                f"scores: {self.recipe.save_scores}"
            )
        plan = pruner.plan(self.recipe.target)
        if self.recipe.score == AUTO:
            self.screen.line(say_tried(plan))
        show_plan(self.screen, plan, pruner.structure)
        show_costs(self.screen, plan, pruner.totals, pruner.costs)
        return plan

    def _finish_dry_run(
        self,
        pruner: GradNASPruner,
        plan: Plan,
        repair: Repair | None,
        evaluation: Batches | None,
        job: Job,
        before: Metrics | None,
    ) -> None:
        if before is not None:
            with pruner.masked(plan, repair):
                after = self._evaluate(pruner.model, evaluation, job, "Evaluating the plan")
            if after is not None:
                self._show({"before": before, "after (masked)": after}, job, plan)
        self.screen.line("Dry run: no model was cut or written.")

    def _cut_and_save(
        self,
        pruner: GradNASPruner,
        plan: Plan,
        repair: Repair | None,
        evaluation: Batches | None,
        job: Job,
        before: Metrics | None,
    ) -> None:
        from ..checkpoint.companions import loader_of
        from ..checkpoint.save import loading_snippet
        from ..costs.latency import Timing
        from .repairing import recover_model

        timing = Timing(self.batch, self.length, self.processes, is_on=self.recipe.report)
        timing.begin(pruner.model)
        model = pruner.apply(plan, repair)
        after = self._evaluate(model, evaluation, job, "Evaluating the pruned model")
        columns = {"before": before, "after": after}
        document = record(self.recipe, job, self.given)
        latency = timing.end(model)
        if latency is not None:
            show_latency(self.screen, latency)
            document["latency"] = latency
        if job.recovery is not None:
            document["recovery"] = recover_model(model, self.recipe, job, screen=self.screen)
            columns["recovered"] = self._evaluate(
                model, evaluation, job, "Evaluating the recovered model"
            )
        measured = {name: found for name, found in columns.items() if found is not None}
        if measured:
            document["metrics"] = {name: found.to_dict() for name, found in measured.items()}
        place = partial(self._place, str(self.recipe.output), model.name_or_path)
        output = str(self.processes.from_main(place))
        pruner.save_pretrained(
            output,
            job.source.processor,
            overwrite=self.recipe.overwrite,
            document=document,
            files={"recipe.yaml": to_yaml(shareable(self.recipe))},
            report=self.recipe.report,
        )
        if measured:
            if self.is_quickstart:
                again = self._reload(output, evaluation, job)
                if again is not None:
                    measured["reloaded"] = again
            self._show(measured, job, plan)
        self.screen.line(f"Saved: {output}")
        self.screen.line("Load it with:")
        loader = loader_of(Path(output))
        for line in loading_snippet(model, plan.layout, output, loader).splitlines():
            self.screen.line(f"    {line}")
        self._push(output)

    def _place(self, output: str, source: str) -> Path | str:
        """The output folder; one beside it where the output was taken by others in the meantime."""
        from ..checkpoint.targets import target_of, usable_target

        found = usable_target(output, overwrite=self.recipe.overwrite, source=source)
        return output if found == target_of(output) else found

    def _reload(self, output: str, evaluation: Batches | None, job: Job) -> Metrics | None:
        from ..data.loading import load_model, open_source

        source = open_source(self.recipe.model_copy(update={"task": None}), output)
        model, _ = load_model(self.recipe, source, output)
        return self._evaluate(model, evaluation, job, "Evaluating the reloaded model")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)
