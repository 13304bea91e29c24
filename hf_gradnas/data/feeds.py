"""From a model and the name of a data set to batches that it can be scored on.

The command reads its options here; `calibration_batches` does the same for a model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..errors import DataError, RecipeError
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
