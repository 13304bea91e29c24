"""The table that budgets in milliseconds are read from: a file that is given, or measured here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from ..errors import RecipeError
from ..types import LATENCY

if TYPE_CHECKING:
    from ..pruner import GradNASPruner
    from .report import Report


def check_latency(recipe: Recipe) -> None:
    """Check that the table can be read, or that one can be written, before anything is loaded.

    Raises:
        BudgetError: The file that is given is missing, or holds none.
        RecipeError: What is where the table goes is none.
    """
    from ..types import LatencyTable

    if recipe.latency_table is not None:
        LatencyTable.load(Path(recipe.latency_table).expanduser())
    elif LATENCY in recipe.target and recipe.output is not None:
        file = table_file(recipe.output)
        if file.exists() and not LatencyTable.is_file(file):
            raise RecipeError(
                f"--output: {file} is where the table of latencies is saved, and it holds none, "
                "and only tables are replaced; give another output."
            )


def table_file(output: str) -> Path:
    """Where a table goes that is measured: beside the output."""
    return Path(f"{output.rstrip('/')}.latency.json")


def set_latency(
    pruner: GradNASPruner,
    recipe: Recipe,
    batch: Mapping[str, Any],
    *,
    length: int | None,
    report: Report,
) -> None:
    """Give the pruner a table where a budget is in milliseconds.

    Raises:
        BudgetError: The table is of another model or device, or this model's times do not add up.
    """
    if LATENCY not in recipe.target:
        return
    if recipe.latency_table is not None:
        file = Path(recipe.latency_table).expanduser()
        table = pruner.use_latency(file, device=recipe.device)
        report.line(f"Latency is planned in {table.said} ({file}).")
        return
    given: dict[str, Any] = {"batch_size": recipe.latency_batch_size, "length": length}
    with report.progress("Measuring latency") as progress:
        table = pruner.measure_latency(
            batch, phase=recipe.latency_phase, progress=progress, **given
        )
    where = ""
    if recipe.output is not None:
        file = table_file(recipe.output)
        where = f" The table: {file} (--latency-table)."
        pruner.save_latency(table, file)
    report.line(f"The whole model takes {table.total_ms:.4g} {table.said}.{where}")
