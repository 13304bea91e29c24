"""The console script: parses, shows errors without a traceback, returns an exit code.

Exit codes: 0 done, 1 pruning or verification failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from .options import given_flags, with_recipe_options

app = typer.Typer(
    name="hf-gradnas",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _describe() -> None:
    """Prune Hugging Face models with gradient scores."""


def prune_command(**options: Any) -> int:
    """Prune a model to a budget: score, plan, cut, save.

    For example: hf-gradnas prune --model bert-base-uncased --target flops=50%
    """
    from .prune import prune_from_options

    recipe, settings = options.pop("recipe"), options.pop("settings") or []
    code = prune_from_options(given_flags(options), settings=settings, file=recipe)
    raise typer.Exit(code)


app.command("prune")(with_recipe_options(prune_command))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments after the program's name; ``None`` takes those of the process.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="hf-gradnas")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0
