"""Batches for private scoring passes, made from a trainer's loader without disturbing it.

The loader itself is not iterated: the training may be in the midst of it, its sampler would draw
from the random state that the training goes on with, and accelerate counts its passes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

Batches = Iterable[Mapping[str, Any]]

NOISE = 0.02  # instead of zeros, where a whole parameter is zero


def private_batches(
    loader: Any,
    *,
    num_examples: int | None,
    batch_size: int,
    seed: int,
) -> Batches:
    """Batches of a fixed random sample of a loader's data set, the same on all processes.

    Args:
        loader: The trainer's; its data set and its collate function are used. One that is not a
            torch ``DataLoader`` is read as it is.
        num_examples: Size of the sample; None: all. Of a data set that can only be iterated, the
            first ones are meant to be taken by who reads.
        batch_size: Examples per batch.
        seed: Decides the sample.
    """
    if not isinstance(loader, DataLoader):
        return loader
    dataset: Dataset[Any] = loader.dataset
    while isinstance(dataset, IterableDatasetShard):  # accelerate's share of one process
        dataset = dataset.dataset
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": loader.collate_fn}
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return DataLoader(dataset, **options)
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_examples]
    return DataLoader(Subset(dataset, order.tolist()), **options)


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode, full precision and a random state of its own; everything restored after it."""
    flags = {module: module.training for module in model.modules()}
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(cuda)), without_autocast(model):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            model.eval()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in flags.items():
            module.training = training


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Let a model run as it is saved, although accelerate has wrapped its forward for bf16 or fp16.

    Cause: ``Accelerator.prepare_model`` stores a wrapper in the instance, which no autocast context
    turns off, and can only take it away for good. Remove when it can be lifted for a while.
    """
    instance = vars(model)
    if "_original_forward" not in instance:
        yield
        return
    wrapped = instance["forward"]
    try:
        instance["forward"] = instance["_original_forward"]
        yield
    finally:
        instance["forward"] = wrapped


@contextmanager
def without_zeros(model: nn.Module) -> Iterator[None]:
    """Put small random numbers where a parameter is exactly zero, within the block.

    Axes are found by what changes the output; units that an earlier run has masked do not.
    """
    zeros = {p: p.detach() == 0 for p in model.parameters()}
    try:
        with torch.no_grad():
            for parameter, where in zeros.items():
                size = max(parameter.detach().float().std(correction=0).item(), NOISE)
                parameter[where] = torch.randn_like(parameter)[where] * size
        yield
    finally:
        with torch.no_grad():
            for parameter, where in zeros.items():
                parameter[where] = 0
