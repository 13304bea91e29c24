"""The export commands: arguments in, a file and an exit code out."""

from __future__ import annotations

from typing import Any

from ..config.limits import format_amount
from ..errors import GradNASError
from . import BAD_INPUT, DONE, INTERRUPTED
from .show import Screen, quiet_libraries

SHOWN = 4


def export_gguf_from_arguments(folder: str, out: str, **options: Any) -> int:
    """Run the command; errors become a message and a code.

    Args:
        folder: Of the model.
        out: File to write.
        **options: Further arguments of `export.export_gguf`.

    Returns:
        0 done, 2 bad input, 130 interrupted.
    """
    from ..export import export_gguf

    screen = Screen()
    try:
        with quiet_libraries(screen), screen.progress("Writing (MiB)") as progress:
            found = export_gguf(folder, out, progress=progress, **options)
    except KeyboardInterrupt:
        screen.error(f"interrupted; {out} is as it was.")
        return INTERRUPTED
    except GradNASError as error:
        screen.error(str(error))
        return BAD_INPUT
    for note in found.notes:
        screen.warn(note)
    if found.fallen_back:
        names = found.fallen_back
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        screen.line(
            f"In f16, since their rows are no multiple of 32: {', '.join(names[:SHOWN])}{more}."
        )
    screen.line(
        f"Saved: {found.file} ({format_amount(found.size)}B, {found.tensors} tensors in "
        f"{found.type}, architecture {found.architecture})."
    )
    screen.line(f"Run it: llama-cli -m {found.file}")
    return DONE
