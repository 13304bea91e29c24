"""The layers that are tied together, beside those that torch-pruning's dependency graph ties.

It is the peer for convolutional networks. hf_gradnas does not build on it, since it guesses the
channel dimension from the number of dimensions: it misses flattened (channels, length) features and
concatenations of the last dimension, and fails on empty caches (1.6.1).
"""

import conv_families
import pytest
import torch
import torch_pruning

from hf_gradnas.structure.channels import read_channels
from hf_gradnas.structure.discovery import read_forward

SAME = [
    "resnet basic",
    "resnet bottleneck",
    "regnet x",
    "regnet y",
    "mobilenet v1",
    "mobilenet v2",
    "efficientnet",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SAME)
def test_the_same_layers_are_tied_together(family):
    model, inputs, _ = conv_families.build(family)
    axes, _ = read_channels(read_forward(model, (), inputs), (), frozenset())
    found = {frozenset(part.tensor.rpartition(".")[0] for part in axis.slices) for axis in axes}
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, inputs, output_transform=lambda output: output.logits, verbose=False
    )
    paths = {module: path for path, module in model.named_modules()}
    expected = {
        frozenset(paths[dep.target.module] for dep, _ in group if dep.target.module in paths)
        for group in graph.get_all_groups()
    }
    (last,) = expected - found
    assert found < expected
    assert not any(isinstance(model.get_submodule(path), torch.nn.Conv2d) for path in last)
