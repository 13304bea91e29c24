"""Is a cut checkpoint made of the original's kept rows, bit by bit? From files alone, in pieces.

The original is cut anew without its weights in memory, as `apply_to_checkpoint` does, and each
piece is compared with what was written, instead of being written.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..repair.repairs import Repair
from ..types import Plan, Prunable
from .apply import cut_model, read_config
from .files import open_checkpoint
from .model import lazy_model, model_class, saved_tensors
from .parts import Part, Rows, Stored
from .writing import CHUNK, bytes_of


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the tensors of a cut checkpoint compare with the original's kept rows.

    Attributes:
        equal: Number of tensors that equal them.
        differing: Names of tensors that do not, or that are in one of both alone.
        repaired: Names of those that differ in layers which a repair changed.
    """

    equal: int
    differing: tuple[str, ...]
    repaired: tuple[str, ...]


def compare_with_original(
    folder: str | Path,
    original: str | Path,
    plan: Plan,
    prunable: Prunable,
    *,
    repair: Repair | None = None,
    changed: Collection[str] = (),
    cls: type[PreTrainedModel] | None = None,
    dtype: str = "auto",
) -> Comparison:
    """Compare every tensor of a cut checkpoint with the rows that the plan keeps of the original.

    Args:
        folder: The cut checkpoint.
        original: The whole one.
        plan: What was cut.
        prunable: The axes that the plan was made for.
        repair: New weights that were cut along; None: none are known.
        changed: Paths of modules that an unknown repair gave new weights.
        cls: Class of the model; None: the one that the original's config names.
        dtype: Of the cut checkpoint.

    Raises:
        CheckpointError: A file of either is missing or damaged.
        CutError: The original cannot be cut from its files.
        PlanError: The plan is that of another model.
        RepairError: The repair is that of another plan or model.
    """
    found, opened = open_checkpoint(folder).tensors, open_checkpoint(original)
    config = read_config(opened.folder)
    model = lazy_model(opened, config, cls or model_class(config), dtype=dtype)
    cut_model(model, plan, prunable, repair)
    wanted = saved_tensors(model)
    differing = [name for name, part in wanted.items() if not _is_same(found.get(name), part)]
    readers = {s.module for axis in prunable.axes for s in axis.slices if s.role == "reads"}
    mended = [name for name in differing if name in found and _is_in(name, changed, readers)]
    rest = [*(name for name in differing if name not in mended), *(found.keys() - wanted.keys())]
    return Comparison(len(wanted) - len(differing), tuple(sorted(rest)), tuple(mended))


def _is_in(name: str, changed: Collection[str], readers: Collection[str]) -> bool:
    """Whether an unknown repair may have changed a tensor.

    It changed the modules that it names. One that reads no units of its own is the first of several
    that read the same (query, key and value), which it changed, too.
    """
    if any(name.startswith(f"{module}.") for module in changed):
        return True
    places = {module.rpartition(".")[0] for module in changed if module not in readers}
    beside = any(name.startswith(f"{place}.") for place in places if place)
    return beside and not any(name.startswith(f"{module}.") for module in readers)


def _is_same(found: Stored | None, wanted: Part) -> bool:
    """Whether two tensors are equal to the last bit."""
    if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    rest: list[Rows] = [None] * (len(wanted.shape) - 1)
    count = wanted.shape[0] if wanted.shape else 1
    size = bytes_of(wanted)
    if not wanted.shape or not wanted.is_streamed or size <= CHUNK:
        return _bits_equal(found.whole(), wanted.whole())
    step = max(1, CHUNK * count // size)
    places = (torch.arange(n, min(n + step, count)) for n in range(0, count, step))
    return all(_bits_equal(found.read([p, *rest]), wanted.read([p, *rest])) for p in places)


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*flat)
