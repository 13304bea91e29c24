"""Models that hold a Transformers model and run it: those of sentence-transformers.

The library is known by the names of its modules and is never imported: it is no dependency.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import StructureError
from .wrappers import check_no_adapters, unwrapped

LIBRARY = "sentence_transformers"
SENTENCE_CLASSES = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")
"""Classes of the library that load a folder, as its ``model_type`` names them."""
# What ends the name of a column that holds a text, picture or sound; the rest names the column.
_FEATURES = ("input_ids", "pixel_values", "input_features", "input_values")


def sentence_class(model: nn.Module) -> str | None:
    """Name of the class of sentence-transformers that a model is one of, or None."""
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] == LIBRARY and cls.__name__ in SENTENCE_CLASSES:
            return cls.__name__
    return None


def body_of(model: nn.Module) -> tuple[PreTrainedModel, Any]:
    """The Transformers model that can be pruned, and the model of sentence-transformers around it.

    Args:
        model: Either of them, also inside DDP or ``torch.compile``.

    Returns:
        The Transformers model, and the one around it or None.

    Raises:
        StructureError: It is neither, holds several Transformers models or none, or adapters.
    """
    inner = unwrapped(model)
    check_no_adapters(inner)
    if isinstance(inner, PreTrainedModel):
        return inner, None
    if sentence_class(inner) is None:
        raise StructureError(
            f"model: found a {type(inner).__name__}, needed a Transformers PreTrainedModel; "
            "pass the model itself."
        )
    bodies = list({id(body): body for body in _bodies(inner)}.values())
    if len(bodies) != 1:
        found = ", ".join(type(body).__name__ for body in bodies) or "none"
        raise StructureError(
            f"model: a {type(inner).__name__} with one Transformers model is needed, found "
            f"{found}; pass the Transformers model that is to be pruned."
        )
    return bodies[0], inner


def _bodies(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost Transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _bodies(child)


def save_owner(owner: Any, folder: Path) -> None:
    """Let a model of sentence-transformers write itself, and the Transformers model in it."""
    owner.save_pretrained(str(folder), create_model_card=False)


class Features:
    """Batches of a trainer of sentence-transformers, as batches of the Transformers model.

    Its collator gives the tokens of every column under the column's name; each column is a batch.

    Args:
        batches: Can be read more than once.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield from split_features(batch)


def split_features(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The batches of one text, picture or sound each that a batch consists of."""
    prefixes = [
        name.removesuffix(ending)
        for name in batch
        for ending in _FEATURES
        if name == ending or name.endswith(f"_{ending}")
    ]
    for prefix in dict.fromkeys(prefixes):
        columns = {
            name.removeprefix(prefix): value
            for name, value in batch.items()
            if name.startswith(prefix) and isinstance(value, Tensor)
        }
        yield {name: value for name, value in columns.items() if name not in ("label", "labels")}
