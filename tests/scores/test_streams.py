"""Data without an end: no more of it is read than is scored, in every entry point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from callback_runs import make_trainer, pruning
from score_examples import assert_equal, build, examples_of, in_batches
from torch.utils.data import DataLoader, IterableDataset

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.longest import longest_batch, reiterable
from hf_gradnas.errors import DataError
from hf_gradnas.scores import collect_scores

SIZE, WANTED = 3, 7
BATCHES = 3  # of SIZE examples hold WANTED ones


class Endless:
    """Batches without end, and how many of them were read."""

    def __init__(self) -> None:
        self.batches = in_batches(examples_of("llama", 12), SIZE)
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in itertools.cycle(self.batches):
            self.read += 1
            if self.read > 50:
                raise AssertionError("the stream is read without end")
            yield batch


class Stream(IterableDataset):
    """The same as a data set that can only be iterated."""

    def __init__(self, source: Endless) -> None:
        self.source = source

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.source)


KINDS: dict[str, Callable[[Endless], Any]] = {
    "generator": lambda source: (batch for batch in source),
    "iterator": iter,
    "map": lambda source: map(dict, source),
    "iterable": lambda source: source,
    "loader": lambda source: DataLoader(Stream(source), batch_size=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_read_than_is_scored(kind: str) -> None:
    model, axes, _ = build("llama")
    source = Endless()
    expected = collect_scores(model, axes, source.batches, num_examples=WANTED)
    pruner = GradNASPruner(model, score="fisher")
    found = pruner.score(KINDS[kind](source), num_examples=WANTED)
    assert found.metadata["examples"] == str(WANTED)
    assert_equal(found, dict(expected.values))
    passes = 1 if kind in ("generator", "iterator", "map") else 2  # finding, and scoring
    assert source.read <= passes * BATCHES


@pytest.mark.leaves_state
def test_prune_reads_no_more_either() -> None:
    model, _ = zoo.build("llama")
    source = Endless()
    GradNASPruner(model, score="fisher").prune(iter(source), {"params": "80%"}, num_examples=WANTED)
    assert source.read == BATCHES


def test_a_known_structure_is_scored_without_keeping_the_batches() -> None:
    model, inputs = zoo.build("llama")
    pruner, source = GradNASPruner(model, score="fisher"), Endless()
    pruner.discover(inputs)
    pruner.score(iter(source), num_examples=WANTED)
    assert source.read == BATCHES


def test_a_cycle_ends_where_it_is_told_to() -> None:
    model, _ = zoo.build("llama")
    batches = in_batches(examples_of("llama", 2), 1)
    found = GradNASPruner(model, score="fisher").score(itertools.cycle(batches), num_examples=5)
    assert found.metadata["examples"] == "5"


@pytest.mark.parametrize("is_known", [False, True])
def test_a_cycle_that_nothing_ends_is_refused(is_known: bool) -> None:
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model, score="fisher")
    if is_known:
        pruner.discover(inputs)
    with pytest.raises(DataError, match=r"itertools\.cycle has no end.*num_examples"):
        pruner.score(itertools.cycle([inputs]))


def test_a_callback_reads_no_more_than_it_scores(tmp_path: Any) -> None:
    batches = in_batches(examples_of("bert", 4), 1)
    read = []

    def endless() -> Iterator[dict[str, torch.Tensor]]:
        for batch in itertools.cycle(batches):
            assert len(read) < 50
            read.append(1)
            yield batch

    callback = pruning(when="begin", dataloader=endless(), num_examples=3)
    make_trainer(tmp_path, callback)
    assert callback.scores.metadata["examples"] == "3"
    assert len(read) == 3


def test_examples_are_counted_as_they_are_scored() -> None:
    """The first column need not count them: patches of pictures do not."""
    model, inputs = zoo.build("llama")
    other = {"patches": torch.zeros(64, 2), **inputs}
    long = {**inputs, "input_ids": torch.ones(4, 20, dtype=torch.long)}
    wanted = 2 * len(inputs["labels"])
    assert longest_batch([other, long], model, wanted) is long


def test_a_loader_is_not_started_to_see_whether_it_can_be_read_again() -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("started")

    model, _ = zoo.build("llama")
    loader = Loader()
    assert reiterable(loader, model, None) is loader
