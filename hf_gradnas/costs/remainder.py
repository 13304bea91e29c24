"""What holds the cost that no plan can change, in words: embeddings, head, norms, refused modules.

Reads which parameter belongs where; the amounts come from `counting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from ..types import Axis, Refusal

EMBEDDINGS, HEAD, SHARED = "embeddings", "the model's head", "embeddings (tied to the LM head)"
REFUSED, NORMS, OTHER = "refused modules", "norms and biases", "other modules"
_ONE_DIMENSION = 1


def parts_of_rest(
    model: nn.Module,
    axes: Iterable[Axis],
    refusals: Sequence[Refusal],
    *,
    costs: Mapping[str, float],
    constant: float,
) -> dict[str, float]:
    """Cost of the parameters that no axis cuts, by what they are; largest first.

    Args:
        model: The model.
        axes: Its axes, with parameters by the names that they are counted under.
        refusals: What was seen but cannot be pruned.
        costs: Cost of every parameter, by name.
        constant: What no plan can change; what no parameter accounts for is `OTHER`.
    """
    cut = {part.tensor for axis in axes for part in axis.slices}
    removed = tuple(f"{axis.removal.module}." for axis in axes if axis.removal is not None)
    kinds = _kinds(model)
    parts: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if name in cut or name.startswith(removed):
            continue
        kind = kinds.get(name) or _kind_of(name, parameter.dim(), refusals)
        parts[kind] = parts.get(kind, 0.0) + costs[name]
        if kind == OTHER:
            others[name.rpartition(".")[0]] = costs[name]
    parts[OTHER] = parts.get(OTHER, 0.0) + constant - sum(parts.values())
    if others:
        parts[f"{OTHER} such as {max(others, key=others.__getitem__)}"] = parts.pop(OTHER)
    found = {kind: cost for kind, cost in parts.items() if cost > 0}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Kind of the parameters of embeddings and of the head, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            kinds[names[id(module.weight)]] = EMBEDDINGS
    if not isinstance(model, PreTrainedModel):
        return kinds
    base = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in base:
            kinds[names[id(parameter)]] = HEAD
    output = model.get_output_embeddings()
    for parameter in () if output is None else output.parameters():
        is_shared = kinds.get(names[id(parameter)]) == EMBEDDINGS
        kinds[names[id(parameter)]] = SHARED if is_shared else HEAD
    return kinds


def _kind_of(name: str, dims: int, refusals: Iterable[Refusal]) -> str:
    if any(name.startswith(f"{refusal.module}.") for refusal in refusals if refusal.module):
        return REFUSED
    return NORMS if dims <= _ONE_DIMENSION else OTHER
