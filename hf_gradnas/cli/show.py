"""What the command prints: tables, progress, warnings and errors, through rich.

Plain text without control codes where the output is not a terminal.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._redaction import sayable
from ..config.limits import format_amount, format_share
from ..jobs.report import Progress, Report
from .ticking import plain_progress

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from ..jobs.measuring import Metrics
    from ..report import Summary
    from ..types import Budget, CostModel, Plan, Structure

_PLAIN_WIDTH = 110
_REFUSALS_SHOWN = 12
_GAP = 2  # blanks between columns


class Screen(Report):
    """Standard output for results, standard error for warnings and errors.

    Neither secrets nor control characters are shown, and no text is read as markup.

    Args:
        quiet: Print nothing: another process does.
        results: Whether tables and lines go to standard output.
        notes: Whether warnings and progress go to standard error; errors always do.
        last: Whether the last line, what came of it all, goes to standard output.

    Attributes:
        warnings: Every warning so far, shown or not.
        told: What came of it all, and the folder; None: it has not ended.
    """

    def __init__(
        self, *, quiet: bool = False, results: bool = True, notes: bool = True, last: bool = True
    ) -> None:
        self.out = _console(stderr=False, quiet=quiet or not results)
        self.err = _console(stderr=True, quiet=quiet)
        self.end = _console(stderr=False, quiet=quiet or not last)
        self.notes = notes
        self.warnings: list[str] = []
        self.told: tuple[Summary, str | None] | None = None

    def line(self, text: str = "", *, style: str | None = None) -> None:
        """One line, never broken, so that paths in it can be copied."""
        self.out.print(Text(sayable(text), style=style or ""), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning."""
        self.warnings.append(sayable(text))
        if self.notes:
            self.err.print(Text(sayable(f"Warning: {text}"), style="yellow"), soft_wrap=True)

    def error(self, text: str) -> None:
        """An error; the run ends."""
        self.err.print(Text(sayable(f"Error: {text}"), style="bold red"), soft_wrap=True)

    def table(
        self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0
    ) -> None:
        """A table whose last `right` columns hold numbers; no word in it is broken.

        A last column without header and content is left out.
        """
        if not any(row[-1] for row in rows) and not headers[-1]:
            headers, rows, right = headers[:-1], [row[:-1] for row in rows], right - 1
        table = Table(
            title=Text(sayable(title), style="table.title"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, header in enumerate(headers):
            justify: JustifyMethod = "right" if index >= len(headers) - right else "left"
            cells = [sayable(cell) for cell in (header, *(row[index] for row in rows))]
            longest = max(cell_len(word) for cell in cells for word in cell.split() or [""])
            table.add_column(
                Text(cells[0]),
                justify=justify,
                overflow="fold",
                min_width=longest,
                no_wrap=not any(" " in cell for cell in cells),
            )
        for row in rows:
            table.add_row(*(Text(sayable(cell)) for cell in row))
        needed = sum((column.min_width or 0) + _GAP for column in table.columns) + _GAP
        self.out.print(table, width=max(self.out.width, needed), crop=False)

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A progress bar on a terminal; elsewhere a plain line now and then, if it takes long."""
        if self.err.quiet or not self.notes:
            yield lambda done, total: None
        elif self.err.is_terminal:
            with _bar(self.err, sayable(what)) as progress:
                yield progress
        else:
            with plain_progress(self.err, sayable(what)) as progress:
                yield progress

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """The client's progress bars where errors go to a terminal."""
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        shown = self.err.is_terminal and not self.err.quiet
        if shown or are_progress_bars_disabled():
            yield
            return
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()

    def settings(self, settings: Sequence[tuple[str, str, str]]) -> None:
        """Every option that matters for this run, and where its value comes from."""
        self.table("Settings", ("option", "value", "from"), settings)

    def structure(self, structure: Structure, layout: str, reason: str) -> None:
        """How much was found, the layout with its reason, and what was refused."""
        from ..report.layers import merge_layers

        kinds: dict[str, list[int]] = {}
        for axis in structure.axes:
            kinds.setdefault(str(axis.kind), []).append(axis.size)
        found = ", ".join(
            f"{sum(sizes):,} {kind} in {len(sizes)} modules" for kind, sizes in kinds.items()
        )
        self.line(f"Found and proved: {found}.")
        self.line(reason or f"Layout {layout}, as asked.")
        if structure.refusals:
            refused = merge_layers([(r.module, str(r.kind), r.reason) for r in structure.refusals])
            rows, hidden = refused[:_REFUSALS_SHOWN], len(refused[_REFUSALS_SHOWN:])
            if hidden:
                rows.append((f"and {hidden} more", "", ""))
            self.table("Seen but not pruned", ("module", "kind", "reason"), rows)

    def plan(self, plan: Plan, structure: Structure) -> None:
        """Kept units per axis, in the model's order; equal layers in one row."""
        from ..report.layers import merge_layers

        rows = []
        for axis in structure.axes:
            kept = len(plan.kept[axis.name])
            share = format_share(kept / axis.size)
            rows.append((axis.module, str(axis.kind), f"{kept:,}/{axis.size:,}", share))
        self.table("Plan", ("module", "axis", "kept", "share"), merge_layers(rows), right=2)

    def costs(
        self, plan: Plan, totals: Mapping[str, float], costs: Mapping[str, CostModel]
    ) -> None:
        """Each cost before and after, with its budget and the smallest step of the layout."""
        from ..report import say_prediction

        budgets: dict[str, Budget] = {budget.cost: budget for budget in plan.budgets}
        rows = []
        for name in costs:
            before, after = totals[name], plan.costs.get(name, costs[name].of(plan.counts()))
            budget = budgets.get(name)
            step = plan.steps.get(name)
            rows.append(
                (
                    name,
                    format_amount(before),
                    format_amount(after),
                    format_share(after / before, digits=2),
                    f"{format_amount(budget.limit)} ({budget.ratio:.1%})" if budget else "-",
                    f"{step / before:.2%}" if step else "-",
                )
            )
        headers = ("cost", "before", "after", "kept", "budget", "smallest step")
        self.table(f"Costs ({plan.layout})", headers, rows, right=5)
        self.line(
            say_prediction(plan.loss_increase, plan.loss_unit, plan.loss_before, score=plan.score)
        )

    def metrics(self, columns: Mapping[str, Metrics], measured_on: str) -> None:
        """Loss and accuracy or perplexity, one column per state of the model.

        Args:
            columns: Metrics by state.
            measured_on: What the examples are, after their number.
        """
        from ..report.sentences import with_errors

        first = next(iter(columns.values()))
        found = [with_errors(metrics.to_dict()) for metrics in columns.values()]
        rows = [
            (name, *(f"{metrics[name]:.4f}" for metrics in found))
            for name in found[0]
            if name != "examples"
        ]
        title = f"Evaluation on {first.examples:,} examples"
        self.table(title, ("metric", *columns), rows, right=len(columns))
        errors = any(name.startswith("±") for name, *_ in rows)
        said = " (±: one standard error, from their number)" if errors else ""
        self.line(f"Measured on {first.examples:,} examples {measured_on}{said}.")
        if first.agreement is not None:
            self.line(
                "There are no labels of the data: those that the whole model predicts take their "
                "place, and agreement is how often the other states predict the same."
            )

    def latency(self, latency: Mapping[str, Any]) -> None:
        """Median time of a forward before and after, per batch size."""
        from ..report.sentences import say_skipped, say_speedup

        rows = []
        for found in latency["batches"]:
            before, after = found["before_ms"], found["after_ms"]
            row = (f"{found['batch_size']}", f"{before:.1f} ms", f"{after:.1f} ms")
            rows.append((*row, say_speedup(before / after)))
        headers = ("batch size", "before", "after", "speed-up")
        if rows:
            self.table("Latency", headers, rows, right=4)
            order = "both models in turn" if latency["in_turn"] else "one model after the other"
            self.line(f"Median time of a forward ({latency['machine']}; {order}).")
        if latency["skipped"]:
            self.line(say_skipped(latency["skipped"]))

    def outcome(self, summary: Summary, folder: str | None) -> None:
        """The last line: what is left, what it is worth, how fast it is, and where."""
        from ..report import headline

        self.told = summary, folder
        where = "; no model was written" if folder is None else f": {folder}"
        text = Text(sayable(f"{headline(summary)}{where}"), style="bold green")
        self.end.print(text, soft_wrap=True)


@contextmanager
def shown_warnings(screen: Screen) -> Iterator[None]:
    """Show Python's warnings on `screen`."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: screen.warn(str(message))
        yield


@contextmanager
def quiet_libraries(screen: Screen) -> Iterator[None]:
    """Show warnings on `screen`, and none of the libraries' own progress bars and logs."""
    import datasets as datasets_bars
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    verbosities = (transformers_logging, datasets_logging)
    previous = [module.get_verbosity() for module in verbosities]
    bars = transformers_logging.is_progress_bar_enabled()
    with shown_warnings(screen):
        try:
            for module in verbosities:
                module.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            with _without_bars(datasets_bars):
                yield
        finally:
            for module, level in zip(verbosities, previous, strict=True):
                module.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Progress]:
    """A bar that is gone at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console(*, stderr: bool, quiet: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, highlight=False, quiet=quiet, width=_PLAIN_WIDTH)
    return console


@contextmanager
def _without_bars(bars: Any) -> Iterator[None]:
    was_on = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bars()
