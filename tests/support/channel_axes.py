"""Small networks with convolutions, each with the axes of its channels written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_gradnas.types import Attribute, Axis, Kind, Slice, Tap


@dataclass(frozen=True)
class Case:
    """A float64 network in eval mode, its arguments, and its axes."""

    model: nn.Module
    args: tuple[Tensor, ...]
    axes: tuple[Axis, ...]

    def kept(self) -> dict[str, list[int]]:
        """An irregular choice of units for every axis."""
        return {
            axis.name: sorted({(3 * i + 1) % axis.size for i in range((axis.size + 1) // 2)})
            for axis in self.axes
        }

    @torch.no_grad()
    def run(self, model: nn.Module | None = None) -> Tensor:
        return (model or self.model)(*self.args)


class GlobalResponseNorm(nn.Module):
    """Divides by the mean over channels, which stand last; as ConvNeXt V2 does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.shift = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor, floor: float = 0.0) -> Tensor:
        norms = x.norm(dim=(1, 2), keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + floor)
        return self.gain * (x * relative) + self.shift + x


class Branches(nn.Module):
    """Two convolutions and what becomes of their sum or concatenation."""

    def __init__(self, join: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.join = join
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def rows(tensor: str, dim: int = 0, width: int = 1, offset: int = 0, stride: int = 0) -> Slice:
    return Slice(tensor, dim, width, offset, stride or width)


def made_by(path: str, **place: int) -> list[Slice]:
    return [rows(f"{path}.weight", 0, **place), rows(f"{path}.bias", 0, **place)]


def statistics(path: str, **place: int) -> list[Slice]:
    return [rows(f"{path}.running_{name}", 0, **place) for name in ("mean", "var")]


def tap(path: str, dim: int = 1, width: int = 1, offset: int = 0, stride: int = 0) -> Tap:
    return Tap(path, "output", dim, width, offset, stride or width)


def channels(
    size: int,
    slices: list[Slice],
    taps: list[Tap],
    norms: list[Tap] | None = None,
    sizes: list[tuple[str, str]] | None = None,
    value: int | None = None,
) -> Axis:
    path = taps[0].module
    name = f"{path}:channels"
    return Axis(
        name,
        path,
        Kind.CHANNELS,
        size,
        tuple(slices),
        tuple(taps),
        tuple(Attribute(module, what, name, value=value) for module, what in sizes or []),
        minimum=1,
        norms=tuple(norms or []),
    )


def plain(dims: int = 2) -> Case:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    model = nn.Sequential(conv(2, 8, 3), norm(8), nn.ReLU(), conv(8, 3, 2))
    slices = [*made_by("0"), *made_by("1"), *statistics("1"), rows("3.weight", 1)]
    axis = channels(8, slices, [tap("0")], [tap("1")])
    return _case(model, (2, *[5] * dims), axis)


def depthwise() -> Case:
    """A depthwise convolution, and one with two outputs per channel."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.InstanceNorm2d(6),
        nn.Conv2d(6, 12, 2, groups=6),
        nn.GroupNorm(12, 12),
        nn.Conv2d(12, 3, 1),
    )
    slices = [*made_by("0"), *made_by("1"), *statistics("1"), *made_by("3")]
    slices += [*made_by("5", width=2), *made_by("6", width=2), rows("7.weight", 1, 2)]
    attributes = [("3", "groups"), ("4", "num_features"), ("5", "groups")]
    taps = [tap("0"), tap("3"), tap("5", width=2)]
    axis = channels(6, slices, taps, [tap("1"), tap("4"), tap("6", width=2)], attributes)
    groups = Attribute("6", "num_groups", axis.name, factor=2)
    axis = replace(axis, attributes=(*axis.attributes, groups))
    return _case(model, (2, 7, 7), axis)


def grouped() -> Case:
    """A unit is one position in each of four groups."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 12, 2, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )
    places = [{"offset": 2 * group, "stride": 1} for group in range(4)]
    slices = [s for place in places for path in "01" for s in made_by(path, **place)]
    slices.append(rows("2.weight", 1))
    inner = channels(
        2, slices, [tap("0", **place) for place in places], [tap("1", **place) for place in places]
    )
    places = [{"offset": 3 * group, "stride": 1} for group in range(4)]
    slices = [s for place in places for s in made_by("2", **place)]
    slices += [rows("4.weight", 1, **place) for place in places]
    outer = channels(3, slices, [tap("2", **place) for place in places])
    return _case(model, (2, 6, 6), inner, outer)


def two_blocks() -> Case:
    """Two axes one behind the other."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 1)
    )
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(
                torch.randn_like(tensor).abs() if tensor.ndim == 1 else torch.randn_like(tensor)
            )
    norm = [s for name in ("weight", "bias", "running_mean", "running_var") for s in [f"1.{name}"]]
    first = [*made_by("0"), *map(rows, norm), rows("3.weight", 1)]
    second = [*made_by("3"), rows("4.weight", 1)]
    axes = (
        channels(6, first, [tap("0")], [tap("1")]),
        channels(8, second, [tap("3")]),
    )
    return Case(model.double().eval(), (torch.randn(2, 2, 5, 5, dtype=torch.float64),), axes)


def residual() -> Case:
    def join(net: Branches, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.out(torch.relu(x + net.norm(net.side(torch.relu(x)))))

    model = Branches(
        join,
        stem=nn.Conv2d(2, 6, 3),
        side=nn.Conv2d(6, 6, 1),
        norm=nn.BatchNorm2d(6, affine=False),
        out=nn.Conv2d(6, 3, 1),
    )
    slices = [*made_by("stem"), *made_by("side"), rows("side.weight", 1), *statistics("norm")]
    slices.append(rows("out.weight", 1))
    taps = [tap("stem"), tap("side")]
    axis = channels(6, slices, taps, [tap("norm")], [("norm", "num_features")])
    return _case(model, (2, 5, 5), axis)


def concatenation() -> Case:
    """Statistics of one norm span the channels of two axes and two channels of neither."""

    def join(net: Branches, x: Tensor) -> Tensor:
        both = torch.cat([net.left(x), x[..., 1:-1, 1:-1], net.right(x)], 1)
        return net.out(torch.tanh(net.plain(net.norm(both))))

    model = Branches(
        join,
        left=nn.Conv2d(2, 6, 3),
        right=nn.Conv2d(2, 4, 3),
        norm=nn.GroupNorm(1, 12),
        plain=nn.InstanceNorm2d(12),
        out=nn.Conv2d(12, 3, 1),
    )
    axes = []
    for path, size, offset in (("left", 6, 0), ("right", 4, 8)):
        place = {"offset": offset, "stride": 1}
        slices = [*made_by(path), *made_by("norm", **place), rows("out.weight", 1, **place)]
        norms = [tap("norm", **place), tap("plain", **place)]
        axes.append(channels(size, slices, [tap(path)], norms, [("plain", "num_features")], 12))
    return _case(model, (2, 6, 6), *axes)


def flattened() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    )
    axis = channels(6, [*made_by("0"), rows("4.weight", 1, 4)], [tap("0")])
    return _case(model, (2, 6, 6), axis)


def channels_last() -> Case:
    """Norms over channels that stand last, with and without parameters."""

    def join(net: Branches, x: Tensor) -> Tensor:
        x = net.norm(net.stem(x).permute(0, 2, 3, 1))
        x = net.response(net.bare(torch.nn.functional.gelu(net.wide(x))), floor=0.1)
        return net.out(x)

    model = Branches(
        join,
        stem=nn.Conv2d(2, 8, 3),
        norm=nn.LayerNorm(8),
        wide=nn.Linear(8, 10),
        bare=nn.LayerNorm(10, elementwise_affine=False),
        response=GlobalResponseNorm(10),
        out=nn.Linear(10, 3),
    )
    slices = [*made_by("stem"), *made_by("norm"), rows("wide.weight", 1)]
    first = channels(8, slices, [tap("stem")], [tap("norm", -1)])
    slices = [*made_by("wide"), rows("response.gain", 3), rows("response.shift", 3)]
    slices.append(rows("out.weight", 1))
    norms = [tap("bare", -1), tap("response", -1)]
    second = channels(10, slices, [tap("wide", -1)], norms, [("bare", "normalized_shape")])
    return _case(model, (2, 5, 5), first, second)


def transposed(dims: int = 2) -> Case:
    """Transposed convolutions: (in, out / groups, ...)."""
    conv = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    model = nn.Sequential(
        conv(2, 6, 2), nn.PReLU(6), conv(6, 12, 2, groups=6), nn.Tanh(), conv(12, 3, 1)
    )
    slices = [rows("0.weight", 1), rows("0.bias"), rows("1.weight"), rows("2.weight", 0)]
    slices += [rows("2.bias", 0, 2), rows("4.weight", 0, 2)]
    axis = channels(6, slices, [tap("0"), tap("2", width=2)], None, [("2", "groups")])
    return _case(model, (2, *[3] * dims), axis)


CASES: dict[str, Callable[[], Case]] = {
    "plain 1d": lambda: plain(1),
    "plain 2d": lambda: plain(2),
    "plain 3d": lambda: plain(3),
    "depthwise": depthwise,
    "grouped": grouped,
    "residual": residual,
    "concatenation": concatenation,
    "flattened": flattened,
    "channels last": channels_last,
    "transposed 1d": lambda: transposed(1),
    "transposed 2d": lambda: transposed(2),
    "transposed 3d": lambda: transposed(3),
}


def _case(model: nn.Module, shape: tuple[int, ...], *axes: Axis) -> Case:
    """Everything drawn at random, so that no norm and no bias is without effect."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.3 if tensor.ndim == 1 else noise - 0.5)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return Case(model, (x,), axes)
