"""The table that budgets in milliseconds are read from: given, kept beside the output, or measured.

Measured before the training, so that a budget that cannot be reached costs none; the time of a
model does not depend on its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..pruner import GradNASPruner
from ..running.processes import Processes
from ..types import LATENCY, LatencyTable
from .settings import Settings

logger = logging.getLogger(__name__)


def table_file(target: Path) -> Path:
    """Where a table goes that is measured: beside the cut model."""
    return target.with_name(f"{target.name}.latency.json")


def check_table(settings: Settings, target: Path) -> None:
    """Check that a table that will be measured can be written, before anything is.

    Raises:
        PlanError: Something else is there.
    """
    file = table_file(target)
    is_measured = LATENCY in settings.budget and settings.latency_table is None
    if is_measured and file.exists() and not LatencyTable.is_file(file):
        raise PlanError(
            f"output_dir: {file} is where the table of latencies is saved, and it holds none, and "
            "only tables are replaced; give another output_dir."
        )


def _save(table: LatencyTable, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table.save(file)


def set_latency(
    pruner: GradNASPruner,
    settings: Settings,
    batch: Mapping[str, Any],
    *,
    processes: Processes,
    target: Path,
    resumes: bool,
) -> None:
    """Give the pruner a table where a budget is in milliseconds.

    Args:
        pruner: Of the whole model, which runs as it is saved, in eval mode.
        settings: Of the callback.
        batch: The longest.
        processes: All that train; the main one measures, reads and writes.
        target: Where the cut model is saved.
        resumes: Whether the training goes on from a checkpoint; then it takes the table that it was
            begun with, if that is still there.

    Raises:
        BudgetError: The table is of another model, or this model's times do not add up.
    """
    if LATENCY not in settings.budget:
        return
    file = table_file(target)
    given = settings.latency_table
    if given is None and processes.from_main(lambda: resumes and file.is_file()):
        given = str(file)
    if given is not None:
        table = pruner.use_latency(Path(given).expanduser())
        logger.info("gradnas: latency is planned in %s (%s)", table.said, given)
        return
    size, phase = settings.latency_batch_size, settings.latency_phase
    table = pruner.measure_latency(batch, batch_size=size, phase=phase)
    processes.from_main(partial(_save, table, file))
    logger.info("gradnas: the whole model takes %.4g %s (%s)", table.total_ms, table.said, file)
