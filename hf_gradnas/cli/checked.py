"""Runs a whole checkpoint, masked, and the one that was cut from it, on the same random input.

Either may be larger than the memory: its weights are then loaded as their layers run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoint.apply import difference, outputs_of
from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..data.loading import Source, load_model, open_source
from ..data.random_batch import random_batch
from ..errors import CheckpointError
from ..masks import masked
from ..repair.repairs import repaired
from ..running.offloading import is_offloaded
from ..types import Axis, Plan
from .verify import room_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..repair import Repair

TOKENS = 16
"""Tokens of each of the two random examples."""


def compare_outputs(
    original: Path,
    written: Path,
    axes: Sequence[Axis],
    plan: Plan,
    repair: Repair | None,
    *,
    dtype: str,
) -> str:
    """Compare what a cut checkpoint puts out with what the original does, masked and repaired.

    Args:
        original: Folder of the whole model.
        written: Folder of what was cut from it.
        axes: Axes of the plan.
        plan: What was kept.
        repair: New weights for this plan; None: none.
        dtype: As ``apply`` had it.

    Returns:
        What was found, as a sentence.

    Raises:
        CheckpointError: Outputs differ by more than rounding.
        RecipeError: One of them cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="hf_gradnas-") as scratch:
        source, model = _opened(original, dtype, scratch)
        batch = random_batch(source, model, max_length=TOKENS)
        is_large = is_offloaded(model)
        with ExitStack() as stack:
            masks = masked(model, axes, plan.kept)
            stack.enter_context(masks if repair is None else repaired(model, repair, masks))
            wanted = outputs_of(model, ((), batch))
        del model
        _, model = _opened(written, dtype, scratch)
        found = outputs_of(model, ((), batch))
    apart = _largest(written, found, wanted)
    how = ", layer by layer, as there is no room for all weights" if is_large else ""
    return f"Checked{how}: it puts out what the original does, masked (at most {apart:.1g} apart)."


def _opened(folder: Path, dtype: str, scratch: str) -> tuple[Source, PreTrainedModel]:
    room, options = room_for(folder), dict[str, Any](model=str(folder), dtype=dtype, device="cpu")
    if room is not None:
        del options["device"]
        options |= {
            "device_map": "auto",
            "max_memory": [f"cpu={room >> 10}KiB"],
            "offload_folder": scratch,
        }
    recipe: Recipe = build_recipe(options)
    source = open_source(recipe, str(folder), needs_processor=False)
    return source, load_model(recipe, source, str(folder))[0]


def _largest(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of two models' outputs, relative to the largest value.

    Raises:
        CheckpointError: It is more than rounding, or outputs have other shapes.
    """
    largest = 0.0
    for name in dict.fromkeys([*wanted, *found]):
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            apart, limit = float("nan"), 0.0
        else:
            apart, limit = difference(found[name], wanted[name])
        if not apart <= limit:  # catches nan too
            raise CheckpointError(
                f"{folder}: its {name or 'output'} differs by {apart:.2g} from the original's, "
                f"masked (at most {limit:g} is accepted); do not use it. Report the model's class "
                "and config."
            )
        largest = max(largest, apart)
    return largest
