"""Are the weights of a model all from its checkpoint, and is its head that of the task?

What is drawn at random is worth nothing: its scores, and every figure, would say nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import GradNASWarning, RecipeError
from .tasks import Head, architecture_of, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.recipe import Recipe
    from .loading import Source

_SHOWN = 4
_ANY = (None, Head.BASE)
# Parts of a model that a task brings along, where no module of its own holds the body. A pooler is
# often drawn anew for a task.
_HEADS = frozenset(
    ["lm_head", "cls", "classifier", "score", "qa_outputs", "pooler", "proj_out", "embed_out"]
)
# Buffers that older versions saved and every version computes.
_COMPUTED = ("position_ids", "inv_freq", "masked_bias", "attn.bias", "token_type_ids")


def check_head(recipe: Recipe, source: Source, model: PreTrainedModel, missing: list[str]) -> None:
    """Check that a model came whole from its checkpoint, or that a new head was asked for.

    Args:
        recipe: `allow_new_head` allows what concerns the head alone.
        source: What was loaded.
        model: With its weights.
        missing: Names of weights that the checkpoint does not hold.

    Raises:
        RecipeError: Weights are random, or the head was trained for another task.
    """
    body = [name for name in missing if _is_of_body(name, model)]
    own = architecture_of(source.config)
    where = f"--model {recipe.model}: its checkpoint ({own or 'of no named class'})"
    if body:
        raise RecipeError(
            f"{where} has no weights for {listed(body)} of {type(model).__name__}, which are not "
            "its head's; they would be random. Check that its files are whole and its config.json "
            "is theirs, and --task."
        )
    if missing and recipe.recover_epochs and not recipe.dry_run:
        raise RecipeError(
            f"--recover-epochs {recipe.recover_epochs:g}: the checkpoint has no weights for "
            f"{listed(missing)}, so there is nothing to learn from it; fine-tune it first, or "
            "omit --recover-epochs."
        )
    if recipe.allow_new_head:
        return
    if missing:
        advice = "fine-tune it first, " + ("omit --task, " if recipe.task else "")
        raise RecipeError(
            f"{where} has no weights for {listed(missing)} of {type(model).__name__}; they would "
            f"be random, and scores and metrics would mean little. {advice.capitalize()}or give "
            "--allow-new-head to go on."
        )
    trained = task_of(source.config)
    is_another = own is not None and type(model).__name__ != own
    heads = (trained and trained.head, source.task.head)
    if recipe.task and is_another and heads[0] != heads[1] and not set(heads) & set(_ANY):
        raise RecipeError(
            f"{where} was trained for {trained and trained.name}, and its head has the form that "
            f"--task {recipe.task} needs but not the meaning; fine-tune it first, leave --task "
            "away, or give --allow-new-head to go on."
        )


def warn_of_unused(model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Warn of weights of the checkpoint that belong to the body, and that its class has no use for.

    Those of other heads are left out as a matter of course.
    """
    lost = [name for name in sorted(unexpected) if _is_of_body(name, model)]
    lost = [name for name in lost if not name.endswith(_COMPUTED)]
    if lost:
        warnings.warn(
            f"{type(model).__name__}: does not use {listed(lost)}, which the checkpoint holds; "
            "they are dropped. Check that config.json belongs to the weights.",
            GradNASWarning,
            stacklevel=2,
        )


def listed(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _is_of_body(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is not the head's, by the module that holds it."""
    parts = name.split(".")
    if parts[0] == model.base_model_prefix:
        parts = parts[1:]
    if set(parts) & _HEADS:
        return False
    return parts[0] in dict(model.base_model.named_children())
