"""Rows: what counts as one observation of all masks' gradients, and sums over their positions.

A row is one example; for a loss over tokens it is `ROW_POSITIONS` consecutive positions of one
sequence, counted from its first position that is not padding, so that padding on either side and
the size of a batch change nothing. An encoder's and a decoder's positions are counted each for
itself, and row k holds the k-th block of both: gradients of the encoder then keep their size beside
those of the decoder.

Knows batches and shapes; knows nothing of losses and formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batches.batch import Batch

ROW_POSITIONS = 16
_MATRIX, _SEQUENCES = 2, 3  # dimensions of (examples * positions, units) and of (examples, …)


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a batch, as far as its columns tell.

    Attributes:
        length: Positions of each; None: the columns do not tell.
        starts: First position of each that is not padding; empty: 0 for all.
        is_exact: Whether tensors of more positions are no sequences of tokens (those of pictures),
            rather than sequences that the model itself has padded.
    """

    length: int | None
    starts: tuple[int, ...] = ()
    is_exact: bool = False

    def positions_in(self, shape: Sequence[int], examples: int) -> int | None:
        """Positions per example of a tensor ``(…, units)``; None where they are no sequence."""
        if len(shape) == _SEQUENCES and shape[0] == examples:
            found = shape[1]
        elif len(shape) == _MATRIX and shape[0] % examples == 0:
            found = shape[0] // examples
        else:
            return None
        if self.length is None or found == self.length:
            return found
        return None if self.is_exact or found < self.length else found


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Which sequences run through the modules of a model in one batch.

    Attributes:
        own: Those of the decoder, or of a model that is not an encoder and a decoder.
        encoder: Those of the encoder's modules.
        encoder_modules: The encoder's modules.
    """

    own: Sequences
    encoder: Sequences | None = None
    encoder_modules: frozenset[nn.Module] = frozenset()

    @property
    def rows(self) -> int:
        """Rows per example at most, as far as the columns tell."""
        lengths = [found.length or 0 for found in (self.own, self.encoder) if found is not None]
        return _blocks(max(lengths))

    def rows_of(self, module: nn.Module, tokens: int, examples: int) -> tuple[Tensor, int] | None:
        """Row of each token ``(tokens,)`` among those of all examples, and rows per example.

        None as for `sums`.
        """
        sequences = self._at(module)
        length = sequences.positions_in((tokens, 1), examples)
        if length is None:
            return None
        starts = torch.tensor(sequences.starts or [0] * examples)[:, None]
        rows = (torch.arange(length) - starts).clamp(min=0) // ROW_POSITIONS  # (examples, length)
        return (rows + torch.arange(examples)[:, None] * _blocks(length)).flatten(), _blocks(length)

    def _at(self, module: nn.Module) -> Sequences:
        is_encoders = self.encoder is not None and module in self.encoder_modules
        return self.encoder if is_encoders and self.encoder is not None else self.own

    def sums(self, module: nn.Module, values: Tensor, examples: int) -> Tensor | None:
        """Sums over blocks of positions ``(examples, rows, units)`` at a module.

        Args:
            module: Where they are.
            values: ``(examples, positions, units)``, or with the first two as one dimension.
            examples: Examples of the batch.

        Returns:
            None where the positions there are no sequence of the batch.
        """
        sequences = self._at(module)
        length = sequences.positions_in(values.shape, examples)
        if length is None:
            return None
        return block_sums(values.view(examples, length, -1), sequences.starts)


def _blocks(length: int) -> int:
    """Rows of a sequence."""
    return -(-length // ROW_POSITIONS)


def block_sums(values: Tensor, starts: Sequence[int] = ()) -> Tensor:
    """Sums over `ROW_POSITIONS` consecutive positions: ``(examples, rows, units)``.

    Args:
        values: ``(examples, positions, units)``.
        starts: Where each example's first block begins; what is before it (padding) is added to
            the first block. Empty: at 0.
    """
    examples, length, units = values.shape
    blocks = _blocks(length)
    if any(starts):
        sums = values.new_zeros(examples, blocks, units)
        for row, start in enumerate(starts):
            part = block_sums(values[row : row + 1, start:])
            sums[row, : part.shape[1]] = part[0]
            sums[row, 0] += values[row, :start].sum(0)
        return sums
    whole = length // ROW_POSITIONS
    end = whole * ROW_POSITIONS
    parts = [values[:, :end].unflatten(1, (whole, ROW_POSITIONS)).sum(2)] if whole else []
    if end < length:
        parts.append(values[:, end:].sum(1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def added(sums: Tensor, more: Tensor) -> Tensor:
    """Sums ``(examples, rows, units)`` of different numbers of rows, added up."""
    longer, shorter = (sums, more) if sums.shape[1] >= more.shape[1] else (more, sums)
    longer[:, : shorter.shape[1]] += shorter.to(longer)
    return longer


def token_lengths(columns: Mapping[str, Any]) -> set[int]:
    """Lengths of the sequences of tokens among the columns of a batch."""
    found = (_length(columns, prefix) for prefix in ("", "decoder_"))
    return {length for length in found if length is not None}


def positions_of(model: nn.Module, batch: Batch) -> Positions | None:
    """Which sequences a model sees in a batch; None where the columns tell of no tokens."""
    columns = batch.columns
    is_exact = any(_is_media(name, value) for name, value in columns.items())
    text = _length(columns, "")
    own = Sequences(text, _starts(columns, "attention_mask"), is_exact)
    if not (isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder):
        return None if text is None else Positions(own)
    length = _length(columns, "decoder_") or _label_length(batch) or text
    if length is None:
        return None
    decoder = Sequences(length, _starts(columns, "decoder_attention_mask"), is_exact)
    encoder = model.get_encoder()
    if not isinstance(encoder, nn.Module) or encoder is model:
        return Positions(decoder)
    return Positions(decoder, own, frozenset(encoder.modules()))


def _length(columns: Mapping[str, Any], prefix: str) -> int | None:
    """Length of the sequences of tokens, ``(examples, positions, …)``; None: there are none."""
    for name, dims in (("input_ids", _MATRIX), ("inputs_embeds", _SEQUENCES)):
        value = columns.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() == dims:
            return value.shape[1]
    return None


def _label_length(batch: Batch) -> int | None:
    """Length of labels of one id per token."""
    for name in batch.labels:
        value = batch.columns[name]
        if isinstance(value, Tensor) and value.dim() == _MATRIX and not value.is_floating_point():
            return value.shape[1]
    return None


def _starts(columns: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """First position of each example that a mask ``(examples, positions)`` lets in."""
    mask = columns.get(name)
    if not isinstance(mask, Tensor) or mask.dim() != _MATRIX:
        return ()
    starts = (mask != 0).int().argmax(1).tolist()
    return tuple(starts) if any(starts) else ()


def _is_media(name: str, value: Any) -> bool:
    """Whether a column holds pictures or sounds."""
    is_embeddings = name.endswith("inputs_embeds")
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= _SEQUENCES
        and not is_embeddings
    )
