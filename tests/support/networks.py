"""Small free-form networks whose channels can be cut, with their inputs: one for each pattern.

All parameters and running statistics are random, so that a row that is cut wrongly shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

BATCH = 2


class Residual(nn.Module):
    """Two blocks around one stream: the stem and both last convolutions make the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))
        self.second = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


class Concatenation(nn.Module):
    """Two branches side by side, one more through a norm and a depthwise convolution over both."""

    def __init__(self, dims: int = 2, *, norm: bool = True) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.left, self.right = conv(3, 4, 1), conv(3, 6, 3, padding=1)
        self.norm = batch_norm(10) if norm else nn.Identity()
        self.depthwise = conv(10, 10, 3, padding=1, groups=10)
        self.head = conv(10, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.left(x), self.right(x)], dim=1)
        return self.head(torch.relu(self.depthwise(self.norm(joined))))


class TokenConcatenation(nn.Module):
    """Features of two Linears side by side in the last dimension, and tokens one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.more = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(5, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.left(x), self.right(x)], dim=-1)
        tokens = torch.cat([joined, self.more(x)], dim=1)
        return self.head(torch.relu(tokens))


class Gate(nn.Module):
    """Squeeze-and-excite with convolutions or Linears."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        reduce, expand = (
            (nn.Linear(8, 4), nn.Linear(4, 8))
            if linear
            else (
                nn.Conv2d(8, 4, 1),
                nn.Conv2d(4, 8, 1),
            )
        )
        self.linear = linear
        self.gate = nn.Sequential(reduce, nn.ReLU(), expand, nn.Sigmoid())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        pooled = functional.adaptive_avg_pool2d(x, 1)
        if self.linear:
            return self.head(x * self.gate(pooled.flatten(1))[:, :, None, None])
        return self.head(x * self.gate(pooled))


class Scaled(nn.Module):
    """Parameters of one value per channel, in the first and in the last dimension (ConvNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.layer_scale = nn.Parameter(torch.ones(8))
        self.inner_scale = nn.Parameter(torch.ones(1, 1, 1, 12))
        self.positions = nn.Parameter(torch.ones(1, 8, 4, 4))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) * self.positions
        y = self.up(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(y) * self.inner_scale) * self.layer_scale
        return self.head(x + y.permute(0, 3, 1, 2))


class Shared(nn.Module):
    """One convolution and its norm called twice, and a Linear whose weight another one shares."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        x = x.mean((2, 3))
        return self.head(torch.tanh(self.first(x)) * self.second(x))


class Glu(nn.Module):
    """The first half of the channels is multiplied with the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.conv(x).chunk(2, dim=1)
        return self.head(left * torch.sigmoid(right))


class Shuffled(nn.Module):
    """Groups whose channels are shuffled, in an order that an offset and a stride can say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.relu(self.conv(x)))
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        skip = torch.relu(self.down(x))
        x = self.up(torch.relu(self.middle(skip)))
        return {"masks": self.head(torch.cat([skip, x], 1)), "loss": None}


@dataclass(frozen=True)
class Network:
    """How a network is made, the shape of its input without the batch, and what it has.

    Attributes:
        make: Makes it.
        shape: Shape of the one input, without the batch.
        axes: Units per axis, by the path of the first producer, in running order.
        across: Whether cut channels differ from channels of zeros (a norm's statistics span
            channels).
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axes: dict[str, int]
    across: bool = False


def _norms(*layers: nn.Module, dims: int = 2) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(3, 8, 3), *layers, nn.ReLU(), conv(8, 2, 1))


IMAGE, LINE, CUBE = (3, 6, 6), (3, 8), (3, 4, 4, 4)
NETWORKS: dict[str, Network] = {
    "linears": Network(
        lambda: nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1)),
        (1,),
        {"0": 8, "1": 8},
    ),
    "reference": Network(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 1)
        ),
        (1, 4, 4),
        {"0": 8, "3": 8},
    ),
    "convs": Network(
        lambda: nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)),
        (1, 4, 4),
        {"0": 8, "1": 8},
    ),
    "conv1d": Network(
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 6, 1),
            nn.Flatten(),
            nn.Linear(18, 5),
            nn.BatchNorm1d(5),
            nn.Linear(5, 2),
        ),
        LINE,
        {"0": 8, "4": 6, "6": 5},
    ),
    "conv2d": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 6, 1, bias=False),
            nn.Flatten(),
            nn.Linear(24, 5),
            nn.PReLU(),
            nn.Linear(5, 2),
        ),
        IMAGE,
        {"0": 8, "4": 6, "6": 5},
    ),
    "conv3d": Network(
        lambda: nn.Sequential(
            nn.Conv3d(3, 8, 3),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 6, 1),
            nn.AdaptiveAvgPool3d(2),
            nn.Flatten(),
            nn.Linear(48, 5),
            nn.Linear(5, 2),
        ),
        CUBE,
        {"0": 8, "3": 6, "6": 5},
    ),
    "transpose1d": Network(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 6, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 2, 1),
        ),
        LINE,
        {"0": 4, "2": 3},
    ),
    "transpose2d": Network(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 8, 2, stride=2),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 16, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(16, 2, 1),
        ),
        (3, 3, 3),
        {"0": 8},
    ),
    "transpose3d": Network(
        lambda: nn.Sequential(
            nn.ConvTranspose3d(3, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 2, 1)
        ),
        (3, 2, 2, 2),
        {"0": 6},
    ),
    "grouped": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        ),
        IMAGE,
        {"0": 4, "2": 6},
    ),
    "depthwise": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        {"0": 8},
    ),
    "multiplier": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(192, 2),
        ),
        IMAGE,
        {"0": 6},
    ),
    "depthwise of the input": Network(
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 2, 1)),
        IMAGE,
        {"0": 4},
    ),
    "transformers conv1d": Network(
        lambda: nn.Sequential(Conv1D(8, 5), nn.GELU(), Conv1D(6, 8), nn.ReLU(), nn.Linear(6, 2)),
        (4, 5),
        {"0": 8, "2": 6},
    ),
    "residual": Network(Residual, IMAGE, {"stem.0": 8, "first.0": 6, "second.0": 4}),
    "concatenation": Network(Concatenation, IMAGE, {"left": 4, "right": 6}),
    "concatenation 1d": Network(lambda: Concatenation(1), LINE, {"left": 4, "right": 6}),
    "concatenation 3d": Network(lambda: Concatenation(3), CUBE, {"left": 4, "right": 6}),
    "token concatenation": Network(TokenConcatenation, (3, 5), {"left": 4, "right": 6}),
    "gate of convs": Network(lambda: Gate(linear=False), IMAGE, {"conv": 8, "gate.0": 4}),
    "gate of linears": Network(lambda: Gate(linear=True), IMAGE, {"conv": 8, "gate.0": 4}),
    "scaled": Network(Scaled, (3, 4, 4), {"conv": 8, "up": 12}),
    "shared": Network(Shared, IMAGE, {"stem": 6, "first": 4}),
    "glu": Network(Glu, LINE, {"conv": 4}),
    "shuffled": Network(Shuffled, IMAGE, {"conv": 4, "grouped": 4}),
    "pixel shuffle": Network(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)),
        IMAGE,
        {"0": 4},
    ),
    "unet": Network(UNet, (3, 4, 4), {"down": 6, "middle": 8, "up": 4}),
    "upsampled": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ZeroPad2d(1),
            nn.Dropout(),
            nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        {"0": 8},
    ),
    "batch norm without affine": Network(
        lambda: _norms(nn.BatchNorm2d(8, affine=False)), IMAGE, {"0": 8}
    ),
    "batch norm without statistics": Network(
        lambda: _norms(nn.BatchNorm2d(8, affine=False, track_running_stats=False)), IMAGE, {"0": 8}
    ),
    "sync batch norm": Network(lambda: _norms(nn.SyncBatchNorm(8)), IMAGE, {"0": 8}),
    "instance norm 1d": Network(lambda: _norms(nn.InstanceNorm1d(8), dims=1), LINE, {"0": 8}),
    "instance norm 2d": Network(lambda: _norms(nn.InstanceNorm2d(8, affine=True)), IMAGE, {"0": 8}),
    "instance norm 3d": Network(
        lambda: _norms(nn.InstanceNorm3d(8, affine=True, track_running_stats=True), dims=3),
        CUBE,
        {"0": 8},
    ),
    "group norm": Network(lambda: _norms(nn.GroupNorm(2, 8)), IMAGE, {"0": 4}, across=True),
    "group norm of one group": Network(
        lambda: _norms(nn.GroupNorm(1, 8, affine=False)), IMAGE, {"0": 8}, across=True
    ),
    "group norm per channel": Network(lambda: _norms(nn.GroupNorm(8, 8)), IMAGE, {"0": 8}),
    "layer norm": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 8),
            nn.LayerNorm(8),
            nn.GELU(),
            nn.Linear(8, 6),
            nn.LayerNorm(6, elementwise_affine=False),
            nn.Linear(6, 2),
        ),
        (4, 5),
        {"0": 8, "3": 6},
        across=True,
    ),
    "layer norm of an image": Network(
        lambda: _norms(nn.LayerNorm([8, 4, 4])), IMAGE, {"0": 8}, across=True
    ),
    "sigmoid": Network(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 2)), (5,), {"0": 8}
    ),
    "layer norm of a line": Network(lambda: _norms(nn.LayerNorm(6), dims=1), LINE, {"0": 8}),
}


def build(
    name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Make a network in eval mode, and the arguments of ``model(*args)``."""
    network = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    model = network.make().to(dtype).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(noise + 0.5 if tensor.ndim == 1 else noise - 0.5)
    return model, (torch.randn(BATCH, *network.shape, generator=generator, dtype=dtype),)
