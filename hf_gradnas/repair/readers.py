"""The layers that read pruned units, and what is computed with them.

A layer that loses inputs can be mended where its output is seen beside the original's: at a gate
(`streams` finds them). Knows modules, weights and paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..running.lending import value_of
from ..running.offloading import Weights
from ..surgery.rows import Kept, kept_rows, shapes_of
from ..types import Axis

_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, Conv1D.forward)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One layer that loses inputs.

    Attributes:
        path: Its path.
        module: A ``Linear``, ``Conv1D`` of Transformers, or convolution of one group.
        kept: Inputs that stay, sorted.
        lost: Inputs that go.
        outputs: Outputs that stay; None: all.
        alone: Whether it is compared with what it lost on the same inputs, not with the original:
            its rows are no fixed places of a batch (the tokens that a router sends to an expert).
    """

    path: str
    module: nn.Module
    kept: tuple[int, ...]
    lost: tuple[int, ...]
    outputs: tuple[int, ...] | None
    alone: bool = False

    @property
    def is_conv(self) -> bool:
        """Whether its features are dimension 1, else the last."""
        return isinstance(self.module, _ConvNd)

    @property
    def input_dim(self) -> int:
        """Dimension of its weight that counts inputs."""
        return cast(int, input_dim(self.module))

    @property
    def bias(self) -> nn.Parameter | None:
        """Its bias."""
        return cast("nn.Parameter | None", self.module.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """Layers that lose no inputs, and read one common input.

    That input is brought nearer to the original's by a linear map, which goes into their weights.

    Attributes:
        layers: Each by path, in running order; ``Linear`` or ``Conv1D`` of Transformers.
        maker: Path of the module that put the input out; "" where none did.
    """

    layers: tuple[tuple[str, nn.Module], ...]
    maker: str = ""

    @property
    def path(self) -> str:
        """Path of the first layer."""
        return self.layers[0][0]

    @property
    def features(self) -> int:
        """Features of the input."""
        module = self.layers[0][1]
        return int(cast(Tensor, module.weight).shape[cast(int, input_dim(module))])

    @property
    def has_bias(self) -> bool:
        """Whether all of them have a bias."""
        return all(module.bias is not None for _, module in self.layers)


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor among the arguments or results of a module call."""

    path: str
    side: str
    key: int | str | None
    call: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Where the outputs of some readers are seen, in running order.

    Attributes:
        place: The tensor.
        readers: Layers whose outputs enter it, in running order; or the one feed that it is.
        scales: Per reader what its output is multiplied by on the way: a number or ``(features,)``.
    """

    place: Place
    readers: tuple[Reader | Feed, ...]
    scales: tuple[Tensor | float, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """All readers of a plan: those that can be mended, by gate, and why others cannot, by path.

    Attributes:
        gates: In running order.
        reasons: Of those that cannot, by path.
        order: Paths of all that ran, in running order.
    """

    gates: tuple[Gate, ...]
    reasons: Mapping[str, str]
    order: tuple[str, ...]


def input_dim(module: nn.Module) -> int | None:
    """Dimension of a layer's weight that counts inputs; None where the layer is of another kind.

    A subclass with a forward of its own may compute with other weights than it holds (of few bits,
    or of norm 1), so it is of another kind.
    """
    if type(module).forward not in _FORWARDS:
        return None
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, Conv1D):
        return 0
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        is_plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return 1 if is_plain else None
    return None


def readers_of(
    model: nn.Module, axes: Sequence[Axis], kept: Kept
) -> tuple[list[Reader], dict[str, str]]:
    """Layers that lose inputs, and reasons why others that do cannot be mended."""
    stay, owners = kept_rows(shapes_of(model), axes, kept), _owners(model)
    readers, reasons = [], {}
    for name, dims in stay.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        dim = input_dim(module)
        if leaf != "weight" or dim is None or dim not in dims:
            continue
        weight = cast(Tensor, module.weight)
        if len(dims[dim]) == weight.shape[dim]:
            continue
        if len(owners[name]) > 1:
            reasons[path] = "its weight is shared with another layer"
            continue
        lost = set(range(weight.shape[dim])) - set(dims[dim])
        outputs = dims.get(1 - dim)
        left = None if outputs is None or len(outputs) == weight.shape[1 - dim] else tuple(outputs)
        readers.append(Reader(path, module, tuple(dims[dim]), tuple(sorted(lost)), left))
    return readers, reasons


def late_readers(gates: Sequence[Gate]) -> dict[str, int]:
    """Linear layers that alone enter their gate, all outputs as they are; with its number."""
    late = {}
    for number, gate in enumerate(gates):
        reader, scale = gate.readers[0], gate.scales[0]
        if len(gate.readers) > 1 or isinstance(reader, Feed) or isinstance(scale, Tensor):
            continue
        is_whole = scale == 1 and reader.outputs is None and not reader.alone
        if is_whole and isinstance(reader.module, nn.Linear):
            late[reader.path] = number
    return late


def others_of(model: nn.Module, readers: Sequence[Reader]) -> dict[nn.Module, str]:
    """Path of every linear layer that loses no input, and has its weight for itself."""
    reading, owners = {reader.module for reader in readers}, _owners(model)
    return {
        module: path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and input_dim(module) is not None
        and module not in reading
        and len(owners.get(f"{path}.weight", ())) == 1  # one cut before may have none
    }


def _owners(model: nn.Module) -> dict[str, set[str]]:
    """All names of each parameter, by each of them."""
    owners: dict[object, set[str]] = {}
    keys = Weights(model).keys_of()
    for name, key in keys.items():
        owners.setdefault(key, set()).add(name)
    return {name: owners[key] for name, key in keys.items()}


def columns_of(x: Tensor, columns: Sequence[int], reader: Reader) -> Tensor:
    """Some features of a reader's input."""
    index = torch.tensor(columns, dtype=torch.long, device=x.device)
    return x.index_select(1 if reader.is_conv else x.dim() - 1, index)


def weight_of(reader: Reader, columns: Sequence[int]) -> Tensor:
    """Weight of some inputs of a reader, in its own layout."""
    weight = value_of(reader.module)
    index = torch.tensor(columns, dtype=torch.long, device=weight.device)
    return weight.index_select(reader.input_dim, index)


def applied(reader: Reader, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output of a reader with other weights, on inputs of as many features as these read."""
    module = reader.module
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        run: Any = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
        found: Tensor = run(x, weight, bias, module.stride, module.padding, module.dilation)
        return found
    if reader.input_dim == 0:
        weight = weight.t()
    return functional.linear(x, weight, bias)
