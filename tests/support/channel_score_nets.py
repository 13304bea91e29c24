"""Small networks with channels axes, hand-written: what scores of channels are tested on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_gradnas.types import Axis, Kind, Slice, Tap

EXAMPLES = 8
CLASSES = 3


def axis_of(size: int, *taps: Tap, slices: tuple[Slice, ...] = ()) -> Axis:
    first = taps[0]
    name = f"{first.module}:channels"
    return Axis(name, first.module, Kind.CHANNELS, size, slices, taps)


def tap_of(module: str, dim: int = 1, width: int = 1, offset: int = 0, stride: int = 0) -> Tap:
    return Tap(module, "output", dim, width, offset, stride or width)


# -- networks -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by name, run by a subclass's `body`, under a linear head; returns a loss."""

    def __init__(self, features: int, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.head = nn.Linear(features, CLASSES)

    def body(self, x: Tensor, **layers: nn.Module) -> Tensor:
        for layer in layers.values():
            x = layer(x)
        return x

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x, **self.layers)
        return {"loss": functional.cross_entropy(self.head(hidden.flatten(1)), labels)}


class _Residual(Net):
    """A stream with two producers, the second added in place and read again later."""

    def body(self, x, stem, norm, inner, outer) -> Tensor:
        stream = stem(x)
        stream = norm(outer(torch.tanh(inner(stream)))).add_(stream)
        return stream.mean((2, 3)) + torch.tanh(stream).amax((2, 3))


class _Concat(Net):
    """Two producers side by side, and one whose output is split between two paths."""

    def body(self, x, left, right, both, join) -> Tensor:
        first, second = both(x).split((2, 4), 1)
        gated = torch.cat((left(x), right(x) * second, first), 1)
        return torch.tanh(join(gated)).mean((2, 3))


class _Twice(Net):
    """One layer that runs twice, and is checkpointed if asked to."""

    checkpointed = False

    def body(self, x, first, shared) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            return torch.tanh(functional.relu_(shared(hidden)))

        hidden = first(x)
        for _ in range(2):
            hidden = (
                checkpoint(run, hidden, use_reentrant=False) if self.checkpointed else run(hidden)
            )
        return hidden.mean((2, 3))


def _sequence(features: int, **layers: nn.Module) -> Net:
    return Net(features, **layers, flatten=nn.Flatten())


def _plain() -> tuple[Net, list[Axis]]:
    model = _sequence(
        10,
        one=nn.Conv2d(2, 4, 3),
        norm=nn.BatchNorm2d(4),
        act=nn.ReLU(inplace=True),
        two=nn.Conv2d(4, 6, 3, stride=2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(6, 10),
        last=nn.ReLU(inplace=True),
    )
    taps = [
        (4, tap_of("layers.one")),
        (3, tap_of("layers.two", width=2)),
        (10, tap_of("layers.fc", -1)),
    ]
    return model, [axis_of(size, tap) for size, tap in taps]


def _overwritten() -> tuple[Net, list[Axis]]:
    """In-place activations right after the layers: of a leaf, and of a view (3-D Linear) too."""
    model = _sequence(
        12,
        one=nn.Conv1d(2, 4, 3),
        act=nn.ReLU(inplace=True),
        two=nn.Conv1d(4, 3, 2, bias=False),
        act_two=nn.Hardswish(inplace=True),
        fc=nn.Linear(7, 4),
        act_three=nn.SiLU(inplace=True),
    )
    return model, [
        axis_of(4, tap_of("layers.one")),
        axis_of(3, tap_of("layers.two")),
        axis_of(4, tap_of("layers.fc", -1)),
    ]


def _residual() -> tuple[Net, list[Axis]]:
    model = _Residual(
        4,
        stem=nn.Conv2d(2, 4, 3),
        norm=nn.BatchNorm2d(4),
        inner=nn.Conv2d(4, 5, 3, padding=1),
        outer=nn.Conv2d(5, 4, 3, padding=1),
    )
    stream = axis_of(4, tap_of("layers.stem"), tap_of("layers.outer"))
    return model, [stream, axis_of(5, tap_of("layers.inner"))]


def _concat() -> tuple[Net, list[Axis]]:
    model = _Concat(
        5,
        left=nn.Conv2d(2, 3, 3),
        right=nn.Conv2d(2, 4, 3),
        both=nn.Conv2d(2, 6, 3),
        join=nn.Conv2d(9, 5, 1),
    )
    first = axis_of(2, tap_of("layers.both"))
    gate = axis_of(4, tap_of("layers.right"), tap_of("layers.both", offset=2))
    return model, [
        first,
        gate,
        axis_of(3, tap_of("layers.left")),
        axis_of(5, tap_of("layers.join")),
    ]


def _depthwise() -> tuple[Net, list[Axis]]:
    model = _sequence(
        5,
        one=nn.Conv2d(2, 4, 3),
        act=nn.ReLU(inplace=True),
        deep=nn.Conv2d(4, 8, 3, groups=4),
        norm=nn.BatchNorm2d(8),
        point=nn.Conv2d(8, 5, 1),
        pool=nn.AdaptiveMaxPool2d(1),
    )
    return model, [
        axis_of(4, tap_of("layers.one"), tap_of("layers.deep", width=2)),
        axis_of(5, tap_of("layers.point")),
    ]


def _grouped() -> tuple[Net, list[Axis]]:
    """Units of a grouped convolution are positions in every group: several taps at each layer."""
    model = _sequence(
        4,
        one=nn.Conv2d(2, 6, 3),
        norm=nn.GroupNorm(2, 6),
        two=nn.Conv2d(6, 12, 3, groups=2),
        act=nn.Tanh(),
        three=nn.Conv2d(12, 4, 1),
        pool=nn.AdaptiveAvgPool2d(1),
    )
    one = [tap_of("layers.one", offset=3 * group) for group in range(2)]
    two = [tap_of("layers.two", width=2, offset=6 * group) for group in range(2)]
    strided = [
        tap_of("layers.three", offset=0, stride=2),
        tap_of("layers.three", offset=1, stride=2),
    ]
    return model, [axis_of(3, *one), axis_of(3, *two), axis_of(2, *strided)]


def _transposed(number: int) -> tuple[Net, list[Axis]]:
    """Convolutions and transposed ones of 1, 2 or 3 dimensions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[number - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[number - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[number - 1]
    model = _sequence(
        4, one=conv(2, 3, 2), act=nn.Tanh(), two=back(3, 4, 2), last=nn.Tanh(), pool=pool(1)
    )
    return model, [axis_of(3, tap_of("layers.one")), axis_of(4, tap_of("layers.two"))]


def _linear() -> tuple[Net, list[Axis]]:
    model = _sequence(
        12,
        one=nn.Linear(5, 6),
        norm=nn.LayerNorm(6),
        act=nn.ReLU(inplace=True),
        two=nn.Linear(6, 4),
    )
    return model, [axis_of(6, tap_of("layers.one", -1)), axis_of(4, tap_of("layers.two", 2))]


def _twice(*, checkpointed: bool) -> tuple[Net, list[Axis]]:
    model = _Twice(3, first=nn.Conv2d(2, 3, 3), shared=nn.Conv2d(3, 3, 3, padding=1))
    model.checkpointed = checkpointed
    return model, [axis_of(3, tap_of("layers.shared")), axis_of(3, tap_of("layers.first"))]


CASES: dict[str, Any] = {
    "plain": (_plain, (2, 9, 9)),
    "overwritten": (_overwritten, (2, 10)),
    "residual": (_residual, (2, 6, 6)),
    "concat": (_concat, (2, 6, 6)),
    "depthwise": (_depthwise, (2, 7, 7)),
    "grouped": (_grouped, (2, 7, 7)),
    "1d": (partial(_transposed, 1), (2, 6)),
    "2d": (partial(_transposed, 2), (2, 4, 4)),
    "3d": (partial(_transposed, 3), (2, 3, 4, 3)),
    "linear": (_linear, (3, 5)),
    "twice": (partial(_twice, checkpointed=False), (2, 6, 6)),
    "checkpointed": (partial(_twice, checkpointed=True), (2, 6, 6)),
}


def build(case: str) -> tuple[Net, list[Axis], dict[str, Tensor]]:
    """A float64 network in eval mode, its axes and a batch."""
    make, shape = CASES[case]
    model, axes = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
    x = torch.randn(EXAMPLES, *shape, dtype=torch.float64)
    return model.double().eval(), axes, {"x": x, "labels": torch.randint(CLASSES, (EXAMPLES,))}


def in_batches(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch in batches of that many examples."""
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start in range(0, EXAMPLES, size)
    ]
