"""Finds the columns that a task needs: by what was asked, by common names, then by type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .files import (
    AUDIO_NAMES,
    IMAGE_NAMES,
    LABEL_NAMES,
    PAIRS,
    TAG_NAMES,
    TARGET_NAMES,
    TEXT_NAMES,
    TOKEN_NAMES,
    TRANSCRIPT_NAMES,
    Rows,
)
from .tasks import Head

if TYPE_CHECKING:
    from datasets import Dataset

    from ..config.recipe import Recipe


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; empty or None where there is none."""

    text: tuple[str, ...] = ()
    label: str | None = None
    target: str | None = None
    image: str | None = None
    audio: str | None = None

    def __str__(self) -> str:
        parts = [
            f"{role} = {value if isinstance(value, str) else ' + '.join(value)}"
            for role, value in vars(self).items()
            if value
        ]
        return ", ".join(parts)


def choose_columns(
    rows: Rows, recipe: Recipe, *, head: Head, feeds: str, labelled: bool
) -> Columns:
    """Choose the columns for a head.

    Args:
        rows: The data.
        recipe: Columns that were asked for.
        head: What is predicted.
        feeds: ``"text"``, ``"image"`` or ``"audio"``.
        labelled: Whether the labels come from the data.

    Raises:
        DataError: A column is missing; the message names those there are.
    """
    find = _Finder(rows.dataset, rows.origin)
    if feeds != "text":
        return _media_columns(find, recipe, head=head, feeds=feeds, labelled=labelled)
    if head is Head.SPAN:
        return _span_columns(find, recipe, labelled)
    if head is Head.TOKENS and (labelled or set(TOKEN_NAMES) & set(rows.dataset.column_names)):
        return _token_columns(find, recipe, labelled)
    pairs = head in (Head.CLASS, Head.BASE)
    text = find.texts(recipe.text_column, pairs=pairs)
    if len(text) > (2 if pairs else 1):
        needed = "one column, or two of a pair" if pairs else "one column"
        raise DataError(
            f"--text-column {recipe.text_column}: names {len(text)} columns, but this task reads "
            f"{needed}; omit the others."
        )
    columns = Columns(text=text)
    if head is Head.CLASS:
        columns = Columns(text=text, label=_label(find, recipe, labelled, set(text)))
    elif head is Head.SEQ2SEQ and labelled and rows.text is None:
        target = find.one(
            "target", recipe.target_column, TARGET_NAMES, _is_string, without=set(text)
        )
        columns = Columns(text=text, target=target)
    return columns


def _media_columns(
    find: _Finder, recipe: Recipe, *, head: Head, feeds: str, labelled: bool
) -> Columns:
    if feeds == "image":
        image = find.one("image", recipe.image_column, IMAGE_NAMES, _is_image)
        return Columns(image=image, label=_label(find, recipe, labelled, {image}))
    audio = find.one("audio", recipe.audio_column, AUDIO_NAMES, _is_audio)
    if head is not Head.SEQ2SEQ:
        return Columns(audio=audio, label=_label(find, recipe, labelled, {audio}))
    # Also with labels from the model: the decoder needs tokens to read.
    target = find.one("target", recipe.target_column, TRANSCRIPT_NAMES, _is_string, without={audio})
    return Columns(audio=audio, target=target)


def _label(find: _Finder, recipe: Recipe, labelled: bool, without: set[str]) -> str | None:
    if not labelled:
        return None
    return find.one(
        "label", recipe.label_column, LABEL_NAMES, _is_anything, guess=_is_label, without=without
    )


def _span_columns(find: _Finder, recipe: Recipe, labelled: bool) -> Columns:
    given = recipe.text_column.split(",") if recipe.text_column else ["question", "context"]
    if len(given) != 2:  # noqa: PLR2004 - a question and its context
        raise DataError(
            f"--text-column {recipe.text_column}: names {len(given)} columns, but this task reads "
            "two; give QUESTION,CONTEXT."
        )
    text = tuple(find.one("text", name.strip(), (), _is_string) for name in given)
    answers = recipe.target_column or "answers"
    return Columns(
        text=text,
        target=find.one("target", answers, (), _is_anything) if labelled else None,
    )


def _token_columns(find: _Finder, recipe: Recipe, labelled: bool) -> Columns:
    text = (find.one("text", recipe.text_column, TOKEN_NAMES, _is_string_list),)
    if not labelled:
        return Columns(text=text)
    return Columns(
        text=text,
        label=find.one("label", recipe.label_column, TAG_NAMES, _is_list, without=set(text)),
    )


class _Finder:
    """Looks for columns of one data set."""

    def __init__(self, dataset: Dataset, origin: str) -> None:
        self.features: dict[str, Any] = dict(dataset.features)
        self.origin = origin

    def one(
        self,
        role: str,
        asked: str | None,
        names: Iterable[str],
        fits: Callable[[Any], bool],
        *,
        guess: Callable[[Any], bool] | None = None,
        without: Iterable[str | None] = (),
    ) -> str:
        """The column asked for, else one of `names` that `fits`, else a `guess` by type."""
        if asked is not None:
            if asked in self.features:
                return asked
            raise self._missing(role, f"has no column {asked!r}")
        free = {name: f for name, f in self.features.items() if name not in set(without)}
        lowered = {name.lower(): name for name in reversed(free)}
        for name in names:
            if name in lowered and fits(free[lowered[name]]):
                return lowered[name]
        for name, feature in free.items():
            if (guess or fits)(feature) and not (
                role in ("text", "label") and name.lower() in ("id", "idx")
            ):
                return name
        taken = ", ".join(name for name in self.features if name in set(without))
        besides = f" besides {taken}, which is taken for something else," if taken else ""
        raise self._missing(role, f"has no column{besides} that could be the {role}")

    def texts(self, asked: str | None, *, pairs: bool) -> tuple[str, ...]:
        """One text column, or the two of a pair."""
        if asked is not None and asked not in self.features:
            return tuple(
                self.one("text", name.strip(), (), _is_string) for name in asked.split(",")
            )
        for first, second in PAIRS if pairs and asked is None else ():
            if first in self.features and second in self.features:
                return first, second
        return (self.one("text", asked, TEXT_NAMES, _is_string),)

    def _missing(self, role: str, problem: str) -> DataError:
        advice = f"name it with --{role}-column"
        if role == "label":
            advice += ", or take labels from the model itself with --labels model"
        return DataError(
            f"{self.origin}: {problem}; its columns are {', '.join(self.features)}; {advice}."
        )


def _is_string(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_label(feature: Any) -> bool:
    """A class label or a column of integers; strings, floats and lists are taken only by name."""
    from datasets import ClassLabel, Value

    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool"))
    )


def _is_string_list(feature: Any) -> bool:
    return _is_list(feature) and _is_string(_inner(feature))


def _is_list(feature: Any) -> bool:
    return _inner(feature) is not None


def _inner(feature: Any) -> Any:
    """Feature of a list's items, or None for what is not a list."""
    if isinstance(feature, list):
        return feature[0]
    from datasets import List

    return feature.feature if isinstance(feature, List) else None


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image) or _is_string(feature)


def _is_audio(feature: Any) -> bool:
    from datasets import Audio

    return isinstance(feature, Audio) or _is_string(feature)


def _is_anything(_: Any) -> bool:
    return True
