"""Costs of convolutional nets: closed form ≡ numel ≡ FlopCounterMode of the net built smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_gradnas.costs.counting import count_costs
from hf_gradnas.costs.flops import count_flops
from hf_gradnas.errors import DataError
from hf_gradnas.structure.trace import Matmul, trace_forward
from hf_gradnas.types import Axis, CostModel, Kind, Product, Slice, Structure, Tap

SIDE = 6
IMAGE = (1, 3, SIDE, SIDE)
BN = ("weight", "bias", "running_mean", "running_var")


def axis(name: str, size: int, *slices: Slice, width: int = 1) -> Axis:
    taps = (Tap(name, "output", 1, width, 0, width),)
    return Axis(f"{name}:channels", name, Kind.CHANNELS, size, slices, taps, minimum=1)


def rows(*tensors: str, dim: int = 0, width: int = 1, offset: int = 0) -> tuple[Slice, ...]:
    """Slices of consecutive units, one per tensor."""
    return tuple(Slice(tensor, dim, width, offset, width) for tensor in tensors)


def produced(conv: str, norm: str = "", *, dim: int = 0, width: int = 1) -> tuple[Slice, ...]:
    weight, bias = rows(f"{conv}.weight", dim=dim, width=width), rows(f"{conv}.bias", width=width)
    return (*weight, *bias, *(rows(*(f"{norm}.{name}" for name in BN)) if norm else ()))


def positions(tensor: str, dim: int, channels: int, groups: int) -> tuple[Slice, ...]:
    """One slice per group: a unit is one position in every group."""
    each = channels // groups
    return tuple(Slice(tensor, dim, 1, group * each, 1) for group in range(groups))


class Case:
    """A net that can be built at any width, and its axes at full width."""

    def __init__(self, build: Callable[..., nn.Module], full: Mapping[str, int], *axes: Axis):
        self.build, self.full, self.axes = build, full, axes
        assert [a.size for a in axes] == list(full.values())

    def costs(self) -> dict[str, CostModel]:
        model, args = self.build(**self.full).eval(), (torch.zeros(IMAGE),)
        return count_costs(model, Structure(self.axes), {}, layout="per_layer", args=args)

    def kept(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {a.name: widths[key] for a, key in zip(self.axes, self.full, strict=True)}


def two_convs(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=2),
        nn.BatchNorm2d(b),
        nn.Conv2d(b, 2, 1),
    )


def separable(a: int, b: int) -> nn.Module:
    """A depthwise convolution with multiplier 2 between two pointwise ones."""
    return nn.Sequential(
        nn.Conv2d(3, a, 1),
        nn.Conv2d(a, 2 * a, 3, groups=a),
        nn.Conv2d(2 * a, b, 1),
        nn.Conv2d(b, 2, 1),
    )


class Residual(nn.Module):
    """The stream `a` is written by two convolutions; `b` stands inside the branch."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.up, self.down = nn.Conv2d(a, b, 1), nn.Conv2d(b, a, 3, padding=1)
        self.mix = nn.Conv2d(a, a, 1)
        self.head = nn.Linear(a, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.mix(x)
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 3, padding=1)
        self.both = nn.Conv2d(a + b + 3, c, 3)
        self.head = nn.Conv2d(c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(torch.cat((self.left(x), x, self.right(x)), 1)))


def grouped(a: int, b: int) -> nn.Module:
    """`a` and `b` are positions in each of two groups."""
    return nn.Sequential(
        nn.Conv2d(3, 2 * a, 1), nn.Conv2d(2 * a, 2 * b, 3, groups=2), nn.Conv2d(2 * b, 2, 1)
    )


def flattened(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, a, 3), nn.Flatten(), nn.Linear(a * (SIDE - 2) ** 2, b), nn.Linear(b, 2)
    )


def transposed(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, a, 3, stride=2),
        nn.ConvTranspose2d(a, b, 4, stride=2, padding=1),
        nn.ConvTranspose2d(b, 4, 3),
    )


CASES = {
    "two_convs": Case(
        two_convs,
        {"a": 8, "b": 6},
        axis("0", 8, *produced("0", "1"), *rows("3.weight", dim=1)),
        axis("3", 6, *produced("3", "4"), *rows("5.weight", dim=1)),
    ),
    "separable": Case(
        separable,
        {"a": 6, "b": 5},
        axis("0", 6, *produced("0"), *produced("1", width=2), *rows("2.weight", dim=1, width=2)),
        axis("2", 5, *produced("2"), *rows("3.weight", dim=1)),
    ),
    "residual": Case(
        Residual,
        {"a": 8, "b": 6},
        axis(
            "stem",
            8,
            *(s for conv in ("stem", "down", "mix") for s in produced(conv)),
            *rows("up.weight", "mix.weight", "head.weight", dim=1),
        ),
        axis("up", 6, *produced("up"), *rows("down.weight", dim=1)),
    ),
    "concat": Case(
        Concat,
        {"a": 4, "b": 6, "c": 5},
        axis("left", 4, *produced("left"), *rows("both.weight", dim=1)),
        axis("right", 6, *produced("right"), *rows("both.weight", dim=1, offset=7)),
        axis("both", 5, *produced("both"), *rows("head.weight", dim=1)),
    ),
    "grouped": Case(
        grouped,
        {"a": 4, "b": 3},
        axis(
            "0",
            4,
            *positions("0.weight", 0, 8, 2),
            *positions("0.bias", 0, 8, 2),
            *rows("1.weight", dim=1),
        ),
        axis(
            "1",
            3,
            *positions("1.weight", 0, 6, 2),
            *positions("1.bias", 0, 6, 2),
            *positions("2.weight", 1, 6, 2),
        ),
    ),
    "flattened": Case(
        flattened,
        {"a": 5, "b": 7},
        axis("0", 5, *produced("0"), *rows("2.weight", dim=1, width=(SIDE - 2) ** 2)),
        axis("2", 7, *produced("2"), *rows("3.weight", dim=1)),
    ),
    "transposed": Case(
        transposed,
        {"a": 6, "b": 4},
        axis("0", 6, *produced("0"), *rows("1.weight", dim=0)),
        axis("1", 4, *produced("1", dim=1), *rows("2.weight", dim=0)),
    ),
}


def widths_of(full: Mapping[str, int]) -> list[dict[str, int]]:
    """The whole, half of everything, one unit each, and each axis alone."""
    alone = [{**full, name: size - 1} for name, size in full.items()]
    return [
        dict(full),
        {name: size // 2 for name, size in full.items()},
        dict.fromkeys(full, 1),
        *alone,
    ]


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_closed_form_is_that_of_the_net_built_smaller(name: str) -> None:
    case = CASES[name]
    costs = case.costs()
    for widths in widths_of(case.full):
        smaller = case.build(**widths).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            smaller(torch.zeros(IMAGE))
        kept = case.kept(widths)
        assert costs["params"].of(kept) == sum(p.numel() for p in smaller.parameters())
        assert costs["flops"].of(kept) == counter.get_total_flops()


def test_only_tensors_of_two_axes_or_dimensions_are_products() -> None:
    residual = CASES["residual"].costs()["params"]
    stem, up = "stem:channels", "up:channels"
    whole = (1.0, ()), (1.0, ())
    taps = (3.0, ()), (3.0, ())
    assert residual.products == (
        Product(1.0, ((0.0, ((stem, 1.0),)), (0.0, ((up, 1.0),)), *taps)),
        Product(1.0, ((0.0, ((stem, 1.0),)), (0.0, ((stem, 1.0),)), *whole)),
        Product(1.0, ((0.0, ((up, 1.0),)), (0.0, ((stem, 1.0),)), *whole)),
    )
    # The stem's weight, three biases, the head's column; the branch's bias alone.
    assert residual.per_unit == {stem: 3 * 9 + 3 + 5, up: 1}


def test_a_concatenation_has_constant_rows_beside_those_of_its_axes() -> None:
    product = CASES["concat"].costs()["flops"].products[0]
    positions_out = (SIDE - 2) ** 2
    assert product.factor == 2 * positions_out
    assert product.dims[1] == (3.0, (("left:channels", 1.0), ("right:channels", 1.0)))


CONVS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2), (2, 4, 7)),
    "conv1d_grouped": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "conv2d_same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 5)),
    "conv2d_depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 5)),
    "conv2d_dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 7, 5)),
    "conv3d": (nn.Conv3d(4, 6, 2, stride=(1, 2, 2)), (2, 4, 3, 5, 6)),
    "conv3d_grouped": (nn.Conv3d(4, 6, 2, groups=2), (2, 4, 3, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7, 5)),
    "transposed2d_grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 7, 5)),
    "transposed2d_depthwise": (nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 7, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONVS))
def test_multiplications_of_every_convolution(name: str) -> None:
    """Ours, torch's counter, and the definition: every weight at every position of its side."""
    conv, shape = CONVS[name]
    flops, trace = count_flops(conv, {}, args=(torch.zeros(shape),))
    (event,) = (e for e in trace.events if isinstance(e, Matmul))
    side = event.x_shape if name.startswith("transposed") else event.out_shape
    count = side[0] * torch.Size(side[2:]).numel()
    assert event.parameter == "weight"
    assert flops == 2 * event.macs == 2 * count * conv.weight.numel()


class Functional(nn.Module):
    """One weight in two calls of ``F.conv2d``, under two names, with a computed bias."""

    def __init__(self, a: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, a, 1), nn.Conv2d(3, a, 1)
        self.second.weight = self.first.weight
        self.head = nn.Conv2d(a, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = F.conv2d(x, self.first.weight, bias=2 * self.first.bias)
        return self.head(left + F.conv2d(x, weight=self.second.weight, bias=self.second.bias))


def test_a_shared_weight_counts_once_and_runs_twice() -> None:
    slices = (*produced("first"), *produced("second"), *rows("head.weight", dim=1))
    case = Case(Functional, {"a": 5}, axis("first", 5, *slices))
    costs = case.costs()
    assert costs["params"].per_unit == {"first:channels": 3 + 2 + 2}
    assert costs["flops"].per_unit == {"first:channels": 2 * SIDE**2 * (2 * 3 + 2)}
    for widths in widths_of(case.full):
        smaller = case.build(**widths)
        flops, _ = count_flops(smaller, {"x": torch.zeros(IMAGE)})
        assert costs["params"].of(case.kept(widths)) == sum(p.numel() for p in smaller.parameters())
        assert costs["flops"].of(case.kept(widths)) == flops


def test_a_wrong_positional_input_is_named() -> None:
    with pytest.raises(DataError, match=r"Conv2d cannot run a batch of \{'args\[0\]': \(1, 4, 2\)"):
        trace_forward(nn.Conv2d(3, 4, 1), {}, args=(torch.zeros(1, 4, 2),))
