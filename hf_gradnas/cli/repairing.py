"""What the prune command does for quality: new weights before the cut, training after it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import RepairError
from .early import repair_file
from .show import Screen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from ..config.recipe import Recipe
    from ..pruner import GradNASPruner
    from ..repair import Repair
    from ..running.processes import Processes
    from ..types import Plan
    from .preparation import Job


def mend(
    pruner: GradNASPruner,
    plan: Plan,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    screen: Screen,
    processes: Processes,
) -> tuple[Plan, Repair | None]:
    """New weights for a plan, and neurons if asked for, by calibration data; saved beside it.

    Returns:
        The plan that is cut, and its repair; the plan as it is and None where none was asked for,
        or where a warning says why there is none.
    """
    from ..batches.ordering import by_length
    from ..repair.repairs import mended
    from ..report import say_repair, say_swap

    if recipe.repair == "none":
        return plan, None
    began = time.monotonic()

    def swap(plan: Plan, batches: Iterable[Any]) -> Plan:
        with screen.progress("Swapping neurons") as report:
            return pruner.swap(plan, batches, progress=report)

    def repair(plan: Plan, batches: Iterable[Any]) -> Repair:
        with screen.progress("Repairing") as report:
            return pruner.repair(plan, batches, progress=report)

    chosen, found = mended(
        plan, by_length(loader), swap if recipe.repair == "swap" else None, repair, processes
    )
    if found is None:
        return chosen, None
    if chosen.kept != plan.kept:
        screen.line(say_swap(pruner.structure, plan, chosen))
    file = repair_file(str(recipe.output))
    took = f"{time.monotonic() - began:.1f} s"
    screen.line(f"{say_repair(found.record())} It took {took}.")
    try:
        processes.from_main(partial(found.save, file))
    except RepairError as error:  # the model itself can still be saved
        screen.warn(str(error))
    else:
        screen.line(f"Repair: {file}")
    return chosen, found


def recover_model(
    model: PreTrainedModel, recipe: Recipe, job: Job, *, screen: Screen
) -> dict[str, Any]:
    """Train the cut model; the teacher is loaded again from where the original came."""
    from ..data.examples import Collator
    from ..data.loading import load_model
    from ..repair import recover

    examples = job.recovery
    teacher, _ = load_model(recipe, job.source, job.folder)
    with screen.progress("Recovering") as report:
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
            progress=report,
        )
    count = 0 if examples is None else len(examples)
    screen.line(f"Recovered in {done.steps} steps on {count} examples in {done.seconds:.1f} s.")
    return {"examples": count, "steps": done.steps, "loss": done.loss}
