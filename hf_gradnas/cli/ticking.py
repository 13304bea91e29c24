"""Progress where there is no terminal: a plain line now and then, of steps that take long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from ..jobs.report import Progress

FIRST_SECONDS = 2.0
"""A step that is shorter says nothing."""
NEXT_SECONDS = 10.0


@contextmanager
def plain_progress(console: Console, what: str) -> Iterator[Progress]:
    """Say what is being done after the first seconds, and how far it is every few more.

    A thread says it, so that a step that counts nothing is told of, too.

    Args:
        console: Where to.
        what: The step, such as ``Scoring``.
    """
    began, ended = time.monotonic(), threading.Event()
    far: list[str] = []

    def note(done: int, total: int | None) -> None:
        far[:] = [f" {done:,} of {total:,}," if total else f" {done:,},"]

    def tick() -> None:
        seconds = FIRST_SECONDS
        while not ended.wait(seconds):
            said = f"{what}:{''.join(far)} {time.monotonic() - began:.0f} s"
            console.print(Text(said), soft_wrap=True)
            seconds = NEXT_SECONDS

    thread = threading.Thread(target=tick, name="hf_gradnas progress", daemon=True)
    thread.start()
    try:
        yield note
    finally:
        ended.set()
        thread.join()
