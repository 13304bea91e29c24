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

from ..checkpoint.apply import compared, half_tolerance, outputs_of
from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe
from ..data.loading import Source, load_model, open_source
from ..data.random_batch import random_batch
from ..errors import CheckpointError, GradNASError, described
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
        CheckpointError: Outputs differ by more than rounding, or one of the two does not run.
        RecipeError: One of them cannot be loaded.
    """
    try:
        found, wanted, half, is_large = _outputs(original, written, axes, plan, repair, dtype)
    except GradNASError:
        raise
    except Exception as error:  # the model's own code, a full disk, too little memory
        raise CheckpointError(
            f"{written}: is complete, but cannot be run beside the original ({described(error)}); "
            "hf-gradnas verify compares its files, and loads it."
        ) from error
    apart, wrong = compared(found, wanted, half=half)
    if wrong:
        raise CheckpointError(
            f"{written}: it {wrong}; do not use it. Report the model's class and config."
        )
    how = ", layer by layer, as there is no room for all weights" if is_large else ""
    return f"Checked{how}: it puts out what the original does, masked (at most {apart:.1g} apart)."


def _outputs(
    original: Path,
    written: Path,
    axes: Sequence[Axis],
    plan: Plan,
    repair: Repair | None,
    dtype: str,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], float, bool]:
    """Outputs of the cut model, those of the original, their `half_tolerance`; was it too large?"""
    with tempfile.TemporaryDirectory(prefix="hf_gradnas-") as scratch:
        source, model = _opened(original, dtype, scratch)
        batch = random_batch(source, model, max_length=TOKENS)
        is_large, half = is_offloaded(model), half_tolerance(model)
        with ExitStack() as stack:
            masks = masked(model, axes, plan.kept)
            stack.enter_context(masks if repair is None else repaired(model, repair, masks))
            wanted = outputs_of(model, ((), batch))
        del model
        _, model = _opened(written, dtype, scratch)
        return outputs_of(model, ((), batch)), wanted, half, is_large


def _opened(folder: Path, dtype: str, scratch: str) -> tuple[Source, PreTrainedModel]:
    room, options = (
        room_for(folder, dtype),
        dict[str, Any](model=str(folder), dtype=dtype, device="cpu"),
    )
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
