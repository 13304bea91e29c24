"""What a model is scored on and measured on: from the name of a data set to batches.

The command reads its options here; `calibration_batches` does the same for a model in memory. What
is measured on is a data set of its own, or examples that are held out from scoring.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..errors import DataError, RecipeError
from ..types import Scores
from .columns import Columns, choose_columns
from .datasets import BUNDLED, open_bundled, open_dataset
from .encoding import ENCODERS
from .examples import Example, Examples, Feed, make_loader
from .files import Rows
from .loading import Source, prepare_tokenizer, resolve_max_length
from .media import encode_audio, encode_image
from .tasks import TASKS, Head, input_of, named_task, task_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from .files import Rows


# A file of running text has no rows; so many tokens a row at least are assumed of a Hub data set.
_TOKENS_PER_ROW = 8
# Fields of `Recipe` that are about the data of a model in memory.
_OPTIONS = (
    *("task", "split", "text_column", "label_column", "target_column", "image_column"),
    *("audio_column", "num_examples", "shuffle", "batch_size", "max_length", "labels"),
    *("label_map", "seed"),
)


def calibration_batches(
    model: PreTrainedModel, processing_class: Any, dataset: str | None = None, **options: Any
) -> DataLoader[Example]:
    """Batches of a data set, encoded for the task of a model in memory.

    Args:
        model: Its class and config say the task, unless ``task=`` does.
        processing_class: Its tokenizer, image processor, feature extractor or processor.
        dataset: A file, a folder, or ``name[:config]`` of the Hub; None: the text that comes with
            this package.
        **options: Further fields of `Recipe` that are about data: ``task``, ``split``,
            ``text_column``, ``num_examples``, ``batch_size``, ``max_length``, ``labels``, …

    Returns:
        A loader of dicts for ``model(**batch)``: integers of shape (batch, length), padded per
        batch, in the order of the data. Use it with ``GradNASPruner.score`` or ``prune``.

    Raises:
        DataError: The data is not there, or does not fit the task.
        RecipeError: An option that cannot be used.

    Example:
        >>> loader = calibration_batches(model, tokenizer, "sst2.tsv")  # doctest: +SKIP
        >>> GradNASPruner(model).prune(loader, {"flops": "60%"})        # doctest: +SKIP
    """
    name = model.name_or_path or type(model).__name__
    for option in sorted(options.keys() - set(_OPTIONS)):
        (close,) = get_close_matches(option, _OPTIONS, n=1, cutoff=0.0)
        raise RecipeError(
            f"calibration_batches: {option} is no option about data (did you mean {close!r}?); "
            f"known are {', '.join(_OPTIONS)}."
        )
    recipe = build_recipe({"model": name, "dataset": dataset, **options})
    source = _source_of(model, processing_class, recipe.task)
    prepare_tokenizer(source)
    known = {"max_length": resolve_max_length(recipe, source)}
    recipe = recipe.model_copy(update={**known, "labels": resolve_labels(recipe, source)})
    rows = open_calibration_rows(recipe, source, recipe.num_examples)
    feed, _ = feed_of(rows, recipe, source, labelled=recipe.labels == "data")
    return make_loader(encode(feed), source, model, batch_size=recipe.batch_size)


def _source_of(model: PreTrainedModel, processing_class: Any, name: str | None) -> Source:
    """What `loading.open_source` reads from a folder, of a model in memory."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # a model that was not loaded has none yet
    known = named_task(name) if name else task_of(config)
    feeds = input_of(type(model), config, known)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if feeds != "text" and tokenizer is processing_class:
        tokenizer = None
    task = known or TASKS["feature-extraction"]
    unknown = known is None
    return Source(config, type(model), task, feeds, processing_class, tokenizer, unknown)


def encode(feed: Feed) -> Examples:
    """Examples of a feed, by what the model takes."""
    media: dict[str, Callable[[Feed], Examples]] = {"image": encode_image, "audio": encode_audio}
    encoder = media.get(feed.source.input) or ENCODERS[feed.source.task.head]
    return encoder(feed)


def resolve_labels(recipe: Recipe, source: Source) -> str:
    """Whether labels come from the data or from the model, by what was asked and what is there.

    Raises:
        DataError: Labels of the data were asked for, and there are none.
    """
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


def open_calibration_rows(recipe: Recipe, source: Source, examples: int | None) -> Rows:
    """Rows for so many examples at least; None: all rows."""
    if recipe.dataset is not None:
        return open_dataset(
            recipe.dataset,
            split=recipe.split,
            exact="split" in recipe.model_fields_set,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            take=None if examples is None else rows_needed(examples, recipe, source),
        )
    if source.input != "text":
        raise DataError(
            f"--model {recipe.model}: {source.cls.__name__} takes {source.input}, and only text "
            f"comes with this package; give --dataset with --{source.input}-column"
            + (" and --target-column." if source.task.head is Head.SEQ2SEQ else ".")
        )
    return open_bundled()


def rows_needed(examples: int, recipe: Recipe, source: Source) -> int:
    """Rows that so many examples take at most: running text is packed."""
    if source.task.head is Head.CAUSAL:
        return examples * max(1, (recipe.max_length or 1) // _TOKENS_PER_ROW)
    return examples


def feed_of(rows: Rows, recipe: Recipe, source: Source, *, labelled: bool) -> tuple[Feed, Columns]:
    """What an encoder turns into examples, and the columns that it reads of the rows."""
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


# --- what is measured on --------------------------------------------------------------------------


SCORED_PER_HELD_OUT = 4
FEWEST, MOST = 16, 256
"""Examples that are held out where there are enough: one for every four that are scored."""
FEWEST_OF_ALL = 8
"""Fewer say nothing; then nothing is measured."""
SHARE_OF_FEW = 5
"""Where the data holds too few, every fifth example of it is held out rather than scored."""


@dataclass(frozen=True)
class Evaluation:
    """What loss and metrics are measured on.

    Attributes:
        examples: The examples.
        dataset: Name of their data set.
        held_out: Whether they come from the calibration data.
        by_model: Whether their labels are the whole model's own predictions.
        scored_too: Whether they are of the data that is scored, and not held out from it.
        scores_given: Whether scores of an earlier run are used, which may know the examples.
    """

    examples: Examples
    dataset: str
    held_out: bool = False
    by_model: bool = False
    scored_too: bool = False
    scores_given: bool = False

    def __str__(self) -> str:
        """What was measured on, after the number of examples."""
        if not self.held_out:
            return f"of {self.dataset}" + (", which was scored on too" if self.scored_too else "")
        said = f"held out from the calibration data ({self.dataset})"
        if self.dataset != BUNDLED:
            said += ", which the model may have been trained on"
        if self.scores_given:
            said += "; whether the given scores were made with them is not known"
        return said

    def to_dict(self) -> dict[str, Any]:
        """What ``gradnas.json`` keeps, beside the name of the data set."""
        return {
            "examples": len(self.examples),
            "held_out": self.held_out,
            "scored_too": self.scored_too,
            "scores_given": self.scores_given,
            "labels": "whole model" if self.by_model else "data",
        }


def wanted(recipe: Recipe) -> int:
    """Examples to hold out, where the data has enough of them; 0 where there is no need."""
    if not recipe.eval or recipe.eval_dataset is not None or recipe.eval_split is not None:
        return 0
    usual = min(MOST, max(FEWEST, recipe.num_examples // SCORED_PER_HELD_OUT))
    return recipe.eval_num_examples or usual


def divide(found: int, scored: int, most: int) -> tuple[int, int]:
    """How many of the first examples are scored, and how many after them are held out.

    Args:
        found: Examples that there are.
        scored: Examples to score; so many are, if the data has more.
        most: Examples to hold out. Where the data has too few, a fifth of it is held out.
    """
    held_out = min(most, max(found - scored, found // SHARE_OF_FEW))
    if held_out < min(FEWEST_OF_ALL, most):
        return min(found, scored), 0
    return min(scored, found - held_out), held_out


def span(examples: Examples, first: int, count: int) -> Examples:
    """`count` examples from `first` on."""
    return replace(examples, count=count, encode=lambda index: examples[first + index])


def without(examples: Examples, first: int, count: int) -> Examples:
    """All examples but `count` of them from `first` on."""
    end = min(first + count, len(examples))
    left = len(examples) - max(0, end - first)
    gap = end - first
    return replace(
        examples,
        count=left,
        encode=lambda index: examples[index if index < first else index + gap],
    )


def drawn(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples drawn at random, in the order of the data."""
    chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    places = np.sort(chosen).tolist()
    return replace(examples, count=count, encode=lambda index: examples[places[index]])


def labelled_by(recipe: Recipe, source: Source) -> tuple[str, str]:
    """Who labels the examples that are held out (``"data"``, ``"model"``), or "" and why nobody.

    Args:
        recipe: With its labels settled.
        source: The model.
    """
    head = source.task.head
    if head is Head.BASE:
        return "", f"{source.cls.__name__} has no head whose loss could be measured"
    if recipe.labels == "data" or (head.makes_text and source.input == "text"):
        return "data", ""
    config = source.config
    is_regression = config.problem_type == "regression" or config.num_labels == 1
    if head in (Head.CLASS, Head.TOKENS) and not is_regression:
        return "model", ""
    return "", "labels are sampled from the model, and there are none to measure against"


def is_same_data(recipe: Recipe, scored: Rows, measured: Rows) -> bool:
    """Whether the data of `--eval-dataset` is that which is scored."""
    names = [Path(rows.origin).expanduser() for rows in (scored, measured)]
    if scored.origin != measured.origin and names[0].resolve() != names[1].resolve():
        return False
    return names[0].is_file() or (recipe.eval_split or "validation") == recipe.split


def shown_name(dataset: str) -> str:
    """A data set's name on the screen: that of its file or folder, or its Hub id."""
    return (
        Path(dataset).expanduser().resolve().name
        if Path(dataset).expanduser().exists()
        else dataset
    )


def data_warnings(
    recipe: Recipe, source: Source, scores: Scores | None, evaluation: Evaluation | None
) -> Iterator[str]:
    """What the choice of data does to the result."""
    reads_data = scores is None and recipe.score not in ("magnitude", "random")
    uses = ["scored"] * reads_data + ["repaired"] * (recipe.repair != "none")
    if recipe.dataset is None and source.input == "text" and uses:
        yield (
            f"no --dataset was given, so the model is {' and '.join(uses)} on the {BUNDLED}. Text "
            "of the model's own kind tells better what to keep (a Llama trained on Python source: "
            "perplexity 16.13 instead of 17.15 with the bundled text); give --dataset."
        )
    if evaluation is not None and evaluation.scored_too:
        trained = " and trained" if recipe.recover_epochs else ""
        yield (
            f"--eval-dataset {evaluation.dataset}: is the data that is scored{trained} on too, so "
            "that the metrics flatter the result; give other data, or omit --eval-dataset "
            "to hold some examples out."
        )
