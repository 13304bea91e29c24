"""The whole of one prune, from a recipe to a folder that `from_pretrained` loads.

`Run.execute` is the journey; each step below it is one verb of a lower room. Knows no screen: what
happens is told to a `Report`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batches.steps import by_length
from .checkpoint.folders import target_of, usable_target
from .config.defaults import AUTO
from .config.recipe import QUICKSTART, Recipe
from .config.recipe_files import shareable, to_yaml
from .costs.latency import Timing
from .data.loading import load_model, open_source
from .errors import RepairError
from .hub import check_access, push
from .jobs.early import check_early, model_folder, repair_file
from .jobs.latency import set_latency
from .jobs.measuring import doubts, measure
from .jobs.preparation import (
    Job,
    flops_length_of,
    make_pruner,
    open_model,
    prepare,
    recover_model,
    with_subset,
)
from .jobs.quickstart import Training, make_quickstart
from .jobs.report import Report, push_settings, record
from .jobs.telling import tell_metrics, tell_outcome, tell_place
from .planning import stock_instead
from .repair.closeness import say_tried
from .repair.repairs import mended, swaps
from .report import say_repair, say_stock, say_swap
from .running.freed import give_back
from .running.processes import Processes
from .running.wrappers import check_parameters

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from .jobs.measuring import Batches, Metrics
    from .pruner import GradNASPruner
    from .repair import Repair
    from .types import Plan


def run(recipe: Recipe, report: Report | None = None) -> Path | None:
    """Prune as a recipe says, in this process; what ``hf-gradnas prune`` does without its screen.

    Args:
        recipe: Such as ``Recipe(model="bert-base-uncased", target={"flops": "60%"})``.
        report: Told what happens; None: nobody.

    Returns:
        The folder of the pruned model; None after a dry run.

    Raises:
        GradNASError: One of the steps failed. Nothing half-written is left.
    """
    given = frozenset(recipe.model_fields_set)
    checked = check_early(recipe, given=given)
    return Run(checked, report or Report(), Processes(), given=given).execute()


class Run:
    """One run: the recipe with its defaults filled in, and how far it came.

    Args:
        recipe: As `jobs.early.check_early` leaves one.
        report: Told what happens.
        processes: All that work together.
        given: Names of the options that were given; the others are defaults.
        subset: Seed of the examples that calibrate, drawn as a sweep draws them; None: the first.
    """

    UNREAD: frozenset[str] = frozenset()
    """Options that are not shown, since no step reads them."""
    NOTHING = "no model was written"
    """What an interruption says where there is no result yet."""

    def __init__(
        self,
        recipe: Recipe,
        report: Report,
        processes: Processes,
        *,
        given: frozenset[str],
        subset: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.report = report
        self.processes = processes
        self.given = given
        self.subset = subset
        self.has_scores = False
        self.cutting = False
        self.repository: str | None = None
        self.private = False

    def execute(self) -> Path | None:
        """All steps in order; the folder that was written, or None after a dry run.

        Raises:
            GradNASError: One of the steps failed.
        """
        self._began = began = time.monotonic()
        self._instead: dict[str, float] = {}
        self._check_push()
        # What needs no weights: config, processor, data, and every default.
        job = self._prepare(self._folder())
        # The weights, and batches of examples in file order: dicts for model(**batch).
        load = partial(open_model, self.recipe, job, self.report)
        model, loader, evaluation = self.processes.main_first(load)
        check_parameters(model, "prune", shards=True)
        # Structure: axes of units, each proved; the rest refused by name. A budget that cannot be
        # reached fails here.
        pruner = self._discover(model, loader, job)
        set_latency(pruner, self.recipe, self._batch, length=self._length, report=self.report)
        pruner.check(self.recipe.target)
        self.report.structure(pruner.structure, pruner.layout, pruner.layout_reason)
        before = self._evaluate(model, evaluation, job, "Evaluating the original")
        if before is not None:
            for doubt in doubts(before, job.source.task.head, model.config):
                self.report.warn(doubt)
        # Scores: one number per unit. A plan: for every axis the sorted units that stay.
        self._score(pruner, loader, job)
        plan = self._plan(pruner)
        # Repair: new weights for what stays, found before the cut.
        plan, repair = self._repair(pruner, plan, loader)
        self.cutting = True
        if self.recipe.dry_run:
            found = self._measure_masked(pruner, plan, repair, evaluation, job, before)
            output = None
        else:
            # Cut, prove, measure, train if asked for, save, load back.
            output, found = self._cut_and_save(pruner, plan, repair, evaluation, job, before)
        self.report.line(f"Done in {time.monotonic() - began:.1f} s.")
        tell_outcome(self.report, pruner, plan, found, output)
        return output

    def interruption(self) -> str:
        """What an interrupted run leaves behind."""
        scores, output = Path(self.recipe.save_scores or ""), self.recipe.output
        is_there = self.cutting and Path(str(output)).is_dir()
        left = f"{output} is whole" if is_there else self.NOTHING
        if self.has_scores and scores.is_file():
            left += f"; the scores so far are in {scores}, and the same command goes on from there"
        return f"interrupted; {left}."

    # -- before the model is loaded ---------------------------------------------------------------

    def _check_push(self) -> None:
        """Check that the result can be pushed, before all work.

        The recipe then forgets where to: who runs the saved one again does not mean to publish.
        """
        asked, self.private = self.recipe.push_to_hub, self.recipe.private
        self.recipe = self.recipe.model_copy(update={"push_to_hub": None, "private": False})
        if asked is not None and not self.recipe.dry_run:
            check = partial(check_access, asked, private=self.private or None)
            self.repository = self.processes.from_main(check)
            self.report.line(f"The result will be pushed to {self.repository}.")

    def _folder(self) -> str:
        """Where the model is; trains the quickstart model first if that was asked for."""
        if self.recipe.model != QUICKSTART:
            return model_folder(self.recipe.model)
        folder = Path(f"{self.recipe.output}.quickstart")
        training = Training(seed=self.recipe.seed)
        self.report.line(f"Quickstart: training a small Llama into {folder} (about a minute).")
        with self.report.progress("Training") as progress:
            make = partial(make_quickstart, folder, training, progress=progress)
            made = self.processes.from_main(make)
        self.report.line(
            "For comparison: knowing only how often each token occurs, a model has a perplexity of "
            f"{made.unigram_perplexity:.1f} on the held-out text."
        )
        own = {"dataset": str(made.train), "eval_dataset": str(made.held_out)}
        own = {name: value for name, value in own.items() if name not in self.given}
        self.recipe = self.recipe.model_copy(update=own)
        return str(made.model)

    def _prepare(self, folder: str) -> Job:
        """Config, processor and data opened, every default settled and told."""
        opened = partial(prepare, self.recipe, folder=folder, given=self.given)
        with self.report.progress("Reading the data"):
            job = self.processes.main_first(opened)
        if self.subset is not None:
            job = self.processes.main_first(partial(with_subset, job, self.subset))
        self.recipe = job.recipe
        pushed = push_settings(self.repository, private=self.private)
        shown = [row for row in job.settings if row[0] not in self.UNREAD]
        self.report.settings([*shown, *pushed])
        self.report.notes_of(job)
        return job

    # -- before the cut ---------------------------------------------------------------------------

    def _discover(
        self, model: PreTrainedModel, loader: DataLoader[Any], job: Job, **more: Any
    ) -> GradNASPruner:
        pruner = make_pruner(model, self.recipe, job, self.processes)
        self._batch, self._length = next(iter(loader)), flops_length_of(job)
        with self.report.progress("Finding what can be pruned"):
            pruner.discover(self._batch, flops_length=self._length, **more)
        if job.scores is not None:
            pruner.use_scores(job.scores)
        return pruner

    def _evaluate(
        self, model: PreTrainedModel, batches: Batches | None, job: Job, what: str
    ) -> Metrics | None:
        head = job.source.task.head
        with self.processes.joint():
            return measure(model, batches, job.evaluation, head, self.report, what)

    def _score(self, pruner: GradNASPruner, loader: DataLoader[Any], job: Job) -> None:
        """One pass of forwards and backwards, unless scores were given."""
        if job.scores is not None:
            return
        began = time.monotonic()
        self.has_scores = True
        with self.report.progress("Scoring") as progress:
            pruner.score(
                by_length(loader, self.recipe.score),
                labels=job.labels,
                num_examples=len(job.calibration),
                file=self.recipe.save_scores,
                progress=progress,
                seed=self.recipe.seed,
                checkpointing=self.recipe.checkpointing or None,
            )
        self.report.line(
            f"Scored {len(job.calibration)} examples in {time.monotonic() - began:.1f} s; "
            f"scores: {self.recipe.save_scores}"
        )

    def _plan(self, pruner: GradNASPruner) -> Plan:
        with self.report.progress("Planning"):
            plan = pruner.plan(self.recipe.target)
        if self.recipe.score == AUTO:
            self.report.line(say_tried(plan))
        self.report.plan(plan, pruner.structure)
        self.report.costs(plan, pruner.totals, pruner.costs)
        self._instead = stock_instead(
            pruner.prunable, pruner.scores, plan, search=pruner.search, rules=pruner.rules
        )
        if self._instead:
            self.report.line(say_stock(self._instead))
        return plan

    def _repair(
        self, pruner: GradNASPruner, plan: Plan, loader: DataLoader[Any]
    ) -> tuple[Plan, Repair | None]:
        """New weights for a plan, and neurons if asked for, by calibration data; saved beside it.

        Returns:
            The plan that is cut, and its repair; the plan as it is and None where none was asked
            for, or where a warning says why there is none.
        """
        if self.recipe.repair == "none":
            return plan, None
        began = time.monotonic()

        def swap(plan: Plan, batches: Iterable[Any]) -> Plan:
            with self.report.progress("Swapping neurons") as progress:
                return pruner.swap(plan, batches, progress=progress)

        def repair(plan: Plan, batches: Iterable[Any]) -> Repair:
            with self.report.progress("Repairing") as progress:
                return pruner.repair(plan, batches, progress=progress)

        steps = swap if swaps(self.recipe.repair, pruner.scores) else None, repair
        chosen, found = mended(plan, by_length(loader), *steps, self.processes)
        if found is None:
            return chosen, None
        if chosen.kept != plan.kept:
            self.report.line(say_swap(pruner.structure, plan, chosen))
        file = repair_file(str(self.recipe.output))
        took = f"{time.monotonic() - began:.1f} s"
        self.report.line(f"{say_repair(found.record())} It took {took}.")
        try:
            self.processes.from_main(partial(found.save, file))
        except RepairError as error:  # the model itself can still be saved
            self.report.warn(str(error))
        else:
            self.report.line(f"Repair: {file}")
        return chosen, found

    def _measure_masked(
        self,
        pruner: GradNASPruner,
        plan: Plan,
        repair: Repair | None,
        evaluation: Batches | None,
        job: Job,
        before: Metrics | None,
    ) -> dict[str, Any]:
        """The end of a dry run: what the plan would leave, measured with masks."""
        measured: dict[str, Metrics] = {}
        if before is not None:
            with pruner.masked(plan, repair):
                after = self._evaluate(pruner.model, evaluation, job, "Evaluating the plan")
            if after is not None:
                measured = {"before": before, "after (masked)": after}
                tell_metrics(self.report, measured, job, plan)
        self.report.line("Dry run: no model was cut or written.")
        return {"metrics": {name: found.to_dict() for name, found in measured.items()}}

    # -- the cut and after ------------------------------------------------------------------------

    def _cut_and_save(
        self,
        pruner: GradNASPruner,
        plan: Plan,
        repair: Repair | None,
        evaluation: Batches | None,
        job: Job,
        before: Metrics | None,
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of the cut model, and what is kept of it in ``gradnas.json``."""
        timing = Timing(
            self._batch,
            self._length,
            self.processes,
            is_on=self.recipe.report and self.recipe.latency == "auto",
            began=self._began,
            bar=self.report.progress,
        )
        give_back()
        timing.begin(pruner.model)
        with self.report.progress("Cutting"):
            model = pruner.apply(plan, repair)
        after = self._evaluate(model, evaluation, job, "Evaluating the pruned model")
        columns, document = {"before": before, "after": after}, record(self.recipe, job, self.given)
        latency = timing.end(model)
        if latency is not None:
            self.report.latency(latency)
            document["latency"] = latency
        if job.recovery is not None:
            document["recovery"] = recover_model(model, self.recipe, job, self.report)
            columns["recovered"] = self._evaluate(
                model, evaluation, job, "Evaluating the recovered model"
            )
        document |= {"stock_instead": self._instead} if self._instead else {}
        measured = {name: found for name, found in columns.items() if found is not None}
        if measured:
            document["metrics"] = {name: found.to_dict() for name, found in measured.items()}
        output = str(self.processes.from_main(partial(self._place, model.name_or_path)))
        with self.report.progress("Saving and loading back"):
            pruner.save_pretrained(
                output,
                job.source.processor,
                overwrite=self.recipe.overwrite,
                document=document,
                files={"recipe.yaml": to_yaml(shareable(self.recipe))},
                report=self.recipe.report,
                max_shard_size=self.recipe.max_shard_size,
            )
        if measured:
            if self.recipe.model == QUICKSTART:
                again = self._evaluate_reloaded(output, evaluation, job)
                if again is not None:
                    measured["reloaded"] = again
            tell_metrics(self.report, measured, job, plan)
        tell_place(self.report, model, plan, output)
        if self.repository is not None:
            with self.report.uploading():
                pushed = partial(push, output, self.repository, private=self.private or None)
                self.report.line(f"Pushed: {self.processes.from_main(pushed)}")
        return Path(output), document

    def _place(self, source: str) -> Path | str:
        """The output folder; one beside it where the output was taken by others in the meantime."""
        output = str(self.recipe.output)
        found = usable_target(output, overwrite=self.recipe.overwrite, source=source)
        return output if found == target_of(output) else found

    def _evaluate_reloaded(
        self, output: str, evaluation: Batches | None, job: Job
    ) -> Metrics | None:
        source = open_source(self.recipe.model_copy(update={"task": None}), output)
        model, _ = load_model(self.recipe, source, output)
        return self._evaluate(model, evaluation, job, "Evaluating the reloaded model")
