"""Examples in order of length: the same scores in less time, and the file's order elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from score_examples import assert_equal, build, examples_of, in_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_gradnas.batches.steps import ByLength, HeldOut, by_length, number_of
from hf_gradnas.repair.pieces import read_parts
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import collect_scores


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return in_batches([{k: v[None] for k, v in example.items()} for example in examples], 99)[0]


class Rows(Dataset):
    """Examples one by one, which counts how often it is read."""

    def __init__(self, family: str, count: int, longest: int = 40) -> None:
        examples = examples_of(family, count, longest=longest)
        self.rows = [{key: value[0] for key, value in example.items()} for example in examples]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        return self.rows[index]


def loader_of(rows: Any, size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(rows, batch_size=size, collate_fn=collate, **options)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("labels", ["data", "model"])
def test_scores_are_those_of_the_order_of_the_file(family: str, labels: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        loader = loader_of(Rows(family, 18))
        ordered = by_length(loader, "balanced")
        assert ordered is not loader
        options = {"method": "balanced", "also": ("fisher", "taylor"), "labels": labels}
        expected = collect_scores(model, axes, loader, **options)
        found = collect_scores(model, axes, ordered, **options)
    for method in expected.methods:
        assert_equal(found.of(method), dict(expected.of(method).values))


def test_batches_are_of_similar_length_the_longest_first() -> None:
    rows = Rows("llama", 18)
    widths = [batch["input_ids"].shape[1] for batch in by_length(loader_of(rows), "fisher")]
    assert widths == sorted(widths, reverse=True)
    assert rows.reads == 1 + 18 + 18
    plain = sum(4 * batch["input_ids"].shape[1] for batch in loader_of(rows))
    assert 4 * sum(widths) < plain
    order = ByLength(rows, 18).order
    assert sorted(order) == list(range(18))
    equal = ByLength([{"input_ids": [1, 2]}] * 3, 3)
    assert (list(equal), len(equal)) == ([0, 1, 2], 3)


def test_without_a_score_they_are_sorted_too() -> None:
    loader = loader_of(Rows("bert", 18))
    assert by_length(loader, "gradnas") is loader
    ordered = by_length(loader, num_examples=7)
    assert sorted(ordered.sampler) == list(range(7))
    widths = [batch["input_ids"].shape[1] for batch in by_length(loader)]
    assert len(widths) == 5
    assert widths == sorted(widths, reverse=True)


def test_what_a_repair_holds_out_is_every_fifth_batch_of_that_order() -> None:
    model, _, _ = build("bert")
    ordered = by_length(loader_of(Rows("bert", 40), 2))
    parts = read_parts(model, ordered, None, Processes())
    held = [batch.columns["input_ids"].shape[1] for batch, is_held_out, _ in parts if is_held_out]
    assert held == [batch["input_ids"].shape[1] for batch in ordered][4::5]


def test_what_a_repair_holds_out_of_few_batches_is_of_all_lengths_too() -> None:
    model, _, _ = build("bert")
    (batch,) = by_length(loader_of(Rows("bert", 20), 20))
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 10
    parts = read_parts(model, [batch], None, Processes())
    assert [part.is_held_out for part in parts] == [False] * 4 + [True]
    for place, part in enumerate(parts):
        assert torch.equal(part.batch.columns["attention_mask"].sum(1), lengths[place::5])


def test_rows_that_are_held_out_are_of_all_lengths() -> None:
    model, axes, _ = build("bert")
    ordered = by_length(loader_of(Rows("bert", 40), 2), "balanced")
    held_out = HeldOut()
    collect_scores(model, axes, ordered, held_out=held_out)
    every = [batch["input_ids"].shape[1] for batch in ordered]
    assert [batch["input_ids"].shape[1] for batch in held_out.batches] == every[4::5]


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_first_examples_are_those_that_are_scored(drop_last: bool) -> None:
    rows = Rows("bert", 18)
    loader = loader_of(rows, drop_last=drop_last)
    for limit, count in ((None, 16 if drop_last else 18), (7, 7), (99, 16 if drop_last else 18)):
        ordered = by_length(loader, "fisher", num_examples=limit)
        assert sorted(ordered.sampler) == list(range(count))
        assert sum(len(batch["labels"]) for batch in ordered) == count


class _Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_other_loaders_and_scores_of_whole_batches_are_left_alone() -> None:
    rows = Rows("bert", 4)
    for loader in (
        loader_of(rows, shuffle=True),
        loader_of(rows, num_workers=1),
        loader_of(_Stream()),
        DataLoader(rows, batch_size=None),
        DataLoader(rows, batch_sampler=[[0, 1], [2, 3]]),
        [{"input_ids": torch.ones(1, 2)}],
    ):
        assert by_length(loader, "fisher") is loader
    loader = loader_of(rows)
    assert by_length(loader, "gradnas") is loader
    assert number_of(loader, 3) == 3
    assert number_of([], 3) == 3


@pytest.mark.parametrize(
    "example",
    [
        {"text": "a"},
        {"input_ids": 7},
        "words",
        {"input_ids": [1, 2], "pixel_values": torch.zeros(3, 4, 4)},
        {"input_ids": [1, 2], "pixel_values": np.zeros((3, 4, 4))},
    ],
)
def test_examples_that_cannot_or_should_not_be_measured_keep_their_order(example: Any) -> None:
    assert ByLength([example, {"input_ids": [1, 2, 3]}], 2).order == [0, 1]


def test_lengths_are_of_token_ids_and_then_of_labels() -> None:
    examples = [
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": np.ones(2), "labels": torch.ones(3)},
        {"input_ids": (1, 2, 3), "labels": 1},
        {"input_ids": torch.ones(2), "labels": torch.tensor(1)},
    ]
    assert ByLength(examples, 4).order == [2, 1, 0, 3]
    assert ByLength([], 0).order == []
