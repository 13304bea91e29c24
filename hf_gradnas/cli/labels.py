"""Turns a label column into what a classification head's loss needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError

IGNORED = -100
_SHOWN = 8

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


def class_labels(
    dataset: Dataset, column: str, config: PreTrainedConfig, *, origin: str
) -> tuple[list[Any], str | None]:
    """Labels of every row, and a note on how they were read.

    Returns:
        Class ids; floats for a regression (one output); lists of floats for several labels at once.

    Raises:
        DataError: A label is missing, or has no output of the model.
    """
    values = list(dataset[column])
    _refuse_missing(values, column, origin)
    if config.problem_type == "multi_label_classification" or isinstance(values[0], list):
        return [_multi_hot(value, config.num_labels, column, origin) for value in values], None
    if config.problem_type == "regression" or config.num_labels == 1:
        return _floats(values, column, origin), "labels are numbers (regression)"
    names, note = _label_names(dataset, column, config), None
    if isinstance(values[0], str):
        names, note = _map_strings(values, config, column, origin)
    if names is not None:
        values = [names.get(value, value) for value in values]
    return [_checked(value, config, column, origin) for value in values], note


def token_labels(
    dataset: Dataset, column: str, config: PreTrainedConfig, *, origin: str
) -> list[list[int]]:
    """Class ids of every token of every row.

    Raises:
        DataError: A label is missing, or has no output of the model.
    """
    rows = list(dataset[column])
    _refuse_missing(rows, column, origin)
    flat = [value for row in rows for value in row]
    names: Mapping[Any, Any] = {}
    if flat and isinstance(flat[0], str):
        names, _ = _map_strings(flat, config, column, origin)
    return [
        [
            value if value == IGNORED else _checked(names.get(value, value), config, column, origin)
            for value in row
        ]
        for row in rows
    ]


def _map_strings(
    values: Sequence[str], config: PreTrainedConfig, column: str, origin: str
) -> tuple[dict[Any, int], str]:
    """By the model's label names, ignoring case, else in sorted order if all classes occur."""
    known = {str(name).lower(): int(index) for name, index in config.label2id.items()}
    distinct = sorted(set(values))
    if all(value.lower() in known for value in distinct):
        return {value: known[value.lower()] for value in distinct}, "labels by the model's names"
    if len(distinct) != config.num_labels:
        raise DataError(
            f"{origin}: column {column!r} holds the {len(distinct)} labels {_listed(distinct)}, "
            f"and the model has {config.num_labels} outputs, {_listed(list(config.label2id))}, so "
            "which is which is not known; write the model's names or ids into the data, read more "
            "rows (--num-examples, --shuffle), or take labels from the model with --labels model."
        )
    mapping: dict[Any, int] = {value: index for index, value in enumerate(distinct)}
    shown = ", ".join(f"{name} = {index}" for name, index in list(mapping.items())[:_SHOWN])
    return mapping, f"labels in sorted order: {shown}"


def _listed(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


def _label_names(dataset: Dataset, column: str, config: PreTrainedConfig) -> dict[Any, int] | None:
    """Where data set and model name the same classes in another order: id to the model's id."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        return None
    known = {str(name).lower(): int(index) for name, index in config.label2id.items()}
    names = [name.lower() for name in feature.names]
    if set(names) != set(known):
        return None
    return {index: known[name] for index, name in enumerate(names)}


def _checked(value: Any, config: PreTrainedConfig, column: str, origin: str) -> int:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if is_whole and 0 <= value < config.num_labels:
        return int(value)
    raise DataError(
        f"{origin}: column {column!r} holds the label {value!r}, but the model has "
        f"{config.num_labels} outputs (0 to {config.num_labels - 1}); check --label-column and "
        "--split, or take labels from the model itself with --labels model."
    )


def _multi_hot(value: Any, num_labels: int, column: str, origin: str) -> list[float]:
    """Ids, or 0/1 per label, as 0.0/1.0 per label."""
    if isinstance(value, list) and len(value) == num_labels and set(value) <= {0, 1}:
        return [float(item) for item in value]
    if isinstance(value, list) and all(isinstance(v, int) and 0 <= v < num_labels for v in value):
        return [float(index in value) for index in range(num_labels)]
    raise DataError(
        f"{origin}: column {column!r} holds {value!r}, needed a list of label ids below "
        f"{num_labels} or {num_labels} zeros and ones; check --label-column."
    )


def _floats(values: Sequence[Any], column: str, origin: str) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{origin}: column {column!r} is not all numbers ({error}), which a model with one "
            "output needs; check --label-column."
        ) from error


def _refuse_missing(values: Sequence[Any], column: str, origin: str) -> None:
    for row, value in enumerate(values):
        if value is None or value == "":
            raise DataError(
                f"{origin}: column {column!r} has no label in row {row}; remove that row, check "
                "--split, or take labels from the model itself with --labels model."
            )
