"""Scores for a run, over all processes: in passes of their own, or from the training's."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, Subset
from transformers.trainer_utils import RemoveColumnsCollator

from ..errors import DataError
from ..pruner import GradNASPruner
from ..running.processes import Processes
from ..running.wrappers import Features, body_of, without_autocast
from ..scores.fingerprints import model_fingerprint
from ..scores.methods import chosen
from ..surgery.rows import Kept, lost_units
from ..types import Scores
from .riding import TrainingScores
from .settings import Settings, check_sentence_settings


def private_scores(
    pruner: GradNASPruner, batches: Iterable[Mapping[str, Any]], **options: Any
) -> Scores:
    """Score in passes of their own; `options` are arguments of `GradNASPruner.score`."""
    scores = pruner.score(batches, **options)
    return replace(scores, metadata={**scores.metadata, "source": "private"})


def training_scores(pruner: GradNASPruner, riding: TrainingScores, processes: Processes) -> Scores:
    """Scores of the training's own passes so far.

    Raises:
        DataError: There are none, or all are zero.
    """
    window = riding.sums()
    counts = torch.stack([window.examples, window.batches, window.skipped])
    found = processes.sum(torch.cat([window.totals, counts]).cpu().double().numpy())
    if not found[:-3].any():
        raise DataError(
            f"scores_from='training': all scores are zero after {found[-3]:.0f} examples of the "
            f"training ({found[-1]:.0f} batches were skipped: gradients not finite, or not seen); "
            "use scores_from='private'."
        )
    metadata = {
        "method": riding.method,
        "labels": "data",
        "source": "training",
        "normaliser": riding.normaliser,
        "examples": f"{found[-3]:.0f}",
        "batches": f"{found[-2]:.0f}",
        "skipped_batches": f"{found[-1]:.0f}",
        "processes": str(processes.count),
        "complete": "true",
        "model_fingerprint": model_fingerprint(pruner.model),
    }
    sums = found[:-3]
    choice = chosen(riding.method, sums, sum(axis.size for axis in riding.axes))
    held = {} if choice.power is None else {riding.method: sums}
    return Scores(riding.values(choice.scores), metadata | choice.metadata(), sums=held)


def without_lost(scores: Scores, pruner: GradNASPruner, kept: Kept) -> Scores:
    """Scores in which units that are pruned already are worth nothing."""
    lost = {axis.name: lost_units(axis, kept) for axis in pruner.structure.axes}

    def cleared(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        copies = {name: np.array(value) for name, value in values.items()}
        for name, units in lost.items():
            copies[name][units] = 0
        return copies

    also = {method: cleared(values) for method, values in scores.also.items()}
    return replace(scores, values=cleared(scores.values), also=also)


# --- batches of a trainer's loader, for passes of their own ---------------------------------------


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
        batch_size: Examples per batch, where the loader does not say how many it has.
        seed: Decides the sample.

    Raises:
        DataError: All are asked for, and nothing says that the data ends.
    """
    dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
    while isinstance(dataset, IterableDatasetShard):  # accelerate's share of one process
        dataset = dataset.dataset
    if num_examples is None and not hasattr(dataset, "__len__"):
        raise DataError(
            f"num_examples=None: all of the trainer's data is scored, but {type(dataset).__name__} "
            "has no length and may never end; give a number of examples, or dataloader=…."
        )
    if not isinstance(loader, DataLoader):
        return loader
    batch_size = _batch_size(loader) or batch_size
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": loader.collate_fn}
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return DataLoader(dataset, **options)
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_examples]
    return DataLoader(Subset(dataset, order.tolist()), **options)


def trainer_batches(loader: Any, model: nn.Module, settings: Settings, args: Any) -> Batches:
    """Batches of the Transformers model that a trainer trains, from the trainer's own loader.

    Args:
        loader: The trainer's.
        model: What it trains: a Transformers model, or one of sentence-transformers around it,
            whose every column of texts is a batch.
        settings: Of the callback.
        args: The trainer's.

    Raises:
        DataError: Nothing says that the data ends, or the columns of several data sets differ.
        PlanError: The loss is not the Transformers model's own, and the settings need that.
    """
    body, owner = body_of(model)
    if owner is not None:
        check_sentence_settings(settings, body, owner)
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, ConcatDataset):
            raise DataError(
                f"train_dataset: {type(owner).__name__} is trained on several data sets, whose "
                f"columns may differ; give dataloader=… of batches for the {type(body).__name__}."
            )
    batches = private_batches(
        loader,
        num_examples=settings.sample_size,
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
    )
    return batches if owner is None else Features(batches)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Examples per batch of one process; None where its batches are of no fixed size."""
    sampler = loader.batch_sampler
    if isinstance(sampler, BatchSampler | BatchSamplerShard) and not loader.batch_size:
        return sampler.batch_size
    return loader.batch_size


def collators_of(loader: DataLoader[Any]) -> list[dict[str, Any]]:
    """Attributes of a loader's collate function, and of the one that it may wrap."""
    found = [loader.collate_fn]
    if isinstance(loader.collate_fn, RemoveColumnsCollator):
        found.append(loader.collate_fn.data_collator)
    return [vars(collator) for collator in found if hasattr(collator, "__dict__")]


@contextmanager
def undisturbed(model: nn.Module, seed: int, batches: Any = ()) -> Iterator[None]:
    """Eval mode, full precision and a random state of its own; everything restored after it.

    Args:
        model: The model.
        seed: Of the random state.
        batches: What is read within the block. Where it is a loader whose collate function draws
            from a generator of its own (masked language modelling), that one is seeded and restored
            as well.
    """
    flags = {module: module.training for module in model.modules()}
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=sorted(cuda)),
            without_autocast(model),
            _own_generators(batches, seed),
        ):
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
def _own_generators(batches: Any, seed: int) -> Iterator[None]:
    """Seed the generators of a loader's collate function; restore them, also to not made yet."""
    with ExitStack() as stack:
        for attributes in collators_of(batches) if isinstance(batches, DataLoader) else ():
            stack.callback(_set_attributes, attributes, dict(attributes))
            for value in attributes.values():
                if isinstance(value, torch.Generator):
                    stack.callback(value.set_state, value.get_state())
                    value.manual_seed(seed)
                elif isinstance(value, np.random.Generator):
                    bits = value.bit_generator
                    stack.callback(setattr, bits, "state", bits.state)
                    bits.state = type(bits)(seed).state
        yield


def _set_attributes(attributes: dict[str, Any], values: Mapping[str, Any]) -> None:
    attributes.clear()
    attributes.update(values)


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
