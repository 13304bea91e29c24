"""What a run tells while it runs, and what it says of itself: settings, options and its command.

A screen is one who listens. Knows no terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config.recipe import BY_FLAG_ONLY, NOT_FLAGS, Recipe
from ..config.recipe_files import shareable, to_dict
from ..data.columns import Columns
from ..data.datasets import BUNDLED
from ..data.loading import Source

if TYPE_CHECKING:
    from ..report import Summary
    from ..types import CostModel, Plan, Structure
    from .measuring import Metrics
    from .preparation import Job


Progress = Callable[[int, "int | None"], None]


class Report:
    """Listens to a run and says nothing; override what is to be heard."""

    def line(self, text: str = "") -> None:
        """A sentence about what was done."""

    def warn(self, text: str) -> None:
        """A sentence about what makes the result worse than it need be."""

    def notes_of(self, job: Job) -> None:
        """What was decided on the way to a job, and what makes its result worse."""
        for note in job.notes:
            self.line(f"Note: {note}.")
        for warning in job.warnings:
            self.warn(warning)

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A step that takes a while; what is yielded is called with units done and their number."""
        yield lambda done, total: None

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """The time in which the Hub's client sends files, with progress bars of its own."""
        yield

    def settings(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Every option that matters: its flag, its value, and where that comes from."""

    def structure(self, structure: Structure, layout: str, reason: str) -> None:
        """What can be pruned, what was refused, and the layout with its reason."""

    def plan(self, plan: Plan, structure: Structure) -> None:
        """Which units stay."""

    def costs(
        self, plan: Plan, totals: Mapping[str, float], costs: Mapping[str, CostModel]
    ) -> None:
        """Each cost before and after."""

    def metrics(self, columns: Mapping[str, Metrics], measured_on: str) -> None:
        """Loss and metric by state of the model, and what they were measured on."""

    def latency(self, latency: Mapping[str, Any]) -> None:
        """Median time of a forward before and after, as `costs.latency.Timing.end` gives it."""

    def outcome(self, summary: Summary, folder: str | None) -> None:
        """What came of it all, at the very end, and where it is; None: nothing was written."""


# --- what a run says of itself --------------------------------------------------------------------


def record(recipe: Recipe, job: Job, given: frozenset[str]) -> dict[str, Any]:
    """What the command adds to ``gradnas.json``, apart from what it measures."""
    from ..report import fetch_card

    fetch_card(job.folder, revision=recipe.revision)
    recipe = shareable(recipe)
    return {
        "command": command_line(recipe, given),
        "recipe": to_dict(recipe),
        **data_of(recipe, job),
    }


def data_of(recipe: Recipe, job: Job) -> dict[str, Any]:
    """What was scored and measured on."""
    calibration = {
        "dataset": recipe.dataset or "bundled text",
        "examples": len(job.calibration),
        "labels": job.labels,
    }
    if job.evaluation is None:
        return {"calibration": calibration}
    own = None if job.evaluation.held_out else recipe.eval_dataset
    name = own or recipe.dataset or "bundled text"
    evaluation = {"dataset": name, **job.evaluation.to_dict()}
    return {"calibration": calibration, "evaluation": evaluation}


def command_line(recipe: Recipe, given: Iterable[str]) -> str:
    """The command that sets these options of a recipe to what they are, but for `BY_FLAG_ONLY`."""
    return shlex.join(["hf-gradnas", "prune", *words_of(recipe, given)])


def words_of(recipe: Recipe, given: Iterable[str]) -> list[str]:
    """Flags and values that set these options to what they are."""
    parts: list[str] = []
    for name in Recipe.model_fields:
        value = vars(recipe)[name]
        if name not in given or name in {*NOT_FLAGS, *BY_FLAG_ONLY} or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parts += [flag] if value else [f"--no-{flag[2:]}"]
        elif isinstance(value, Mapping):
            parts += [part for key, item in value.items() for part in (flag, f"{key}={item}")]
        elif isinstance(value, tuple):
            parts += [part for item in value for part in (flag, str(item))]
        else:
            parts += [flag, str(value)]
    return parts


# --- the table of settings ------------------------------------------------------------------------


def _count(found: int, wanted: int, held_out: int) -> str:
    if found == wanted:
        return str(found)
    rest = f"{held_out} more are held out" if held_out else "all there are"
    return f"{found} ({rest}; at most {wanted})"


def _measured_on(recipe: Recipe, held_out: int) -> str | None:
    """The data that is measured on, in words."""
    if held_out:
        return f"{held_out} examples held out from --dataset"
    return recipe.eval_dataset


def settings_of(
    recipe: Recipe,
    given: Set[str],
    source: Source,
    columns: Columns,
    calibration: Sized,
    padding: str | None,
    *,
    held_out: int = 0,
) -> tuple[tuple[str, str, str], ...]:
    """Rows of the table of settings; what was not given is marked as a default."""
    shown: dict[str, Any] = {
        "model": recipe.model,
        "task": recipe.task,
        "allow_new_head": "yes" if recipe.allow_new_head else None,
        "trust_remote_code": "yes, code of the model is run" if recipe.trust_remote_code else None,
        "dataset": recipe.dataset or BUNDLED,
        "split": recipe.split if recipe.dataset else None,
        "num_examples": _count(len(calibration), recipe.num_examples, held_out),
        "shuffle": "yes" if recipe.shuffle else "no, the first in file order",
        "batch_size": recipe.batch_size,
        "max_length": recipe.max_length if source.tokenizer is not None else None,
        "labels": _LABELS[recipe.labels or "data"],
        "label_map": ",".join(f"{name}={id_}" for name, id_ in recipe.label_map.items()) or None,
        "eval": None if recipe.eval else "no",
        "eval_dataset": _measured_on(recipe, held_out) if recipe.eval else None,
        "eval_split": recipe.eval_split,
        "target": ", ".join(f"{name}={limit}" for name, limit in recipe.target.items()),
        "flops_length": recipe.flops_length if source.tokenizer is not None else None,
        **{name: vars(recipe)[name] for name in ("score", "search", "layout", "repair")},
        "axes": ", ".join(recipe.axes) or None,
        "exclude": ", ".join(recipe.exclude) or None,
        "min_units": recipe.min_units,
        "multiple": ", ".join(f"{kind}={n}" for kind, n in recipe.multiple.items()) or None,
        "scores": recipe.scores,
        "save_scores": None if recipe.scores else recipe.save_scores,
        "checkpointing": "yes, layers run again in the backward" if recipe.checkpointing else None,
        "device": None if recipe.device_map else recipe.device,
        "device_map": recipe.device_map,
        "max_memory": ", ".join(recipe.max_memory) or None,
        "dtype": recipe.dtype,
        **(_recovery_settings(recipe) if recipe.recover_epochs else {}),
        "seed": recipe.seed,
        "output": None if recipe.dry_run else recipe.output,
        "overwrite": "yes, what is in the output is replaced" if recipe.overwrite else None,
        "report": None if recipe.dry_run or recipe.report else "no",
    }
    rows = [
        ("--" + name.replace("_", "-"), str(value), "given" if name in given else "default")
        for name, value in shown.items()
        if value is not None
    ]
    rows.insert(1, ("class", source.cls.__name__, "--task" if "task" in given else "config"))
    if str(columns):
        rows.insert(3, ("columns", str(columns), "found"))
    if padding:
        rows.append(("pad token", padding, "found"))
    return tuple(rows)


def _recovery_settings(recipe: Recipe) -> dict[str, Any]:
    from ..repair.recovery import LEARNING_RATE, LORA_LEARNING_RATE

    adapters = recipe.recover_lora_rank is not None
    default = LORA_LEARNING_RATE if adapters else LEARNING_RATE
    return {
        "recover_epochs": recipe.recover_epochs,
        "recover_num_examples": recipe.recover_num_examples or "all",
        "recover_batch_size": recipe.recover_batch_size,
        "recover_learning_rate": recipe.recover_learning_rate or default,
        "recover_temperature": recipe.recover_temperature,
        "recover_alpha": recipe.recover_alpha,
        "recover_hidden_weight": recipe.recover_hidden_weight,
        "recover_lora_rank": recipe.recover_lora_rank,
    }


_LABELS = {"data": "data: as the head needs them", "model": "model: sampled from its prediction"}


def push_settings(repository: str | None, *, private: bool) -> list[tuple[str, str, str]]:
    """Rows for the table of settings: where the result of a run will be pushed to."""
    if repository is None:
        return []
    rows = [("--push-to-hub", repository, "given")]
    return [*rows, ("--private", "yes", "given")] if private else rows
