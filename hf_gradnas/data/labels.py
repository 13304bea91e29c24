"""Turns a label column into what a classification head's loss needs.

Which output of the model a label belongs to is never guessed: it is said by ``--label-map``, by the
model's own names, or by the data where it holds the model's numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import DataError

IGNORED = -100
_SHOWN = 8
_NO_NAME = re.compile(r"label_\d+")

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Labels:
    """Labels of a data set as the model numbers them.

    Attributes:
        values: One per row.
        note: How they were read, where that is not plain.
        names: Number of each label that the data names.
    """

    values: list[Any]
    note: str | None = None
    names: Mapping[str, int] = field(default_factory=dict)


def class_labels(
    dataset: Dataset,
    column: str,
    config: PreTrainedConfig,
    *,
    origin: str,
    label_map: Mapping[str, int] | None = None,
) -> Labels:
    """Class ids; floats for a regression (one output); lists of floats for several labels at once.

    Args:
        dataset: Rows with the labels.
        column: Where they are.
        config: Of the model: how many labels it has, and their names.
        origin: Of the rows, for messages.
        label_map: The model's number of each name, as the user gave it; it beats the model's names.

    Raises:
        DataError: A label is missing, has no output of the model, or could be any of them.
    """
    values, where = list(dataset[column]), f"{origin}: column {column!r}"
    _refuse_missing(values, where)
    _refuse_nested(values, where, "a label or a list of labels")
    if config.problem_type == "regression" or config.num_labels == 1:
        if label_map:
            raise DataError(
                f"{where}: holds the numbers of a regression, which have no names; omit "
                "--label-map, or check --task."
            )
        return Labels(_floats(values, where), "labels are numbers (regression)")
    reader = _Reader(config, label_map or {}, _class_names(dataset.features[column]), where)
    if isinstance(values[0], list):
        return _several(values, reader)
    if config.problem_type == "multi_label_classification":
        raise DataError(
            f"{where}: holds {values[0]!r}, needed a list of labels, as the model gives several at "
            "once (problem_type is multi_label_classification); check --label-column."
        )
    numbers = reader.read(values)
    return Labels([numbers.ids[value] for value in values], numbers.note, numbers.names)


def token_labels(
    dataset: Dataset,
    column: str,
    config: PreTrainedConfig,
    *,
    origin: str,
    label_map: Mapping[str, int] | None = None,
) -> Labels:
    """Class ids of every token of every row; -100 stays.

    Raises:
        DataError: As for `class_labels`.
    """
    rows, where = list(dataset[column]), f"{origin}: column {column!r}"
    _refuse_missing(rows, where)
    _refuse_nested(rows, where, needed := "a list of labels, one per word")
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise _of_another_kind(row, where, index, needed)
        _refuse_missing(row, f"{where}, row {index}", "token")
    reader = _Reader(config, label_map or {}, _class_names(dataset.features[column]), where)
    numbers = reader.read(value for value in chain.from_iterable(rows) if value != IGNORED)
    ids = {**numbers.ids, IGNORED: IGNORED}
    return Labels([[ids[value] for value in row] for row in rows], numbers.note, numbers.names)


def check_same_numbers(calibration: Mapping[str, int], evaluation: Mapping[str, int]) -> None:
    """Check that two data sets number the labels that both name alike.

    Raises:
        DataError: They do not.
    """
    for name in calibration.keys() & evaluation.keys():
        if calibration[name] != evaluation[name]:
            raise DataError(
                f"the label {name!r} is number {calibration[name]} in the data to calibrate on and "
                f"{evaluation[name]} in the data to evaluate on, and the model's labels have no "
                f"names; say which is right with --label-map {name}=NUMBER,…"
            )


# --- names and numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """What is known of the labels of one column."""

    config: PreTrainedConfig
    label_map: Mapping[str, int]
    data_names: Sequence[str]
    where: str

    def read(self, values: Iterable[Any]) -> _Numbers:
        """The model's number of each distinct value."""
        distinct = list(dict.fromkeys(values))
        words = {value: self._word(value) for value in distinct}
        model = _model_names(self.config, self.where)
        if self.label_map:
            return self._by_map(words, model)
        if self.data_names:
            return self._by_class_names(words, model)
        kinds = {type(value) for value in distinct}
        by_name = {value: model.get(word) for value, word in words.items()}
        is_named = None not in by_name.values()
        if kinds <= {str, bool} and is_named:
            return _Numbers(_whole(by_name), "labels by the model's names")
        numerals = {value: _number(value) for value in distinct}
        if bool in kinds or (str in kinds and None in numerals.values()):
            raise self.unknown(list(words.values()))
        ids = {value: self._checked(value, number, numerals) for value, number in numerals.items()}
        if is_named and by_name != ids:
            raise self.unknown(list(words.values()))
        note = "labels are numbers, written as text" if str in kinds else None
        return _Numbers(ids, note or self._absent_zero(list(ids.values())))

    def unknown(self, words: Sequence[str]) -> DataError:
        """The error for labels that could belong to any output."""
        names = list(_names_by_id(self.config).values())
        example = ",".join(f"{word}=NUMBER" for word in words[:3]) + ("…" if words[3:] else "")
        found = f"{len(words)} labels" if words[1:] else "label"
        return DataError(
            f"{self.where} holds the {found} {_listed(sorted(words))}, and the model has "
            f"{self.config.num_labels} outputs, {_listed(names)}, so which is which is not known; "
            f"say so with --label-map {example} (0 to {self.config.num_labels - 1}), write the "
            "model's names or ids into the data, or take labels from the model with --labels model."
        )

    def _word(self, value: Any) -> str:
        """Name of a value in a label map and among the model's names."""
        number = _number(value)
        if self.data_names and number is not None and 0 <= number < len(self.data_names):
            return self.data_names[number]
        return str(value if number is None or isinstance(value, str) else number).strip()

    def _by_map(self, words: Mapping[Any, str], model: _Names) -> _Numbers:
        given = _Names(self.label_map)
        largest = max(self.label_map.values())
        if largest >= self.config.num_labels:
            raise DataError(
                f"--label-map: names output {largest}, and the model has {self.config.num_labels} "
                f"(0 to {self.config.num_labels - 1}); give a number of these."
            )
        found = {value: given.get(word) for value, word in words.items()}
        if not any(number is not None for number in found.values()):
            raise DataError(
                f"{self.where} holds the labels {_listed(sorted(words.values()))}, and --label-map "
                f"names none of them ({_listed(list(self.label_map))}); give the names as they are "
                "in the data, or omit --label-map."
            )
        for value, word in words.items():
            if found[value] is None:
                found[value] = model.get(word)
        if None in found.values():
            missing = [words[value] for value, number in found.items() if number is None]
            raise self.unknown(missing)
        ids = _whole(found)
        return _Numbers(ids, "labels by --label-map", {words[value]: ids[value] for value in words})

    def _by_class_names(self, words: Mapping[Any, str], model: _Names) -> _Numbers:
        """Names that the data set declares: by the model's, else by the data set's own numbers."""
        numbers = {value: _number(value) for value in words}
        plain = {value: self._checked(value, each, numbers) for value, each in numbers.items()}
        named = {words[value]: number for value, number in plain.items()}
        if all(word == str(number) for word, number in named.items()):
            return _Numbers(plain, None)
        found = {value: model.get(word) for value, word in words.items()}
        if None not in found.values():
            ids = _whole(found)
            moved = [f"{words[value]} = {ids[value]}" for value in words if ids[value] != value]
            said = f"labels by name, the data's numbers are others: {_listed(moved)}"
            note = said if moved else None
            return _Numbers(ids, note, {words[value]: ids[value] for value in words})
        if model.mean_something:
            raise self.unknown(list(words.values()))
        shown = _listed([f"{word} = {number}" for word, number in sorted(named.items())])
        note = f"the model's labels have no names; those of the data are taken to be its: {shown}"
        return _Numbers(plain, note, named)

    def _checked(self, value: Any, number: int | None, others: Mapping[Any, int | None]) -> int:
        size = self.config.num_labels
        if number is not None and 0 <= number < size:
            return number
        known = [each for each in others.values() if each is not None]
        advice = "check --label-column and --split"
        if known and min(known) == 1 and max(known) == size:
            counted = ",".join(f"{each + 1}={each}" for each in range(size))
            advice = f"if the data counts from 1, give --label-map {counted}"
        raise DataError(
            f"{self.where} holds the label {value!r}, but the model has {size} outputs (0 to "
            f"{size - 1}); {advice}, or take labels from the model itself with --labels model."
        )

    def _absent_zero(self, ids: Sequence[int]) -> str | None:
        size = self.config.num_labels
        if 0 in ids or len(set(ids)) < size - 1:
            return None
        return (
            f"no label is 0, of 0 to {size - 1}; if the data counts from 1, give --label-map 1=0,…"
        )


@dataclass(frozen=True)
class _Numbers:
    """The model's number of each value."""

    ids: Mapping[Any, int]
    note: str | None
    names: Mapping[str, int] = field(default_factory=dict)


class _Names:
    """Numbers by name: as written, else ignoring case where that is not ambiguous."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.exact = {name.strip(): number for name, number in numbers.items()}
        folded: dict[str, set[int]] = {}
        for name, number in self.exact.items():
            folded.setdefault(name.casefold(), set()).add(number)
        self.folded = {name: min(found) for name, found in folded.items() if len(found) == 1}
        self.mean_something = any(not _NO_NAME.fullmatch(name) for name in folded)

    def get(self, word: str) -> int | None:
        """Number of a name; None if there is none."""
        return self.exact.get(word, self.folded.get(word.casefold()))


def _names_by_id(config: PreTrainedConfig) -> dict[int, str]:
    return {int(number): str(name) for number, name in (config.id2label or {}).items()}


def _model_names(config: PreTrainedConfig, where: str) -> _Names:
    """From both tables of the config; some hold one only, beside the other's default."""
    try:
        by_id = {name: number for number, name in _names_by_id(config).items()}
        by_name = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: id2label and label2id of the model's config are not from numbers to names "
            f"and back ({error}); mend its config.json."
        ) from error
    tables = [table for table in (by_id, by_name) if _Names(table).mean_something]
    if not tables:
        return _Names(by_id)
    if len(tables) > 1:
        for name in by_id.keys() & by_name.keys():
            if by_id[name] != by_name[name]:
                raise DataError(
                    f"{where}: the model's config contradicts itself: {name!r} is "
                    f"{by_id[name]} in id2label and {by_name[name]} in label2id; mend its "
                    "config.json."
                )
    return _Names({name: number for table in tables for name, number in table.items()})


def _class_names(feature: Any) -> Sequence[str]:
    """Names that a data set declares for a column, or for the items of its lists."""
    from datasets import ClassLabel, List

    while isinstance(feature, List | list):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def _number(value: Any) -> int | None:
    """A whole number, also one written as text; None for all else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value) else None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    return value if isinstance(value, int) else None


def _whole(found: Mapping[Any, int | None]) -> dict[Any, int]:
    return {value: number for value, number in found.items() if number is not None}


def _listed(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


# --- other kinds of labels ------------------------------------------------------------------------


def _several(rows: Sequence[Any], reader: _Reader) -> Labels:
    """Several labels at once as 0.0 or 1.0 per label; all rows are read in the same way."""
    size = reader.config.num_labels
    if reader.config.problem_type == "single_label_classification":
        raise DataError(
            f"{reader.where}: holds lists, but the model gives one label (problem_type is "
            "single_label_classification); check --label-column."
        )
    for index, row in enumerate(rows):
        _refuse_missing(row, f"{reader.where}, row {index}", "item")
    flat = list(chain.from_iterable(rows))
    if all(len(row) == size for row in rows) and all(value in (0, 1) for value in flat):
        if reader.label_map:
            raise DataError(
                f"{reader.where}: holds {size} zeros and ones a row, which have no names; omit "
                "--label-map."
            )
        return Labels([[float(value) for value in row] for row in rows])
    is_text = all(isinstance(value, str) for value in flat)
    for row in rows:
        is_set = len(set(row)) == len(row) and all(type(value) in (int, str) for value in row)
        in_range = is_text or reader.label_map or all(0 <= value < size for value in row)
        if not (is_set and in_range):
            raise DataError(
                f"{reader.where} holds {row!r}, needed a list of label ids below {size} or {size} "
                "zeros and ones in every row; check --label-column."
            )
    numbers = reader.read(flat)
    ids = [{numbers.ids[value] for value in row} for row in rows]
    hot = [[float(index in row) for index in range(size)] for row in ids]
    return Labels(hot, numbers.note, numbers.names)


def _floats(values: Sequence[Any], where: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} is not all numbers ({error}), which a model with one output needs; check "
            "--label-column."
        ) from error
    for row, number in enumerate(numbers):
        if not math.isfinite(number):
            raise DataError(
                f"{where} holds {number} in row {row}, needed a finite number; remove that row, or "
                "check --label-column."
            )
    return numbers


def _refuse_missing(values: Sequence[Any], where: str, unit: str = "row") -> None:
    for index, value in enumerate(values):
        if value is None or value == "":
            raise DataError(
                f"{where} has no label in {unit} {index}; remove that row, check --split, or take "
                "labels from the model itself with --labels model."
            )


def _refuse_nested(rows: Sequence[Any], where: str, needed: str) -> None:
    """Refuse what is neither a label nor a list of labels."""
    for index, row in enumerate(rows):
        for value in row if isinstance(row, list) else [row]:
            if value is not None and not isinstance(value, str | int | float):
                raise _of_another_kind(row, where, index, needed)


def _of_another_kind(row: Any, where: str, index: int, needed: str) -> DataError:
    found = f"{row!r:.80} in row {index}"
    return DataError(f"{where} holds {found}, needed {needed}; check --label-column.")
