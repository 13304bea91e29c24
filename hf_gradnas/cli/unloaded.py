"""The inspect command without weights: from a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..blueprint import NeedsWeightsError, find_blueprint
from ..config.limits import parse_rules
from ..config.recipe import Recipe
from ..data.random_batch import random_batch
from ..errors import RecipeError, StructureError
from .inspect import Inspection, NothingError, has_tokens, inspected, opened


def inspect_config(recipe: Recipe, *, given: frozenset[str] = frozenset()) -> Inspection:
    """Look at the model of a recipe, of any size, by a small one of its class.

    Args:
        recipe: Its model, layout and rules.
        given: Names of the options that were given.

    Raises:
        RecipeError: The config or an option cannot be used.
        StructureError: Nothing can be pruned, a glob matches nothing, or weights are needed.
        PlanError: Layout ``stock`` was asked for, and the class can express nothing.
    """
    for name in ("dataset", "device"):
        if name in given:
            raise RecipeError(
                f"--{name}: --no-weights runs a small model on random input, on the CPU; omit one "
                "of the two."
            )
    source, max_length = opened(recipe, given)
    rules, length = parse_rules(recipe.rules()), recipe.flops_length or max_length
    if recipe.dtype != "auto":
        source.config.dtype = getattr(torch, recipe.dtype)

    def batch_of(config: PreTrainedConfig, model: PreTrainedModel) -> Mapping[str, Any]:
        own = replace(
            source, config=config, tokenizer=None if source.input == "text" else source.tokenizer
        )
        return random_batch(own, model, max_length=max_length, seed=recipe.seed)

    tokens = length if has_tokens(source) else None
    limits: dict[str, Any] = {"layout": recipe.layout, "rules": rules, "flops_length": tokens}
    limits["layers"] = "layers" in recipe.axes
    try:
        blueprint = find_blueprint(source.cls, source.config, batch_of, **limits)
    except NeedsWeightsError:
        raise
    except StructureError as error:
        raise NothingError(str(error)) from error
    return inspected(blueprint.model, blueprint.prunable, source, rules, tokens)
