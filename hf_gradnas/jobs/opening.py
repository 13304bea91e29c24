"""From a job to a model in memory, its batches, and the pruner that holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint.savable import check_processor
from ..config.recipe import Recipe
from ..data.examples import Collator, make_loader
from ..data.heads import check_head, listed
from ..data.loading import load_model
from ..pruner import GradNASPruner
from ..running.processes import Processes
from .measuring import Batches, evaluation_batches
from .preparation import Job
from .report import Report

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel


def open_model(
    recipe: Recipe, job: Job, report: Report
) -> tuple[PreTrainedModel, DataLoader[Any], Batches | None]:
    """The model, what it is scored on, and what it is measured on, if anything.

    Raises:
        RecipeError: The checkpoint cannot be loaded, or its head is new and may not be.
    """
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
