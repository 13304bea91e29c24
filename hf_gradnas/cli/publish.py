"""Pushes a saved model to the Hub: the push command, and the end of the prune command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, HubError
from ..jobs.early import check_pushed
from . import BAD_INPUT, DONE, FAILED, INTERRUPTED
from .show import Screen

if TYPE_CHECKING:
    from ..hub import Pushed


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
        pushed = push_on(screen, folder, repo_id, private=private, message=message, branch=branch)
    except KeyboardInterrupt:
        screen.error(f"interrupted; {folder} is as it was, and {repo_id} got no half commit.")
        return INTERRUPTED
    except (HubError, CheckpointError) as error:
        screen.error(str(error))
        return code
    screen.line(f"Pushed: {pushed}")
    return DONE


def push_on(
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
