"""Examples and batches: rows encoded one by one, padded per batch, in a fixed order.

Knows tensors and padding; the encoders for each kind of head are in `encoding` and `media`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .columns import Columns
from .files import Rows
from .labels import IGNORED
from .loading import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Example = dict[str, Any]


@dataclass(frozen=True)
class Feed:
    """What an encoder turns into examples.

    Attributes:
        rows: The data.
        columns: Columns to read.
        source: Config, tokenizer, processor and task of the model.
        max_length: Tokens per example.
        labelled: Whether labels come from the data.
        prose: Whether the rows are one running text rather than separate examples.
        limit: Examples at most; None: all.
        shuffle: Whether running text is put in a random order; rows were shuffled already.
        seed: Of masks and orders.
        label_map: The model's number of each name of a label, as the user gave it.
    """

    rows: Rows
    columns: Columns
    source: Source
    max_length: int
    labelled: bool
    prose: bool = False
    limit: int | None = None
    shuffle: bool = False
    seed: int = 0
    label_map: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples(Dataset[Example]):
    """Encoded examples; example ``i`` is the same at every call.

    Attributes:
        count: Number of examples.
        encode: Makes one.
        note: How the labels were read.
        names: The model's number of each label that the data names.
    """

    count: int
    encode: Callable[[int], Example] = field(repr=False)
    note: str | None = None
    names: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.encode(index)


def make_loader(
    examples: Examples, source: Source, model: PreTrainedModel, *, batch_size: int
) -> DataLoader[Example]:
    """Batches for ``model(**batch)`` in the order of the examples."""
    collate = Collator(source, model)
    return DataLoader(examples, batch_size=batch_size, shuffle=False, collate_fn=collate)


class Collator:
    """Pads the examples of a batch to its longest, on the right.

    Entries that the model's forward does not name are left out (token types for a DistilBERT);
    inputs that are not integers take the model's dtype.
    """

    def __init__(self, source: Source, model: PreTrainedModel) -> None:
        self.names = set(inspect.signature(model.forward).parameters)
        self.dtype = model.dtype
        tokenizer = source.tokenizer
        self.padding = {"labels": IGNORED}
        if tokenizer is not None:
            self.padding["input_ids"] = tokenizer.pad_token_id
            self.padding["token_type_ids"] = tokenizer.pad_token_type_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One batch as a dict of tensors."""
        names = [name for name in examples[0] if name in self.names]
        return {name: self._join(name, [e[name] for e in examples]) for name in names}

    def _join(self, name: str, values: list[Any]) -> torch.Tensor:
        tensors = [torch.as_tensor(value) for value in values]
        if tensors[0].is_floating_point():
            tensors = [tensor.to(self.dtype) for tensor in tensors]
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
        if tensors[0].ndim == 1:
            return pad_sequence(tensors, batch_first=True, padding_value=self.padding.get(name, 0))
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        raise DataError(
            f"{name}: the examples of a batch have the shapes {shapes} after the model's "
            "processor, needed one; give --batch-size 1, or data of one size."
        )


def limited(feed: Feed, count: int) -> int:
    """Number of examples: `count`, or the limit if that is less."""
    return count if feed.limit is None else min(feed.limit, count)


def row_getter(feed: Feed, names: Sequence[str | None]) -> Callable[[int], Mapping[str, Any]]:
    """Reads one row, only the given columns."""
    dataset = feed.rows.dataset.select_columns([name for name in names if name])
    return lambda index: dataset[index]
