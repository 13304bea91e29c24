"""What ends a command from outside: SIGTERM, and a place that has no room for what is printed."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from . import DONE, FAILED, INTERRUPTED, TERMINATED
from .launchers import process_count

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run_stoppable(command: Callable[[], object]) -> int:
    """Run a command so that SIGTERM ends it as Ctrl-C does; only the code is another.

    It then says what is left, and neither processes nor folders of its own outlive it. One of
    several processes is left to its launcher, which waits for none that waits for the others.

    Args:
        command: Says its exit code by `SystemExit`, as Typer does.

    Returns:
        The exit code.
    """
    if not _is_free():
        return _run(command)
    came = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        code = _run(command)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return TERMINATED if came and code == INTERRUPTED else code


def _is_free() -> bool:
    """Whether nobody else handles the signal; handlers are of the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    return process_count() == 1 and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _run(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = error.filename or "standard output, or a folder for temporary files"
        sys.stderr.write(f"Error: {place}: {os.strerror(error.errno)}; free some space.\n")
        _forget_output()
        return FAILED
    return DONE


def _forget_output() -> None:
    """Drop what cannot be written, or Python tries, and complains, once more at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
