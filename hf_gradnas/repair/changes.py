"""What a fit changes: in the weights of layers, and in what a waiting forward holds.

Knows readers, feeds and their weights; knows nothing of how a solution was found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..running.lending import value_of
from .paused import Forward
from .readers import Feed, Gate, Reader, applied, input_dim, weight_of

_BLOCK = 4096  # outputs at a time: those of a head may be hundreds of thousands


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is added to a reader's weights, or the map ``x + xD + c`` of a feed.

    Attributes:
        weight: In the layout of the reader's weight, of the inputs that stay; or D
            ``(features, features)``.
        bias: Of all outputs; or c ``(features,)``. None: there is no bias.
    """

    weight: Tensor
    bias: Tensor | None


def _matrix(reader: Reader, weight: Tensor) -> Tensor:
    """A weight in the layout of the unknowns ``(columns, outputs)``."""
    return weight if reader.input_dim == 0 else weight.flatten(1).t()


def unknowns_of(reader: Reader | Feed) -> tuple[int, int, Tensor]:
    """Numbers of inputs and outputs that are fitted, and a tensor of their type."""
    if isinstance(reader, Feed):
        return reader.features, reader.features, value_of(reader.layers[0][1])
    weight = value_of(reader.module)
    columns, outputs = _matrix(reader, weight).shape
    columns = columns // weight.shape[reader.input_dim] * len(reader.kept)
    return columns, outputs if reader.outputs is None else len(reader.outputs), weight


def present_weights(reader: Reader, outputs: range) -> Tensor:
    """Present weights of the inputs that stay, of some outputs ``(kept, outputs)``."""
    weight = value_of(reader.module)
    across = weight if reader.input_dim == 0 else weight.t()  # (inputs, outputs)
    index = torch.tensor(reader.kept, dtype=torch.long, device=weight.device)
    return across[:, outputs.start : outputs.stop : outputs.step].index_select(0, index)


def is_centred(reader: Reader | Feed) -> bool:
    """Whether an intercept is fitted."""
    return reader.has_bias if isinstance(reader, Feed) else reader.bias is not None


def change_of(
    reader: Reader | Feed, solution: Tensor, intercept: Tensor, *, is_whole: bool = False
) -> Change:
    """What a solution adds to a reader's weights, rounded to their type, or the map of a feed.

    Args:
        reader: What was fitted.
        solution: ``(columns, outputs)``; a whole one is overwritten.
        intercept: ``(outputs,)``.
        is_whole: Whether the solution is all weights, not what is added to them; of all outputs.
    """
    if isinstance(reader, Feed):
        return Change(solution, intercept if reader.has_bias else None)
    weight = weight_of(reader, reader.kept)
    if is_whole:
        solution -= _matrix(reader, weight).to(solution)
    added = torch.zeros_like(_matrix(reader, weight), dtype=solution.dtype)  # (columns, outputs)
    outputs = slice(None) if reader.outputs is None else list(reader.outputs)
    added[:, outputs] = solution.to(added)
    if reader.input_dim != 0:
        added = added.t().reshape(weight.shape)
    bias = None
    if reader.bias is not None:
        bias = intercept.new_zeros(len(reader.bias))
        bias[outputs] = intercept.to(bias)
        bias = _rounded(value_of(reader.module, "bias"), bias)
    return Change(_rounded(weight, added), bias)


def _rounded(old: Tensor, added: Tensor) -> Tensor:
    """What is added to a tensor once the sum is of its type."""
    new = (old.to(added) + added).to(old.dtype)
    return new.to(added) - old.to(added)


def new_values(changes: Mapping[Reader | Feed, Change]) -> dict[str, Tensor]:
    """Whole new parameters by name, on the CPU."""
    values: dict[str, Tensor] = {}
    for reader, change in changes.items():
        if isinstance(reader, Feed):
            values |= {name: value.cpu() for name, value in fed_values(reader, change).items()}
            continue
        weight = value_of(reader.module)
        index = torch.tensor(reader.kept, dtype=torch.long, device=weight.device)
        # Sums of the wider type: what is added need not be a number of 16 bits.
        new = weight.to(change.weight.dtype, copy=True)
        new.index_add_(reader.input_dim, index, change.weight.to(new))
        values[f"{reader.path}.weight"] = new.to(weight.dtype).cpu()
        if change.bias is not None and reader.bias is not None:
            bias = value_of(reader.module, "bias")
            values[f"{reader.path}.bias"] = (bias.to(change.bias) + change.bias).to(bias).cpu()
    return values


def fed_values(feed: Feed, change: Change) -> dict[str, Tensor]:
    """New parameters of the layers of a feed by name, where the old ones are."""
    values: dict[str, Tensor] = {}
    for path, module in feed.layers:
        values |= _mapped(path, module, change)
    return values


def _mapped(path: str, module: nn.Module, change: Change) -> dict[str, Tensor]:
    """New parameters of a layer that read ``x`` and now read ``x + xD + c``."""
    weight = value_of(module)
    new_weight = weight.clone()
    values = {f"{path}.weight": new_weight}
    old, new = (part if input_dim(module) == 0 else part.t() for part in (weight, new_weight))
    bias = None if change.bias is None else value_of(module, "bias")
    if bias is not None:
        values[f"{path}.bias"] = bias.clone()
    for start in range(0, old.shape[1], _BLOCK):
        part = slice(start, start + _BLOCK)
        across = old[:, part].to(change.weight)  # (features, outputs)
        new[:, part] = (across + change.weight @ across).to(new)
        if bias is not None and change.bias is not None:
            added = change.bias @ across
            values[f"{path}.bias"][part] = (bias[part].to(added) + added).to(bias.dtype)
    return values


def unchanged(
    present: Callable[[range], Tensor] | None, outputs: int, every: int = 1
) -> tuple[Tensor, Tensor] | None:
    """The solution that changes nothing, of every so many outputs: present weights, or None: 0."""
    if present is None:
        return None
    weight = present(range(outputs)[::every])  # (columns, outputs)
    return weight, weight.new_zeros(weight.shape[1])


class Outputs:
    """Gives pruned forwards that wait at a gate the outputs of the new weights of its readers.

    Args:
        gates: All gates.
        late: Paths of readers whose own outputs are left out until then (`Conductor.late`).

    Attributes:
        seen: Readers that were fitted, with success or without.
        found: Those with success.
    """

    def __init__(self, gates: Sequence[Gate], late: Collection[str]) -> None:
        self.seen: set[Reader | Feed] = set()
        self.found: set[Reader | Feed] = set()
        self._changes: dict[Reader | Feed, Change] = {}
        self._gates, self._late = gates, late
        self._latest: tuple[Reader, Tensor] | None = None

    def put(self, reader: Reader | Feed, change: Change) -> None:
        """Have what was found of a reader; of a feed forwards have the new weights."""
        self.found.add(reader)
        if isinstance(reader, Reader):
            self._changes[reader] = change

    def forget(self, number: int) -> None:
        """Let go of changes at all gates before one, when no forward waits there any more."""
        for gate in self._gates[:number]:
            for reader in gate.readers:
                self._changes.pop(reader, None)
        if self._latest is not None and self._latest[0] not in self._gates[number].readers:
            self._latest = None

    def settle(self, forward: Forward) -> None:
        """Change the tensor that a pruned forward waits at as the new weights so far would."""
        if not forward.is_pruned or forward.tensor is None:
            return
        gate = self._gates[forward.gate]
        for reader, scale in list(zip(gate.readers, gate.scales, strict=True))[forward.settled :]:
            if reader not in self.seen:
                return
            forward.settled += 1
            if isinstance(reader, Reader) and reader.path in forward.inputs:
                self._add(forward, reader, scale)

    def _add(self, forward: Forward, reader: Reader, scale: Tensor | float) -> None:
        change, is_late = self._changes.get(reader), reader.path in self._late
        if change is not None:
            forward.took.add(reader)
        elif not is_late:
            return
        x, tensor = forward.inputs[reader.path], cast(Tensor, forward.tensor)
        weight = self._whole(reader) if is_late else cast(Change, change).weight.to(x)
        bias = None if change is None or change.bias is None else change.bias.to(x)
        added = applied(reader, x, weight, bias)
        if isinstance(scale, Tensor) and reader.is_conv:
            scale = scale.view(-1, *[1] * (added.dim() - 2))  # (channels, 1, …)
        if isinstance(scale, Tensor) or scale != 1:
            added = added * scale
        tensor += added.view_as(tensor).to(tensor)

    def _whole(self, reader: Reader) -> Tensor:
        """New weight of the inputs that stay, or the present one; of one reader it is kept."""
        if self._latest is None or self._latest[0] is not reader:
            self._latest = None  # before there is another
            weight, change = weight_of(reader, reader.kept), self._changes.get(reader)
            if change is not None:
                weight = (weight.to(change.weight) + change.weight).to(weight)
            self._latest = reader, weight
        return self._latest[1]
