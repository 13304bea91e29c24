"""Heads that a generation config names by layer and number: they are counted anew after a cut.

Of all configs of Transformers 5.23 only Whisper's has such a key: the cross-attention heads whose
probabilities tell when a word was said.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..errors import GradNASWarning
from ..types import KINDS, Axis

# Key of pairs (layer, head), and the path of a layer's attention.
ROWS = (("alignment_heads", "model.decoder.layers.{}.encoder_attn"),)


def renumber_heads(
    model: PreTrainedModel, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]
) -> None:
    """Count the heads that a cut model's generation config names among those that are left.

    Args:
        model: The model, whose generation config is changed.
        axes: All its axes before the cut.
        kept: Kept units per axis name.

    Warns:
        GradNASWarning: Some of the heads are gone, or all that the key can be used with.
    """
    config = vars(model).get("generation_config")
    values = {} if config is None else vars(config)
    heads = {axis.module: axis for axis in axes if KINDS[axis.kind].attends}
    for key, path in ROWS:
        pairs: Any = values.get(key)
        if not _are_pairs(pairs):
            continue
        left = _left(pairs, path, heads, kept)
        gone = [list(pair) for pair, found in zip(pairs, left, strict=True) if found is None]
        found = [pair for pair in left if pair is not None]
        # Where an attention is gone, Transformers finds no probabilities of its layer.
        removed = [
            axis.module
            for axis in heads.values()
            if not kept.get(axis.name, range(axis.size)) and _layer_of(axis.module, path)
        ]
        if removed or not found:
            del values[key]
            why = f"{removed[0]} lost all its heads" if removed else "they were all cut"
            _warn(f"{key} is taken out of the generation config, since {why}: word timestamps")
            continue
        values[key] = found
        if gone:
            _warn(
                f"{key} of the generation config loses {gone} ([layer, head]), which were cut, and "
                f"keeps {len(found)} of {len(pairs)}: word timestamps may be less exact; those"
            )


def _are_pairs(pairs: Any) -> bool:
    if not pairs or not isinstance(pairs, list | tuple):
        return False
    return all(
        isinstance(pair, list | tuple) and [type(n) for n in pair] == [int, int] for pair in pairs
    )


def _left(
    pairs: Sequence[Sequence[int]],
    path: str,
    heads: Mapping[str, Axis],
    kept: Mapping[str, Sequence[int]],
) -> list[list[int] | None]:
    """Each pair as it is after the cut; None where its head is gone."""
    found: list[list[int] | None] = []
    for layer, head in pairs:
        axis = heads.get(path.format(layer))
        units = list(range(head + 1) if axis is None else kept.get(axis.name, range(axis.size)))
        found.append([layer, units.index(head)] if head in units else None)
    return found


def _layer_of(module: str, path: str) -> bool:
    """Whether a module is the attention of one of the layers."""
    start, end = path.split("{}")
    return module.startswith(start) and module.endswith(end)


def _warn(text: str) -> None:
    warnings.warn(
        f"{text} need heads that stay; keep them with rules={{'*encoder_attn*': None}}.",
        GradNASWarning,
        stacklevel=4,
    )
