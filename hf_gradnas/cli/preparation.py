"""Everything that is checked and opened before the first batch runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.targets import check_target
from ..config.budgets import parse_budgets
from ..config.recipe import Recipe
from ..errors import DataError, RecipeError, ScoresError
from ..types import Scores
from .columns import Columns, choose_columns
from .datasets import BUNDLED, open_bundled, open_dataset
from .encoding import ENCODERS
from .examples import Examples, Feed
from .files import Rows
from .labels import check_same_numbers
from .loading import Source, best_device, open_source, prepare_tokenizer, resolve_max_length
from .media import encode_audio, encode_image
from .quickstart import NAME as QUICKSTART
from .tasks import Head

COSTS = ("flops", "params")
# A file of running text has no rows; so many tokens a row at least are assumed of a Hub data set.
_TOKENS_PER_ROW = 8


@dataclass(frozen=True)
class Job:
    """A run that passed every check which needs no weights.

    Attributes:
        recipe: With every default that was taken filled in.
        source: Config, class, task and processor.
        folder: Where the model is loaded from.
        calibration: Examples to score on.
        evaluation: Examples to measure on, if any.
        recovery: Examples to train the pruned model on, if that was asked for.
        labels: ``"data"`` or ``"model"``.
        scores: Scores of an earlier run, if they were given.
        settings: Rows for the table of settings: option, value, where it comes from.
        notes: What was decided on the way.
    """

    recipe: Recipe
    source: Source
    folder: str
    calibration: Examples
    evaluation: Examples | None
    recovery: Examples | None
    labels: str
    scores: Scores | None
    settings: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()


def resolve_paths(recipe: Recipe) -> Recipe:
    """Fill in where the results go, ``~`` resolved, and check what needs neither model nor data.

    Raises:
        RecipeError: The output is the model itself, or no scores file can stand there.
        BudgetError: A target cannot be read.
        CheckpointError: The output exists and `overwrite` is off, or is not writable.
    """
    parse_budgets(recipe.target, dict.fromkeys(COSTS, math.inf))
    if recipe.training is not None:
        raise RecipeError(
            "training: the recipe is for a Trainer, and this command does not train; give it to "
            "GradNASCallback.from_recipe, or leave `training` out of it."
        )
    name = _folder_name(Path(recipe.model).expanduser()) if _is_local(recipe.model) else ""
    default = f"./{name or recipe.model.rstrip('/').rsplit('/', 1)[-1]}-gradnas"
    output = _without_tilde(recipe.output or default)
    save_scores = _without_tilde(recipe.save_scores or f"{output.rstrip('/')}.scores.safetensors")
    scores = recipe.scores and _without_tilde(recipe.scores)
    if _is_local(recipe.model) and Path(output).resolve() == Path(recipe.model).resolve():
        raise RecipeError(
            f"--output {output}: is the folder of the model itself; give another folder, the "
            "original is kept."
        )
    if not recipe.dry_run:
        check_target(output, overwrite=recipe.overwrite)
    if recipe.scores is None:
        folder = Path(save_scores).absolute().parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            given = f"--save-scores {save_scores}"
            given = given if recipe.save_scores else f"--output {output}"
            raise RecipeError(
                f"{given}: {folder} is not a folder that can be written to; "
                "make it, or give another file."
            )
    own = {"output": output, "save_scores": save_scores, "scores": scores}
    return recipe.model_copy(update=own)


def _folder_name(folder: Path) -> str:
    """A folder's name as it was given; that of a link is the link's."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _without_tilde(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def read_scores(recipe: Recipe, *, given: Set[str]) -> Scores | None:
    """Scores of an earlier run, if the recipe names a file.

    Raises:
        ScoresError: The file is missing, damaged, or holds another score than was asked for.
    """
    if recipe.scores is None:
        return None
    if not Path(recipe.scores).is_file():
        raise ScoresError(
            f"--scores {recipe.scores}: there is no such file; leave --scores away to score."
        )
    scores = Scores.load(recipe.scores)
    method = scores.metadata.get("method", recipe.score)
    if "score" in given and method != recipe.score:
        raise ScoresError(
            f"--scores {recipe.scores}: holds {method!r} scores, but --score {recipe.score} was "
            "asked for; leave one of the two away."
        )
    return scores


def prepare(recipe: Recipe, *, folder: str, given: Set[str]) -> Job:
    """Open model config, processor and data, and settle every default.

    Args:
        recipe: With its paths resolved.
        folder: Where the model is: its Hub id or folder, or that of the quickstart model.
        given: Names of the options that were given; the others are defaults.

    Raises:
        RecipeError: The model, task or length does not fit.
        DataError: The data does not fit.
        ScoresError: The scores file cannot be used.
    """
    scores = read_scores(recipe, given=given)
    source = open_source(recipe, folder)
    padding = prepare_tokenizer(source)
    max_length = resolve_max_length(recipe, source)
    flops_length = recipe.flops_length or max_length
    labels = _resolve_labels(recipe, source)
    filled = recipe.model_copy(
        update={
            "max_length": max_length,
            "flops_length": flops_length,
            "labels": labels,
            "device": recipe.device or best_device(),
            "task": recipe.task or source.task.name,
            "score": scores.metadata.get("method", recipe.score) if scores else recipe.score,
        }
    )
    rows = _open_training_split(filled, source, filled.num_examples)
    feed, columns = _feed(rows, filled, source, labelled=labels == "data")
    calibration = encode(feed)
    notes = [*rows.notes, *([calibration.note] if calibration.note else [])]
    if source.head_is_unknown:
        notes.append(
            f"no task is known for {source.cls.__name__}: labels are sampled from its own output"
        )
    evaluation = _open_evaluation(filled, source)
    if evaluation is not None:
        check_same_numbers(calibration.names, evaluation.names)
        if evaluation.note not in (None, calibration.note):
            notes.append(f"evaluation: {evaluation.note}")
    recovery = _open_recovery(filled, source)
    if recovery is not None:
        notes.append(f"the pruned model is recovered on {len(recovery)} examples")
    return Job(
        filled,
        source,
        folder,
        calibration,
        evaluation,
        recovery,
        labels,
        scores,
        _settings(filled, given, source, columns, calibration, padding),
        tuple(notes),
    )


def encode(feed: Feed) -> Examples:
    """Examples of a feed, by what the model takes."""
    media: dict[str, Callable[[Feed], Examples]] = {"image": encode_image, "audio": encode_audio}
    encoder = media.get(feed.source.input) or ENCODERS[feed.source.task.head]
    return encoder(feed)


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists() and name != QUICKSTART


def _resolve_labels(recipe: Recipe, source: Source) -> str:
    head = source.task.head
    has_labels = recipe.dataset is not None and head is not Head.BASE
    plain_text = head.makes_text and source.input == "text"
    if recipe.labels is None:
        return "data" if has_labels or plain_text else "model"
    if recipe.labels == "data" and not (has_labels or plain_text):
        found = "no --dataset" if head is not Head.BASE else "a model without a head"
        raise DataError(
            f"--labels data: found {found}, so there are no labels; give --dataset with a label "
            "column, or --labels model."
        )
    return recipe.labels


def _open_training_split(recipe: Recipe, source: Source, examples: int | None) -> Rows:
    """Rows for so many examples at least; None: all rows."""
    if recipe.dataset is not None:
        return open_dataset(
            recipe.dataset,
            split=recipe.split,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            take=None if examples is None else _rows_needed(examples, recipe, source),
        )
    if source.input != "text":
        raise DataError(
            f"--model {recipe.model}: {source.cls.__name__} takes {source.input}, and only text "
            f"comes with this package; give --dataset with --{source.input}-column"
            + (" and --target-column." if source.task.head is Head.SEQ2SEQ else ".")
        )
    return open_bundled()


def _open_evaluation(recipe: Recipe, source: Source) -> Examples | None:
    name = recipe.eval_dataset or (recipe.dataset if recipe.eval_split else None)
    if name is None:
        if recipe.eval_split:
            raise RecipeError(
                f"--eval-split {recipe.eval_split}: there is no data set to take it from; give "
                "--eval-dataset, or --dataset."
            )
        return None
    if source.task.head is Head.BASE:
        raise DataError(
            f"--eval-dataset {name}: {source.cls.__name__} has no head whose loss could be "
            "measured; leave it away, or give --task."
        )
    limit = recipe.eval_num_examples
    rows = open_dataset(
        name,
        split=recipe.eval_split or "validation",
        seed=recipe.seed,
        take=None if limit is None else _rows_needed(limit, recipe, source),
    )
    changed = recipe.model_copy(update={"num_examples": limit or len(rows.dataset) * 10**6})
    changed = changed.model_copy(update={"shuffle": False})
    feed, _ = _feed(rows, changed, source, labelled=True)
    return encode(feed)


def _open_recovery(recipe: Recipe, source: Source) -> Examples | None:
    """Examples to train on after the cut: more of what is calibrated on."""
    if not recipe.recover_epochs or recipe.dry_run:
        return None
    from ..repair.lora import check_lora

    check_lora(recipe.recover_lora_rank)
    limit = recipe.recover_num_examples
    rows = _open_training_split(recipe, source, limit)
    # Running text has more examples than lines, but fewer than characters.
    changed = recipe.model_copy(update={"num_examples": limit or 10**12})
    feed, _ = _feed(rows, changed, source, labelled=recipe.labels == "data")
    return encode(feed)


def _rows_needed(examples: int, recipe: Recipe, source: Source) -> int:
    if source.task.head is Head.CAUSAL:
        return examples * max(1, (recipe.max_length or 1) // _TOKENS_PER_ROW)
    return examples


def _feed(rows: Rows, recipe: Recipe, source: Source, *, labelled: bool) -> tuple[Feed, Columns]:
    head = source.task.head
    prose = rows.text is not None and (head.makes_text or rows.origin == BUNDLED)
    prose = prose and source.input == "text"
    if prose:
        columns = Columns(text=("text",))
    else:
        columns = choose_columns(rows, recipe, head=head, feeds=source.input, labelled=labelled)
    feed = Feed(
        rows,
        columns,
        source,
        recipe.max_length or 1,
        labelled=labelled,
        prose=prose,
        limit=recipe.num_examples,
        shuffle=recipe.shuffle,
        seed=recipe.seed,
        label_map=recipe.label_map,
    )
    return feed, columns


def _count(found: int, wanted: int) -> str:
    return str(found) if found == wanted else f"{found} (all there are; at most {wanted})"


def _settings(
    recipe: Recipe,
    given: Set[str],
    source: Source,
    columns: Columns,
    calibration: Sized,
    padding: str | None,
) -> tuple[tuple[str, str, str], ...]:
    """Rows of the table of settings; what was not given is marked as a default."""
    shown: dict[str, Any] = {
        "model": recipe.model,
        "task": recipe.task,
        "trust_remote_code": "yes, code of the model is run" if recipe.trust_remote_code else None,
        "dataset": recipe.dataset or BUNDLED,
        "split": recipe.split if recipe.dataset else None,
        "num_examples": _count(len(calibration), recipe.num_examples),
        "shuffle": "yes" if recipe.shuffle else "no, the first in file order",
        "batch_size": recipe.batch_size,
        "max_length": recipe.max_length if source.tokenizer is not None else None,
        "labels": _LABELS[recipe.labels or "data"],
        "label_map": ",".join(f"{name}={id_}" for name, id_ in recipe.label_map.items()) or None,
        "eval_dataset": recipe.eval_dataset,
        "eval_split": recipe.eval_split,
        "target": ", ".join(f"{name}={limit}" for name, limit in recipe.target.items()),
        "flops_length": recipe.flops_length if source.tokenizer is not None else None,
        "score": recipe.score,
        "search": recipe.search,
        "layout": recipe.layout,
        "exclude": ", ".join(recipe.exclude) or None,
        "min_units": recipe.min_units,
        "scores": recipe.scores,
        "save_scores": None if recipe.scores else recipe.save_scores,
        "device": recipe.device,
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
    from ..repair.arguments import LEARNING_RATE, LORA_LEARNING_RATE

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
