"""The prune and push commands: options in, an exit code out; and the processes they run in.

One that is started in the plain way stays alone: no process group is made for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..errors import CheckpointError, GradNASError, HubError, RecipeError
from ..jobs.early import check_early, check_pushed
from . import BAD_INPUT, DONE, FAILED, INTERRUPTED
from .launchers import is_main, process_count
from .show import Screen, quiet_libraries

if TYPE_CHECKING:
    from ..flow import Run
    from ..hub import Pushed
    from ..running.processes import Processes

STOPPED = "interrupted; nothing was written."


def prune_from_options(
    flags: Mapping[str, Any],
    *,
    settings: Iterable[str] = (),
    file: str | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.
        settings: ``KEY=VALUE`` strings of ``--set``.
        file: Recipe file or name of a shipped recipe.
        as_json: Write one JSON object to standard output, and nothing else.
        quiet: Print errors, and the last line.

    Returns:
        0 done, 1 pruning or verification failed, 2 bad input, 130 interrupted, 143 terminated.
    """

    def check() -> tuple[Recipe, frozenset[str]]:
        recipe = build_recipe(flags, settings=settings, file=file)
        given = frozenset(recipe.model_fields_set)
        return check_early(recipe, given=given), given

    def kind() -> type[Run]:
        from ..flow import Run

        return Run

    is_said = not (as_json or quiet)
    screen = Screen(quiet=not is_main(), results=is_said, notes=not quiet, last=not as_json)
    code = run_checked(check, kind, screen)
    if as_json and is_main() and screen.told is not None:
        from .outcome import outcome_json

        sys.stdout.write(outcome_json(*screen.told, screen.warnings))
    return code


def run_checked(
    check: Callable[[], tuple[Recipe, frozenset[str]]],
    kind: Callable[[], Callable[..., Run]],
    screen: Screen | None = None,
) -> int:
    """Run all steps on a screen; errors become a message and a code.

    Args:
        check: Gives the recipe, checked before torch is imported, and which options were given.
        kind: Imports the run.
        screen: What is told goes there; None: to the terminal.
    """
    screen = screen or Screen(quiet=not is_main())
    run: Run | None = None
    try:
        recipe, given = check()
        with launched(recipe) as (own, processes), quiet_libraries(screen):
            run = kind()(own, screen, processes, given=given)
            run.execute()
    except KeyboardInterrupt:
        screen.error(run.interruption() if run else STOPPED)
        return INTERRUPTED
    except SystemExit:  # rich ends the program where nobody reads what it prints, such as head
        screen.error(f"standard output was closed: {run.interruption() if run else STOPPED}")
        return FAILED
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


def say(screen: Screen, processes: Processes | None, message: str) -> None:
    """An error: once, by the main process, unless only another one knows of it."""
    if processes is not None and not processes.is_main and not processes.have_failed:
        screen = Screen()
        message = f"process {processes.index}: {message}"
    screen.error(message)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


@contextmanager
def launched(recipe: Recipe) -> Iterator[tuple[Recipe, Processes]]:
    """The recipe with the kind of device, and all processes; their group ends with the block.

    Raises:
        RecipeError: ``--device`` names one device for several processes.
    """
    from ..running.processes import Processes

    if process_count() == 1:
        yield recipe, Processes()
        return
    import torch
    from accelerate import Accelerator

    if recipe.device not in (None, "cpu"):
        raise RecipeError(
            f"--device {recipe.device}: several processes were launched, and each takes a device "
            "of its own; omit --device, or give cpu."
        )
    # Without the flag, Accelerate takes processes on a machine without a GPU for single ones.
    accelerator = Accelerator(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())
    try:
        # Its number stays out of the recipe; Accelerate has made it the process's current one.
        device = accelerator.device.type
        yield recipe.model_copy(update={"device": device}), Processes(accelerator)
    finally:
        accelerator.end_training()


# --- pushing to the Hub ---------------------------------------------------------------------------


def push_from_arguments(
    folder: str, repo_id: str, *, private: bool, message: str, branch: str
) -> int:
    """Run the push command; errors become a message and a code.

    Returns:
        0 done, 1 the push failed, 2 it cannot be made, 130 interrupted.
    """
    screen, code = Screen(), BAD_INPUT
    try:
        check_pushed(folder, repo_id)
        from ..hub import check_access, saved_files

        saved_files(Path(folder))
        repo_id = check_access(repo_id, private=private or None)
        code = FAILED
        pushed = _push_on(screen, folder, repo_id, private=private, message=message, branch=branch)
    except KeyboardInterrupt:
        screen.error(f"interrupted; {folder} is as it was, and {repo_id} got no half commit.")
        return INTERRUPTED
    except (HubError, CheckpointError) as error:
        screen.error(str(error))
        return code
    screen.line(f"Pushed: {pushed}")
    return DONE


def _push_on(
    screen: Screen,
    folder: str,
    repo_id: str,
    *,
    private: bool,
    message: str = "",
    branch: str = "main",
) -> Pushed:
    """Push a folder, with the client's progress bars where `screen` is a terminal.

    Raises:
        HubError: It failed; the message says what to do.
    """
    from ..hub import push

    with screen.uploading():
        return push(
            folder,
            repo_id,
            private=private or None,
            commit_message=message or None,
            revision=None if branch == "main" else branch,
        )
