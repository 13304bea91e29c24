"""A config of the same class with fewer units, whose model is small enough to be run.

Only counts are made smaller: a unit stays as wide as it is, and as many heads read a KV group. The
hidden size shrinks by the same factor as the heads, from which their width may be derived.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import prod

from transformers import PreTrainedConfig, PreTrainedModel

from ..stock.values import candidates, real_key, scopes, stored
from ..surgery.rows import shapes_of
from ..types import Kind
from .layers import NeedsWeightsError, build_unloaded

ENOUGH = 30_000_000
"""Parameters of a model that is small enough."""
VOCABULARY = 512
FEWEST_EXPERTS = 32
FEWEST_HEADS = 4
FEWEST_GROUPS = 2
SMALLEST_HIDDEN = 128
NEURONS = 96
STEP = 16
"""Between the numbers of neurons that take the place of different ones."""

Change = Callable[[PreTrainedConfig], None]


def shrunk(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Configs that build smaller models with the same names, the smallest first.

    Args:
        model: An unloaded model.
    """
    config = copy.deepcopy(model.config)
    configs, names = [config], shapes_of(model).keys()
    for change in (_fewer_tokens, _fewer_neurons, _fewer_experts, _fewer_heads):
        if _parameters(model) <= ENOUGH:
            break
        trial = copy.deepcopy(config)
        change(trial)
        try:
            smaller = build_unloaded(type(model), trial)
        except NeedsWeightsError:
            continue
        if shapes_of(smaller).keys() == names:
            model, config = smaller, trial
            configs.append(config)
    return reversed(configs)


def _parameters(model: PreTrainedModel) -> int:
    return sum(prod(parameter.shape) for parameter in model.parameters())


def _fewer_tokens(config: PreTrainedConfig) -> None:
    """A vocabulary of a few hundred, with special tokens in it."""
    for _, scope in scopes(config):
        size = stored(scope).get("vocab_size")
        if not (isinstance(size, int) and size > VOCABULARY):
            continue
        scope.vocab_size = VOCABULARY
    for _, scope in scopes(config):
        for name, value in list(stored(scope).items()):
            if name.endswith(("token_id", "token_index")) and value is not None:
                setattr(scope, name, _within(value))


def _within(value: int | list[int]) -> int | list[int]:
    if isinstance(value, int):
        return value if value < VOCABULARY else value % (VOCABULARY // 2) + VOCABULARY // 2
    return [int(token % VOCABULARY) for token in value]


def _fewer_neurons(config: PreTrainedConfig) -> None:
    """About a hundred neurons, other numbers where they were others."""
    places = [(s, key) for _, s in scopes(config) for key in candidates(s, Kind.NEURONS)]
    sizes = {size for s, key in places if isinstance(size := stored(s)[key], int)}
    large = sorted(size for size in sizes if size > 2 * NEURONS + STEP * len(sizes))
    new = {size: NEURONS + STEP * rank for rank, size in enumerate(large)}
    for scope, key in places:
        size = stored(scope)[key]
        setattr(scope, key, new.get(size, size))


def _fewer_experts(config: PreTrainedConfig) -> None:
    """Half as many experts, as often as that leaves enough to choose from."""
    for _, scope in scopes(config):
        for key, number in candidates(scope, Kind.EXPERTS).items():
            few = number or 0
            while few > FEWEST_EXPERTS and few % 2 == 0:
                few //= 2
            if number is not None:
                setattr(scope, key, few)


def _fewer_heads(config: PreTrainedConfig) -> None:
    """Fewer heads and KV groups, and a hidden size that is smaller by the same factor."""
    for _, scope in scopes(config):
        heads = [key for key, n in candidates(scope, Kind.HEADS).items() if n]
        groups = [key for key, n in candidates(scope, Kind.KV_GROUPS).items() if n]
        hidden = stored(scope).get(real_key(scope, "hidden_size"))
        if not heads or not isinstance(hidden, int):
            continue
        counted = [*heads, *groups]
        values = stored(scope)
        factor = 1
        while (
            all(values[key] % (2 * factor) == 0 for key in counted)
            and hidden % (2 * factor) == 0
            and min(values[key] for key in heads) // (2 * factor) >= FEWEST_HEADS
            and min((values[key] for key in groups), default=hidden) // (2 * factor)
            >= FEWEST_GROUPS
            and hidden // (2 * factor) >= SMALLEST_HIDDEN
        ):
            factor *= 2
        for key in counted:
            setattr(scope, key, values[key] // factor)
        for _, other in scopes(config):
            for name, value in list(stored(other).items()):
                if type(value) is int and value == hidden:
                    setattr(other, name, hidden // factor)
