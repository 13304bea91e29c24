"""The sweep command: what is left of a model at many budgets, by many scores, in one go."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_whole
from ..config.recipe import Recipe
from ..config.recipe_building import build_recipe
from ..config.recipe_saving import shareable
from ..config.sweep import Sweep, build_sweep
from ..errors import CheckpointError, DataError, GradNASError
from .doubts import doubts
from .early import model_folder
from .prune import BAD_INPUT, DONE, FAILED, INTERRUPTED, is_out_of_memory, run_prune, say
from .show import Screen, quiet_libraries, show_settings, show_structure
from .sweep_early import FILES, SWEEP_FILE, check_sweep, saved_recipe

if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..running.processes import Processes
    from ..types import Frontier
    from .preparation import Job

_OF_PRUNE = ("--target", "--score", "--save-scores", "--output", "--overwrite", "--report")


def sweep_from_options(flags: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.
        own: Options by field name of `Sweep`.

    Returns:
        0 done, 1 the model that was asked for could not be saved, 2 bad input, 130 interrupted, 143
        terminated.
    """
    from .launch import is_main, launched

    screen, code = Screen(quiet=not is_main()), BAD_INPUT
    folder: str | None = None
    everyone: Processes | None = None
    try:
        sweep = build_sweep(own)
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
    except SystemExit as stop:  # SIGTERM while scoring
        screen.error(_interruption(folder))
        return stop.code if isinstance(stop.code, int) else FAILED
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
    from .measuring import metrics_of
    from .opening import flops_length_of, make_pruner, open_model
    from .preparation import prepare

    began = time.monotonic()
    opened = partial(prepare, recipe, folder=model_folder(recipe.model), given=given)
    job = processes.main_first(opened)
    subsets = processes.main_first(partial(_subsets, sweep, job))
    show_settings(screen, _rows(job, sweep, given))
    for note in job.notes:
        screen.line(f"Note: {note}.")
    for warning in job.warnings:
        screen.warn(warning)
    load = partial(open_model, job.recipe, job, screen)
    model, loader, measured = processes.main_first(load)
    if measured is None or job.evaluation is None:
        raise DataError(
            f"--dataset: there is nothing to measure plans on: {job.obstacle}. Give --eval-dataset "
            "with labels, more data, or another --task."
        )
    pruner = make_pruner(model, job.recipe, job, processes)
    pruner.discover(next(iter(loader)), flops_length=flops_length_of(job))
    show_structure(screen, pruner.structure, pruner.layout, pruner.layout_reason)
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
    )
    processes.from_main(partial(_write, frontier, Path(str(recipe.output))))
    _show(frontier, f"{original.examples:,} examples {job.evaluation}", screen)
    screen.line(f"Saved: {recipe.output} ({', '.join(FILES)})")
    screen.line(f"Done in {time.monotonic() - began:.1f} s.")


def _subsets(sweep: Sweep, job: Job) -> dict[int, Examples]:
    """Examples to score on, per seed."""
    from .preparation import with_subset

    if not sweep.seeds:
        return {job.recipe.seed: job.calibration}
    return {seed: with_subset(job, seed).calibration for seed in sweep.seeds}


def _document(job: Job, sweep: Sweep, given: frozenset[str]) -> dict[str, Any]:
    """What the file of results keeps beside what was measured."""
    from .records import data_of, words_of

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


# --- results --------------------------------------------------------------------------------------


def _write(frontier: Frontier, folder: Path) -> None:
    """Write tables and pictures beside the file of results, which is there already.

    Raises:
        CheckpointError: One cannot be written.
    """
    from ..report.frontier_plot import frontier_pictures
    from ..report.frontiers import frontier_csv, frontier_markdown

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
    from ..frontier import scores_file
    from ..scores.methods import GRADIENT_METHODS

    subset = sweep.seeds[0] if sweep.seeds else None
    seed = recipe.seed if subset is None else subset
    file = scores_file(Path(str(recipe.output), SWEEP_FILE), seed)
    scores = file if sweep.score[0] in GRADIENT_METHODS else None
    own = saved_recipe(recipe, sweep, scores)
    screen.line(f"Saving the model of {sweep.save} by {sweep.score[0]}:")
    more = {"target", "output", *(["scores"] if scores else ["score"])}
    run_prune(own, screen, processes, given=given - {"labels"} | more, subset=subset)
