"""Reads local data files into rows: csv, tsv, json, jsonl, txt, parquet.

Knows file formats and headers; knows nothing of models or of what a column means.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, first_line
from ..types import parse_json

if TYPE_CHECKING:
    from datasets import Dataset

# Names under which data sets of the Hub keep their columns, most telling first.
TEXT_NAMES = (
    "text", "sentence", "content", "document", "article", "review", "dialogue", "source", "input",
    "inputs", "question", "prompt", "code", "comment", "tweet", "body", "transcript",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "class", "category", "sentiment", "target", "stars", "rating", "score",
    "coarse_label", "fine_label", "intent", "emotion", "y",
)  # fmt: skip
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"), ("query", "passage"), ("text1", "text2"),
)  # fmt: skip
TARGET_NAMES = (
    "target", "summary", "highlights", "translation", "output", "response", "completion", "answer",
    "tgt", "label",
)  # fmt: skip
IMAGE_NAMES = ("image", "img", "picture", "photo", "file_name", "file", "path")
AUDIO_NAMES = ("audio", "speech", "sound", "file_name", "file", "path")
TRANSCRIPT_NAMES = ("text", "transcript", "transcription", "sentence", "normalized_text", "target")
TOKEN_NAMES = ("tokens", "words")
TAG_NAMES = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")
_KNOWN_NAMES = frozenset(
    name.lower()
    for names in (
        TEXT_NAMES, LABEL_NAMES, TARGET_NAMES, IMAGE_NAMES, AUDIO_NAMES, TRANSCRIPT_NAMES,
        TOKEN_NAMES, TAG_NAMES, ("id", "idx", "index"), *PAIRS,
    )
    for name in names
)  # fmt: skip
_IDENTIFIER = re.compile(r"[^\W\d][\w.-]*\Z")
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*\Z")
_FLOAT = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?\s*\Z", re.IGNORECASE)
_HEADER_SAMPLE = 200
_DIGITS = 18  # that 64 bits hold for certain


# What pyarrow and `datasets` raise for values and schemas that they cannot hold.
_UNREADABLE = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows of a data set.

    Attributes:
        dataset: The rows in file order.
        text: All of a plain-text file, which language models read as one stream.
        origin: Path or Hub id, for messages.
        folder: Folder that relative paths in the rows start from.
        notes: What was decided while reading, to be printed.
    """

    dataset: Dataset
    origin: str
    text: str | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def read_file(path: Path) -> Rows:
    """Read one file by its suffix.

    Raises:
        DataError: The suffix is unknown, the file cannot be read, or it holds no row.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot tell the format of {path.suffix or 'a file without suffix'!r}; "
            f"give one of {', '.join(READERS)}."
        )
    try:
        rows = reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); needed a UTF-8 file.") from error
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot be read as a table ({error}); check the separator and the quotes, or "
            "give the data as jsonl."
        ) from error
    if len(rows.dataset) == 0:
        raise DataError(f"{path}: holds no example; give a file with at least one.")
    return rows


def text_lines(text: str) -> list[str]:
    """Lines that are not blank. Only newlines end one: ``str.splitlines`` knows ten more ends."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _text_of(path: Path) -> str:
    """All of a text file; a mark of the byte order at its start is no part of it."""
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"{path}: holds the character NUL in line {line}, so it is no text file, or one "
            "in UTF-16; save it again as UTF-8."
        )
    return text


def _read_text(path: Path) -> Rows:
    text = _text_of(path)
    return Rows(
        _dataset({"text": text_lines(text)}, path), str(path), text=text, folder=path.parent
    )


def _read_tsv(path: Path) -> Rows:
    text = _text_of(path)
    with _cells_of(len(text)):
        reader = csv.reader(text_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        return _read_table([row for row in reader if row], path)


def _read_csv(path: Path) -> Rows:
    text = _text_of(path)
    with _cells_of(len(text)), io.StringIO(text, newline="") as stream:
        return _read_table([row for row in csv.reader(stream) if row], path)


@contextmanager
def _cells_of(characters: int) -> Iterator[None]:
    """Let a cell of a table be so long within the block; it is the process that has the limit."""
    before = csv.field_size_limit(max(characters, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_jsonl(path: Path) -> Rows:
    return _read_records(list(_json_lines(_text_of(path), path)), path)


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield parse_json(line, allow_nan=True)
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is not JSON ({error}); needed one object per line."
                ) from error


def _read_json(path: Path) -> Rows:
    text = _text_of(path)
    try:
        data = parse_json(text, allow_nan=True)
    except ValueError as error:
        # Many .json files of the Hub hold one object per line.
        if not text.lstrip().startswith("{"):
            raise DataError(
                f"{path}: is not JSON ({error}); needed a list of objects, or one per line."
            ) from error
        return _read_records(list(_json_lines(text, path)), path)
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    return _read_records([data] if isinstance(data, dict) else data, path)


def _read_parquet(path: Path) -> Rows:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    unreadable = (ArrowException, DatasetGenerationError, *_UNREADABLE)
    try:
        dataset = Dataset.from_parquet(str(path))
    except unreadable as error:  # what Arrow and `datasets` raise for what they do not know
        raise DataError(
            f"{path}: cannot be read as parquet ({first_line(error)}); write the file again."
        ) from error
    return Rows(dataset, str(path), folder=path.parent)


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def has_header(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns.

    It does when it holds a common column name. It does not when it holds a number, or a value that
    comes back below in its column. Else it does when a column is all numbers below it, or when
    every cell is a single word.
    """
    first, rest = rows[0], rows[1:_HEADER_SAMPLE]
    cells = [cell.strip() for cell in first]
    if any(cell.lower() in _KNOWN_NAMES for cell in cells):
        return True
    if any(_is_number(cell) for cell in cells) or not rest:
        return False
    columns = [[row[i].strip() for row in rest if i < len(row)] for i in range(len(cells))]
    if any(cell in column for cell, column in zip(cells, columns, strict=True)):
        return False
    if any(column and all(map(_is_number, column)) for column in columns):
        return True
    return all(_IDENTIFIER.match(cell) for cell in cells)


def _read_table(rows: list[list[str]], path: Path) -> Rows:
    if not rows:
        raise DataError(f"{path}: is empty; give a file with at least one example.")
    named = has_header(rows)
    width = len(rows[0])
    body = rows[1:] if named else rows
    for number, row in enumerate(body, start=2 if named else 1):
        if len(row) != width:
            raise DataError(
                f"{path}: row {number} has {len(row)} columns, the first row has {width}; "
                "check the separator, or give the data as jsonl."
            )
    columns = [_typed([row[i] for row in body]) for i in range(width)]
    names = [cell.strip() for cell in rows[0]] if named else _invent_names(columns)
    if len(set(names)) < len(names):
        raise DataError(f"{path}: column names repeat ({', '.join(names)}); make them unique.")
    notes = () if named else (f"no header in {path.name}: columns are {', '.join(names)}",)
    dataset = _dataset(dict(zip(names, columns, strict=True)), path)
    return Rows(dataset, str(path), folder=path.parent, notes=notes)


def _invent_names(columns: list[list[Any]]) -> list[str]:
    """Last integer column ``label``, first string column ``text``, others ``column_<i>``.

    Without an integer column, the last of several string columns is the label when it repeats.
    """
    names = [f"column_{index + 1}" for index in range(len(columns))]
    kinds = [type(column[0]) if column else str for column in columns]
    strings = [index for index, kind in enumerate(kinds) if kind is str]
    numbers = [i for i, kind in enumerate(kinds) if kind is int] or [
        i for i, kind in enumerate(kinds) if kind is float
    ]
    if strings:
        names[strings[0]] = "text"
    if numbers:
        names[numbers[-1]] = "label"
    elif len(strings) > 1 and len(set(columns[strings[-1]])) <= max(2, len(columns[0]) // 2):
        names[strings[-1]] = "label"
    return names


def _typed(cells: list[str]) -> list[Any]:
    """The column as int of 64 bits or as finite float when every cell is one, else as it is."""
    if all(map(_INTEGER.match, cells)):
        fits = all(len(cell.strip()) <= _DIGITS for cell in cells)
        return [int(cell) for cell in cells] if fits else cells
    if all(map(_is_number, cells)):
        return [float(cell) for cell in cells]
    return cells


def _read_records(records: Any, path: Path) -> Rows:
    if isinstance(records, list) and all(isinstance(item, str) for item in records):
        records = [{"text": item} for item in records]
    if not isinstance(records, list) or not all(isinstance(item, dict) for item in records):
        raise DataError(f"{path}: needed objects with one key per column; found something else.")
    names = list(dict.fromkeys(key for item in records for key in item))
    columns = {name: [item.get(name) for item in records] for name in names}
    return Rows(_dataset(columns, path), str(path), folder=path.parent)


def _dataset(columns: Mapping[str, list[Any]], path: Path) -> Dataset:
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_dict(dict(columns))
    except (pyarrow.ArrowException, *_UNREADABLE) as error:
        raise DataError(
            f"{path}: a column mixes types, or holds what no column can ({first_line(error)}); "
            "make every value of a column the same type."
        ) from error


def _is_number(cell: str) -> bool:
    return _FLOAT.match(cell) is not None and math.isfinite(float(cell))
