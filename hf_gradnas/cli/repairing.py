"""What the prune command does for quality: new weights before the cut, training after it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import RepairError
from .early import repair_file
from .show import Screen

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from ..config.recipe import Recipe
    from ..pruner import GradNASPruner
    from ..repair import Repair
    from ..scores.processes import Processes
    from ..types import Plan
    from .preparation import Job


def find_repair(
    pruner: GradNASPruner,
    plan: Plan,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    screen: Screen,
    processes: Processes,
) -> Repair | None:
    """New weights for a plan, from the calibration data alone, saved beside the output.

    Returns:
        None where none was asked for, or where a warning says why there is none.
    """
    from ..repair.repairs import attempted
    from ..report import say_repair
    from ..scores.ordering import by_length

    if recipe.repair == "none":
        return None
    began = time.monotonic()
    with screen.progress("Repairing") as report:
        find = partial(pruner.repair, plan, by_length(loader), progress=report)
        found = attempted(find, processes)
    if found is None:
        return None
    file = repair_file(str(recipe.output))
    took = f"{time.monotonic() - began:.1f} s"
    screen.line(f"{say_repair(found.record())} It took {took}.")
    try:
        processes.from_main(partial(found.save, file))
    except RepairError as error:  # the model itself can still be saved
        screen.warn(str(error))
    else:
        screen.line(f"Repair: {file}")
    return found


def recover_model(
    model: PreTrainedModel, recipe: Recipe, job: Job, *, screen: Screen
) -> dict[str, Any]:
    """Train the cut model; the teacher is loaded again from where the original came."""
    from ..repair import recover
    from .examples import Collator
    from .loading import load_model

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
