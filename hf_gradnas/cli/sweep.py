"""The sweep command: what is left of a model at many budgets, by many scores, in one go."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import temporary_sibling, write_whole
from ..checkpoint.folders import check_target
from ..config.limits import parse_budgets
from ..config.recipe import Recipe
from ..config.recipe_files import build_options, build_recipe, check_inputs, shareable
from ..config.sweep import Sweep
from ..errors import BudgetError, CheckpointError, DataError, GradNASError, RecipeError
from ..jobs.early import check_inspected, is_local, local_path, model_folder
from ..jobs.latency import check_latency, set_latency
from ..jobs.measuring import doubts
from ..types import COSTS
from . import BAD_INPUT, DONE, FAILED, INTERRUPTED
from .launchers import is_main
from .prune import is_out_of_memory, launched, say
from .show import Screen, quiet_libraries

if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..jobs.preparation import Job
    from ..running.processes import Processes
    from ..types import Frontier

_OF_PRUNE = ("--target", "--score", "--save-scores", "--output", "--overwrite", "--report")
SWEEP_FILE = "sweep.json"
FILES = (SWEEP_FILE, "sweep.csv", "sweep.md", "sweep.png", "sweep.svg")
PRUNED = "pruned"
"""Folder in that of the results which a pruned model is saved to."""


def sweep_from_options(flags: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.
        own: Options by field name of `Sweep`.

    Returns:
        0 done, 1 the model that was asked for could not be saved, 2 bad input, 130 interrupted, 143
        terminated.
    """
    screen, code = Screen(quiet=not is_main()), BAD_INPUT
    folder: str | None = None
    everyone: Processes | None = None
    try:
        sweep = build_options(Sweep, own)
        given = frozenset(flags)
        recipe = check_sweep(build_recipe(flags), sweep, given=given)
        folder = recipe.output
        with launched(recipe) as (recipe, everyone), quiet_libraries(screen):
            _sweep(recipe, sweep, screen, everyone, given=given)
            code = FAILED
            _save(recipe, sweep, screen, everyone, given=given)
    except KeyboardInterrupt:
        screen.error(_interruption(folder))
        return INTERRUPTED
    except SystemExit:  # as in prune
        screen.error(f"standard output was closed: {_interruption(folder)}")
        return FAILED
    except GradNASError as error:
        say(screen, everyone, str(error))
        return code
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = "give a smaller --batch-size or --max-length"
        say(screen, everyone, f"out of memory ({error}); {advice}.")
        return FAILED
    return DONE


def _interruption(folder: str | None) -> str:
    """What an interrupted run leaves behind."""
    if folder is None or not Path(folder, SWEEP_FILE).is_file():
        return "interrupted; nothing was written."
    return (
        f"interrupted; scores and what was measured so far are in {folder}, and the same command "
        "goes on from there."
    )


def _sweep(
    recipe: Recipe,
    sweep: Sweep,
    screen: Screen,
    processes: Processes,
    *,
    given: frozenset[str],
) -> None:
    """All steps in order."""
    from ..data.examples import make_loader
    from ..jobs.measuring import metrics_of
    from ..jobs.preparation import flops_length_of, make_pruner, open_model, prepare

    began = time.monotonic()
    opened = partial(prepare, recipe, folder=model_folder(recipe.model), given=given)
    with screen.progress("Reading the data"):
        job = processes.main_first(opened)
        subsets = processes.main_first(partial(_subsets, sweep, job))
    screen.settings(_rows(job, sweep, given))
    screen.notes_of(job)
    load = partial(open_model, job.recipe, job, screen)
    model, loader, measured = processes.main_first(load)
    if measured is None or job.evaluation is None:
        raise DataError(
            f"--dataset: there is nothing to measure plans on: {job.obstacle}. Give --eval-dataset "
            "with labels, more data, or another --task."
        )
    pruner = make_pruner(model, job.recipe, job, processes)
    batch, length = next(iter(loader)), flops_length_of(job)
    with screen.progress("Finding what can be pruned"):
        pruner.discover(batch, flops_length=length)
    set_latency(pruner, job.recipe, batch, length=length, report=screen)
    screen.structure(pruner.structure, pruner.layout, pruner.layout_reason)
    yardstick = partial(
        metrics_of, batches=measured, evaluation=job.evaluation, head=job.source.task.head
    )
    with screen.progress("Evaluating the original") as report, processes.joint():
        original = yardstick(model, progress=report)
    for doubt in doubts(original, job.source.task.head, model.config):
        screen.warn(doubt)
    size = job.recipe.batch_size
    frontier = pruner.sweep(
        {s: make_loader(e, job.source, model, batch_size=size) for s, e in subsets.items()},
        sweep.targets,
        batches=measured,
        evaluate=lambda model: yardstick(model).to_dict(),
        score=sweep.score,
        repair=job.recipe.repair,
        labels=job.labels,
        num_examples=len(job.calibration),
        file=Path(str(recipe.output), SWEEP_FILE),
        document=_document(job, sweep, given),
        progress=screen.progress,
        checkpointing=recipe.checkpointing or None,
    )
    processes.from_main(partial(_write, frontier, Path(str(recipe.output))))
    _show(frontier, f"{original.examples:,} examples {job.evaluation}", screen)
    screen.line(f"Saved: {recipe.output} ({', '.join(FILES)})")
    screen.line(f"Done in {time.monotonic() - began:.1f} s.")


def _subsets(sweep: Sweep, job: Job) -> dict[int, Examples]:
    """Examples to score on, per seed."""
    from ..jobs.preparation import with_subset

    if not sweep.seeds:
        return {job.recipe.seed: job.calibration}
    return {seed: with_subset(job, seed).calibration for seed in sweep.seeds}


def _document(job: Job, sweep: Sweep, given: frozenset[str]) -> dict[str, Any]:
    """What the file of results keeps beside what was measured."""
    from ..jobs.report import data_of, words_of

    recipe = shareable(job.recipe)
    own = [word for name in Sweep.model_fields for word in _words(sweep, name)]
    command = shlex.join(["hf-gradnas", "sweep", *words_of(recipe, given), *own])
    return {"command": command, "score": list(sweep.score), **data_of(recipe, job)}


def _rows(job: Job, sweep: Sweep, given: frozenset[str]) -> list[tuple[str, str, str]]:
    """Rows of the table of settings: those of prune that matter here, and those of a sweep."""
    others = {*_OF_PRUNE, *(["--shuffle"] if sweep.seeds else [])}
    rows = [row for row in job.settings if row[0] not in others]
    for name in Sweep.model_fields:
        words = _words(sweep, name)
        origin = "given" if name in sweep.model_fields_set else "default"
        rows += [(words[index], words[index + 1], origin) for index in range(0, len(words), 2)]
    origin = "given" if "output" in given else "default"
    return [*rows, ("--output", str(job.recipe.output), origin)]


def _words(sweep: Sweep, name: str) -> list[str]:
    """Flags and values that set one option to what it is; empty where it is not set."""
    value, flag = vars(sweep)[name], f"--{name}"
    if isinstance(value, Mapping):
        pairs = [f"{cost}={','.join(limits)}" for cost, limits in value.items()]
        return [word for pair in pairs for word in (flag, pair)]
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))] if value else []
    return [flag, value] if value else []


# --- results -------------------------------------------------------------------------------------


def _write(frontier: Frontier, folder: Path) -> None:
    """Write tables and pictures beside the file of results, which is there already.

    Raises:
        CheckpointError: One cannot be written.
    """
    from ..report.frontiers import frontier_csv, frontier_markdown, frontier_pictures

    contents = {"csv": frontier_csv(frontier).encode(), "md": frontier_markdown(frontier).encode()}
    for suffix, content in {**contents, **frontier_pictures(frontier)}.items():
        file = folder / f"sweep.{suffix}"
        try:
            write_whole(file, partial(_put, content), replaces=lambda _: True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be written ({error}); {SWEEP_FILE} beside it holds all results. "
                "Free some space, and run the same command again."
            ) from error


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _show(frontier: Frontier, measured_on: str, screen: Screen) -> None:
    """The table, and what it was measured on."""
    from ..report.frontiers import table_of

    headers, rows = table_of(frontier)
    screen.table("Frontier", headers, rows, right=len(headers) - 3)
    seeds = len({point.seed for point in frontier.points})
    over = f"; ± is the standard deviation over {seeds} subsets" if seeds > 1 else ""
    screen.line(f"Measured on {measured_on}{over}. KL: from the unpruned model, in nats.")


def _save(
    recipe: Recipe,
    sweep: Sweep,
    screen: Screen,
    processes: Processes,
    *,
    given: frozenset[str],
) -> None:
    """Prune to the budget that was asked for, with the scores of the sweep."""
    if sweep.save is None:
        return
    from ..flow import Run
    from ..frontier import scores_file
    from ..scores.methods import GRADIENT_METHODS

    subset = sweep.seeds[0] if sweep.seeds else None
    seed = recipe.seed if subset is None else subset
    file = scores_file(Path(str(recipe.output), SWEEP_FILE), seed)
    scores = file if sweep.score[0] in GRADIENT_METHODS else None
    own = saved_recipe(recipe, sweep, scores)
    screen.line(f"Saving the model of {sweep.save} by {sweep.score[0]}:")
    more = {"target", "output", *(["scores"] if scores else ["score"])}
    given = given - {"labels"} | more
    Run(own, screen, processes, given=given, subset=subset).execute()


# --- what is judged before torch is imported ------------------------------------------------------


def check_sweep(recipe: Recipe, sweep: Sweep, *, given: Set[str]) -> Recipe:
    """Check all options that need neither model nor data; fill in where results go.

    Args:
        recipe: As it was given.
        sweep: As it was given.
        given: Names of the options of the recipe that were given; the others are defaults.

    Returns:
        The recipe with `output` filled in, ``~`` resolved, and the first of the scores.

    Raises:
        RecipeError: An option, or a combination of them, cannot be used.
        BudgetError: A target cannot be read.
        DataError: A data set is not there.
        CheckpointError: The output cannot be written, or holds what no sweep wrote.
    """
    check_inputs(recipe)
    recipe = recipe.model_copy(update={"target": {c: each[0] for c, each in sweep.targets.items()}})
    check_inspected(recipe, given=given)
    if sweep.seeds and "shuffle" in given:
        raise RecipeError(
            "--shuffle: has no effect here, as --seeds draws its subsets at random; omit it."
        )
    if "report" in given and sweep.save is None:
        flag = "--report" if recipe.report else "--no-report"
        raise RecipeError(
            f"{flag}: has no effect here, as no model is written; give --save, or omit it."
        )
    if recipe.repair == "swap":
        raise RecipeError(
            "--repair swap: a sweep measures its plans as they are, or with new weights alone; "
            "give weights or none here, and swap to the prune command."
        )
    seen = set()
    for cost, limits in sweep.targets.items():
        for limit in limits:
            (budget,) = parse_budgets({cost: limit}, dict.fromkeys(COSTS, math.inf))
            if budget in seen and not math.isinf(budget.limit):
                raise BudgetError(f"--targets: {cost}={limit} is there twice; give it once.")
            seen.add(budget)
    sweep.limit_to_save()
    name = local_path(recipe.model).name if is_local(recipe.model) else recipe.model
    folder = recipe.output or f"./{name.rstrip('/').rsplit('/', 1)[-1]}-sweep"
    folder = str(Path(folder).expanduser()) if folder.startswith("~") else folder
    recipe = recipe.model_copy(update={"output": folder, "score": sweep.score[0]})
    _check_folder(recipe, folder, saves=sweep.save is not None)
    check_latency(recipe)
    return recipe


def _check_folder(recipe: Recipe, folder: str, *, saves: bool) -> None:
    """Check that the files of a sweep can be written to a folder, before any work."""
    from ..types import is_frontier

    place = local_path(folder)
    source = local_path(recipe.model) if is_local(recipe.model) else None
    if place == source:
        raise RecipeError(
            f"--output {folder}: is the folder of the model itself; give another folder."
        )
    if not is_frontier(place / SWEEP_FILE):
        found = [name for name in FILES if (place / name).exists()]
        if found:
            raise CheckpointError(
                f"--output {folder}: holds {found[0]}, which no sweep wrote; give another folder, "
                "or move the file away."
            )
    if saves:
        check_target(place / PRUNED, overwrite=recipe.overwrite, source=source)
    try:
        with temporary_sibling(place / SWEEP_FILE):
            pass
    except OSError as error:
        raise CheckpointError(
            f"--output {folder}: is not a folder that this user can write to "
            f"({error.strerror or error}); choose another folder, or change its permissions."
        ) from error


def saved_recipe(recipe: Recipe, sweep: Sweep, scores: Path | None) -> Recipe:
    """The recipe of the prune command that saves a model of the sweep.

    Args:
        recipe: Of the sweep.
        sweep: Says which budget.
        scores: File of the scores of the first name and seed; None: they come from the weights.
    """
    output = str(Path(str(recipe.output), PRUNED))
    return recipe.model_copy(
        update={
            "target": sweep.limit_to_save(),
            "score": sweep.score[0],
            "scores": None if scores is None else str(scores),
            "save_scores": None if scores is not None else f"{output}.scores.safetensors",
            "output": output,
        }
    )
