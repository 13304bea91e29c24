"""What a solution adds to weights, in their own type."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_gradnas.repair.changes import change_of, new_values
from hf_gradnas.repair.readers import Feed, Reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_weights_are_sums_that_are_rounded_once(dtype: torch.dtype) -> None:
    """Also where a weight all but vanishes, so that the difference is no number of the type."""
    layer = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 5.0, 3.0], [-2.0, 6.0, 0.5]]))
        layer.bias.fill_(1.0)
    solution = torch.tensor([[-0.9991, 2.0013], [0.1, 0.2]])  # (kept, outputs)
    reader = Reader("layer", layer, (0, 2), (1,), None)
    change = change_of(reader, solution, torch.tensor([-0.9993, 0.0]))
    values = new_values({reader: change})
    wanted = layer.weight.detach().float()
    wanted[:, [0, 2]] += solution.t()
    exact = {"rtol": 0, "atol": 0} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(values["layer.weight"], wanted.to(dtype), **exact)
    bias = torch.tensor([1.0, 1.0]) + torch.tensor([-0.9993, 0.0])
    torch.testing.assert_close(values["layer.bias"], bias.to(dtype), **exact)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_map_goes_into_the_weights_of_all_layers_of_a_feed(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    layers = [
        nn.Linear(5, size) if kind == "linear" else Conv1D(size, 5) for size in (3, 7, 10_000)
    ]
    layers = [layer.double() for layer in layers]
    feed = Feed(tuple((f"layer.{number}", layer) for number, layer in enumerate(layers)))
    d, c = torch.randn(5, 5, generator=draw).double(), torch.randn(5, generator=draw).double()
    values = new_values({feed: change_of(feed, d, c)})
    x = torch.randn(4, 5, generator=draw).double()
    for number, layer in enumerate(layers):
        wanted = layer(x + x @ d + c)
        with torch.no_grad():
            layer.weight.copy_(values[f"layer.{number}.weight"])
            layer.bias.copy_(values[f"layer.{number}.bias"])
        torch.testing.assert_close(layer(x), wanted)
