"""Everything that is checked and opened before the first batch runs: data, model, pruner."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.savable import check_processor
from ..config.defaults import AUTO
from ..config.recipe import Recipe
from ..data.columns import Columns
from ..data.datasets import BUNDLED, open_dataset
from ..data.examples import Collator, Examples, make_loader
from ..data.feeds import (
    Evaluation,
    data_warnings,
    divide,
    drawn,
    encode,
    feed_of,
    is_same_data,
    labelled_by,
    open_calibration_rows,
    resolve_labels,
    rows_needed,
    shown_name,
    span,
    wanted,
    without,
)
from ..data.files import Rows
from ..data.labels import check_same_numbers
from ..data.loading import (
    Source,
    best_device,
    check_head,
    listed,
    load_model,
    open_source,
    prepare_tokenizer,
    resolve_max_length,
)
from ..data.tasks import Head
from ..errors import DataError, RecipeError
from ..pruner import GradNASPruner
from ..running.processes import Processes
from ..types import Scores
from .early import read_scores
from .idle import Known, check_idle, without_idle
from .measuring import Batches, evaluation_batches
from .report import Report, settings_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Job:
    """A run that passed every check which needs no weights.

    Attributes:
        recipe: With every default that was taken filled in.
        source: Config, class, task and processor.
        folder: Where the model is loaded from.
        calibration: Examples to score on.
        evaluation: What to measure on, if anything.
        recovery: Examples to train the pruned model on, if that was asked for.
        labels: ``"data"`` or ``"model"``.
        scores: Scores of an earlier run, if they were given.
        settings: Rows for the table of settings: option, value, where it comes from.
        notes: What was decided on the way.
        warnings: What of it makes the result worse than it need be.
        obstacle: Why nothing is measured; "" where something is, or was not asked for.
    """

    recipe: Recipe
    source: Source
    folder: str
    calibration: Examples
    evaluation: Evaluation | None
    recovery: Examples | None
    labels: str
    scores: Scores | None
    settings: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    obstacle: str = ""


def prepare(recipe: Recipe, *, folder: str, given: Set[str]) -> Job:
    """Open model config, processor and data, and settle every default.

    Args:
        recipe: With its paths resolved.
        folder: Where the model is: its Hub id or folder, or that of the quickstart model.
        given: Names of the options that were given; the others are defaults.

    Raises:
        RecipeError: The model, task or length does not fit.
        DataError: The data does not fit.
        ScoresError: The scores file cannot be used.
    """
    scores = read_scores(recipe, given=given)
    source = open_source(recipe, folder)
    known = Known(source.task.head, source.input)
    check_idle(recipe, given, known)
    padding = prepare_tokenizer(source)
    max_length = resolve_max_length(recipe, source)
    flops_length = recipe.flops_length or max_length
    labels = resolve_labels(recipe, source)
    filled = recipe.model_copy(
        update={
            "max_length": max_length,
            "flops_length": flops_length,
            "labels": labels,
            "device": recipe.device or best_device(),
            "task": recipe.task or source.task.name,
            "score": _score_of(recipe, scores),
        }
    )
    calibration = _open_calibration(filled, source, scores_given=scores is not None)
    evaluation = _open_evaluation(filled, source, calibration) or calibration.held_out
    recovery = _open_recovery(filled, source, calibration)
    return Job(
        without_idle(filled, known),
        source,
        folder,
        calibration.examples,
        evaluation,
        recovery,
        labels,
        scores,
        settings_of(
            filled,
            given,
            source,
            calibration.columns,
            calibration.examples,
            padding,
            held_out=calibration.num_held_out,
        ),
        tuple(_notes(filled, source, calibration, evaluation, recovery)),
        tuple(data_warnings(filled, source, scores, evaluation)),
        "" if evaluation else calibration.obstacle,
    )


def _score_of(recipe: Recipe, scores: Scores | None) -> str:
    """The score that plans are made from: that of given scores, unless several are tried."""
    if scores is None or recipe.score == AUTO:
        return recipe.score
    return scores.metadata.get("method", recipe.score)


@dataclass(frozen=True)
class _Calibration:
    """The calibration data, in two parts: what is scored, and what is held out after it.

    Attributes:
        rows: The data.
        columns: What is read of it.
        examples: What is scored.
        held_out: What is measured, if anything.
        obstacle: Why nothing is held out; "" where it need not be.
    """

    rows: Rows
    columns: Columns
    examples: Examples
    held_out: Evaluation | None = None
    obstacle: str = ""

    @property
    def num_held_out(self) -> int:
        return 0 if self.held_out is None else len(self.held_out.examples)


def _open_calibration(recipe: Recipe, source: Source, *, scores_given: bool) -> _Calibration:
    labeller, obstacle = labelled_by(recipe, source)
    most = wanted(recipe) if labeller else 0
    more = recipe.model_copy(update={"num_examples": recipe.num_examples + most})
    rows = open_calibration_rows(recipe, source, more.num_examples)
    feed, columns = feed_of(rows, more, source, labelled=recipe.labels == "data")
    found = encode(feed)
    scored, held_out = divide(len(found), recipe.num_examples, most)
    examples = span(found, 0, scored)
    if not held_out:
        few = f"{len(found)} examples are too few to hold some out; give --eval-dataset"
        return _Calibration(rows, columns, examples, obstacle=obstacle or few)
    evaluation = Evaluation(
        span(found, scored, held_out),
        shown_name(recipe.dataset) if recipe.dataset else BUNDLED,
        held_out=True,
        by_model=labeller == "model",
        scores_given=scores_given,
    )
    return _Calibration(rows, columns, examples, evaluation)


def _notes(
    recipe: Recipe,
    source: Source,
    calibration: _Calibration,
    evaluation: Evaluation | None,
    recovery: Examples | None,
) -> Iterator[str]:
    """What was decided on the way."""
    note = calibration.examples.note
    yield from calibration.rows.notes
    if note:
        yield note
    if source.head_is_unknown:
        yield f"no task is known for {source.cls.__name__}: labels are sampled from its own output"
    if evaluation is not None and evaluation.examples.note not in (None, note):
        yield f"evaluation: {evaluation.examples.note}"
    if evaluation is None and recipe.eval:
        yield f"nothing is measured: {calibration.obstacle}"
    if recovery is not None:
        yield f"the pruned model is recovered on {len(recovery)} examples"


def _open_evaluation(
    recipe: Recipe, source: Source, calibration: _Calibration
) -> Evaluation | None:
    if not recipe.eval:
        return None
    name = recipe.eval_dataset or (recipe.dataset if recipe.eval_split else None)
    if name is None:
        if recipe.eval_split:
            raise RecipeError(
                f"--eval-split {recipe.eval_split}: there is no data set to take it from; give "
                "--eval-dataset, or --dataset."
            )
        return None
    if source.task.head is Head.BASE:
        raise DataError(
            f"--eval-dataset {name}: {source.cls.__name__} has no head whose loss could be "
            "measured; omit it, or give --task."
        )
    limit = recipe.eval_num_examples
    rows = open_dataset(
        name,
        split=recipe.eval_split or "validation",
        exact=recipe.eval_split is not None,
        seed=recipe.seed,
        take=None if limit is None else rows_needed(limit, recipe, source),
    )
    changed = recipe.model_copy(update={"num_examples": limit or len(rows.dataset) * 10**6})
    changed = changed.model_copy(update={"shuffle": False})
    feed, _ = feed_of(rows, changed, source, labelled=True)
    examples = encode(feed)
    check_same_numbers(calibration.examples.names, examples.names)
    known = is_same_data(recipe, calibration.rows, rows)
    return Evaluation(examples, shown_name(name), scored_too=known)


def _open_recovery(recipe: Recipe, source: Source, calibration: _Calibration) -> Examples | None:
    """Examples to train on after the cut: more of what is calibrated on, but not the held-out."""
    if not recipe.recover_epochs or recipe.dry_run:
        return None
    from ..repair.lora import check_lora

    check_lora(recipe.recover_lora_rank)
    scored, held_out = len(calibration.examples), calibration.num_held_out
    limit = recipe.recover_num_examples
    found = _all_but(recipe, source, scored, held_out, limit and limit + held_out)
    return span(found, 0, min(len(found), limit or len(found)))


def open_pool(job: Job) -> Examples:
    """All examples of the calibration data, but those that are held out to be measured on."""
    evaluation = job.evaluation
    held_out = len(evaluation.examples) if evaluation and evaluation.held_out else 0
    return _all_but(job.recipe, job.source, len(job.calibration), held_out, None)


def with_subset(job: Job, seed: int) -> Job:
    """The job with other calibration examples, as many, drawn at random from all but the held-out.

    Raises:
        DataError: There are too few to draw different ones.
    """
    pool, count = open_pool(job), len(job.calibration)
    if len(pool) <= count:
        raise DataError(
            f"--seeds: there are {len(pool)} examples to draw from, needed more than the {count} "
            f"of a subset; give --num-examples {max(1, len(pool) // 2)} or less, or more data."
        )
    return replace(job, calibration=drawn(pool, count, seed))


def _all_but(recipe: Recipe, source: Source, first: int, count: int, limit: int | None) -> Examples:
    """Examples to score on, up to a limit, without `count` of them from `first` on."""
    rows = open_calibration_rows(recipe, source, limit)
    # Running text has more examples than lines, but fewer than characters.
    changed = recipe.model_copy(update={"num_examples": limit or 10**12})
    feed, _ = feed_of(rows, changed, source, labelled=recipe.labels == "data")
    return without(encode(feed), first, count)


# --- from a job to a pruner -----------------------------------------------------------------------


def open_model(
    recipe: Recipe, job: Job, report: Report
) -> tuple[PreTrainedModel, DataLoader[Any], Batches | None]:
    """The model, what it is scored on, and what it is measured on, if anything.

    Raises:
        RecipeError: The checkpoint cannot be loaded, or its head is new and may not be.
    """
    with report.progress("Loading the model"):
        model, missing = load_model(recipe, job.source, job.folder)
    check_head(recipe, job.source, model, missing)
    if missing:
        report.warn(
            f"the checkpoint has no weights for {listed(missing)}; they are random, so scores "
            "and metrics mean little."
        )
    size = recipe.batch_size
    loader = make_loader(job.calibration, job.source, model, batch_size=size)
    if job.evaluation is None:
        return model, loader, None
    measured = evaluation_batches(job.evaluation, job.source, model, batch_size=size)
    return model, loader, measured


def make_pruner(
    model: PreTrainedModel, recipe: Recipe, job: Job, processes: Processes
) -> GradNASPruner:
    """The pruner with the options of a recipe.

    Raises:
        CheckpointError: The processor cannot be saved.
        StructureError: It is no model that can be pruned.
    """
    check_processor(job.source.processor)
    return GradNASPruner(
        model,
        score=recipe.score,
        search=recipe.search,
        layout=recipe.layout,
        rules=recipe.rules(),
        layers="layers" in recipe.axes,
        accelerator=processes.accelerator,
    )


def flops_length_of(job: Job) -> int | None:
    """Tokens that FLOPs are counted for; None where the batch decides.

    Images have a size of their own; for audio the length counts the decoder's tokens.
    """
    return None if job.source.input == "image" else job.recipe.flops_length


def recover_model(
    model: PreTrainedModel, recipe: Recipe, job: Job, report: Report
) -> dict[str, Any]:
    """Train the cut model; the teacher is loaded again from where the original came."""
    from ..repair import recover  # the Trainer takes seconds to import

    examples = job.recovery
    teacher, _ = load_model(recipe, job.source, job.folder)
    with report.progress("Recovering") as progress:
        done = recover(
            model,
            teacher,
            examples,
            epochs=recipe.recover_epochs,
            learning_rate=recipe.recover_learning_rate,
            batch_size=recipe.recover_batch_size,
            temperature=recipe.recover_temperature,
            alpha=recipe.recover_alpha,
            hidden_weight=recipe.recover_hidden_weight,
            lora=recipe.recover_lora_rank,
            seed=recipe.seed,
            data_collator=Collator(job.source, model),
            progress=progress,
        )
    count = 0 if examples is None else len(examples)
    report.line(f"Recovered in {done.steps} steps on {count} examples in {done.seconds:.1f} s.")
    return {"examples": count, "steps": done.steps, "loss": done.loss}
