"""Keeps the scores of a pass in their file while it runs, and where it is stopped."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import GradNASWarning
from .state import Record, State

TERMINATED = 143
"""Exit code of a process that SIGTERM ended, as a shell gives it."""


@contextmanager
def kept(record: Record, state: State, every_s: float) -> Iterator[Callable[[State], None]]:
    """Write the latest state now and then, on Ctrl-C and on SIGTERM; yields what takes each state.

    A write that fails is a warning, once, and scoring goes on. Several processes write only now and
    then, when the main one's clock says so: a signal may find them at different places.
    """
    latest, saved_at, has_warned = state, time.monotonic(), False
    processes = record.processes

    def attempt() -> None:
        nonlocal has_warned
        said = record.attempt(latest)
        if said and not has_warned and processes.is_main:
            warnings.warn(
                f"{said} Scoring goes on, and tries again; if it is stopped before, it starts over "
                "from what the file holds.",
                GradNASWarning,
                stacklevel=2,
            )
            has_warned = True

    def keep(state: State) -> None:
        nonlocal latest, saved_at
        latest = state
        if record.file is None:
            return
        is_due = time.monotonic() - saved_at >= every_s
        if processes.gather([is_due])[0, 0]:
            attempt()
            saved_at = time.monotonic()

    may_stop = record.file is not None and processes.count == 1
    try:
        with _terminable(may_stop):
            yield keep
    except (KeyboardInterrupt, SystemExit):
        if may_stop and latest is not state:
            attempt()
        raise


@contextmanager
def _terminable(is_on: bool) -> Iterator[None]:
    """SIGTERM raises ``SystemExit(TERMINATED)``, unless the program handles it by itself.

    Raises:
        SystemExit: The signal came.
    """
    is_main = threading.current_thread() is threading.main_thread()  # Python's rule for handlers
    if not (is_on and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
