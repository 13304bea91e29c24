"""Numbers that a type or a device lacks: gradients that overflow, and float64 that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from devices import Float64, without_float64
from overflows import marked, overflowing
from score_examples import build, examples_of, in_batches

from hf_gradnas.errors import DataError, GradNASWarning
from hf_gradnas.scores import collect_scores, losses
from hf_gradnas.types import Scores

ALSO = ("taylor", "tempered", "gradnas")


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_scores_are_those_of_the_other_examples(size: int) -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    examples = marked(12, bad=(7,))
    others = [example for number, example in enumerate(examples) if number != 7]
    with overflowing(model):
        with pytest.warns(GradNASWarning, match="gradients of 1 of 12 examples overflow"):
            found = collect_scores(model, axes, in_batches(examples, size), also=ALSO)
        expected = collect_scores(model, axes, in_batches(others, 1), also=ALSO)
        if size == len(examples):
            rest = collect_scores(model, axes, in_batches(others, size), method="gradnas")
            for name, values in rest.values.items():
                ours = found.of("gradnas").values[name]
                np.testing.assert_allclose(ours, values, rtol=0, atol=0.05 * values.max())
    assert found.metadata["skipped_examples"] == "1"
    assert "skipped_examples" not in expected.metadata
    apart = 0.0 if size == 1 else 0.05  # float16 rounds otherwise in other batches
    for key, near in (("labels_scored", 0.0), ("loss_sum", apart / 50)):
        wanted = float(expected.metadata[key])
        assert float(found.metadata[key]) == pytest.approx(wanted, rel=near, abs=0)
    batchwise = ("gradnas",) if size == 1 else ()  # its terms are whole batches
    for method in ("fisher", "taylor", "tempered", *batchwise):
        for name, values in expected.of(method).values.items():
            largest = float(values.max())
            ours = found.of(method).values[name]
            np.testing.assert_allclose(ours / largest, values / largest, rtol=0, atol=apart)


def test_a_batch_of_which_nothing_counts_adds_nothing_to_drawn_labels() -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    examples = marked(12, bad=(11,))
    with overflowing(model):
        with pytest.warns(GradNASWarning, match="gradients of 1 of 12"):
            found = collect_scores(model, axes, in_batches(examples, 1), labels="model", also=ALSO)
        rest = in_batches(examples[:11], 1)
        expected = collect_scores(model, axes, rest, labels="model", also=ALSO)
    for key in ("labels_scored", "loss_sum"):
        assert found.metadata[key] == expected.metadata[key]
    for method in ("fisher", *ALSO):
        for name, values in expected.of(method).values.items():
            assert np.array_equal(found.of(method).values[name], values)


def test_a_loss_that_is_a_sum_loses_the_skipped_examples_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(losses, "find_normaliser", lambda *_, **__: "sum")
    model, axes, _ = build("bert", dtype=torch.float16)
    with overflowing(model), pytest.warns(GradNASWarning, match="gradients of 1 of 12"):
        found = collect_scores(model, axes, in_batches(marked(12, bad=(3,)), 12))
    assert found.metadata["labels_scored"] == "11"
    assert all(values.any() for values in found.values.values())


def test_more_than_a_tenth_is_an_error() -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    with (
        overflowing(model),
        pytest.raises(DataError, match=r"2 of 12 .*, more than 10%; load the model in bfloat16"),
    ):
        collect_scores(model, axes, in_batches(marked(12, bad=(1, 7)), 4))


def test_other_types_have_room_for_all_numbers() -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    with (
        overflowing(model),
        pytest.raises(DataError, match=r"a gradient of .* though the loss is finite"),
    ):
        collect_scores(model, axes, in_batches(marked(12, bad=(7,)), 4))


def test_what_was_skipped_is_in_the_file_of_a_pass_that_broke_off(tmp_path: Any) -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    batches = in_batches(marked(12, bad=(1,)), 2)
    file = tmp_path / "scores.safetensors"

    def breaking() -> Iterator[dict[str, torch.Tensor]]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with overflowing(model):
        with pytest.warns(GradNASWarning, match="1 of 12"):
            expected = collect_scores(model, axes, batches)
        with pytest.raises(KeyboardInterrupt):
            collect_scores(model, axes, breaking(), file=file)
        assert Scores.load(file).metadata["skipped_examples"] == "1"
        with pytest.warns(GradNASWarning, match="1 of 12"):
            found = collect_scores(model, axes, batches, file=file)
    assert found.metadata == expected.metadata
    for name, values in expected.values.items():
        assert np.array_equal(found.values[name], values)


@pytest.mark.parametrize("method", ["fisher", "tempered", "taylor", "magnitude"])
def test_a_device_without_float64_is_asked_for_none(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    batches = in_batches(examples_of("bert", 4), 2)
    with Float64() as mode:
        expected = collect_scores(model, axes, batches, method=method)
    assert mode.count
    with without_float64(monkeypatch) as mode:
        found = collect_scores(model, axes, batches, method=method)
    assert mode.count == 0
    for name, values in expected.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=1e-3, atol=1e-3 * values.max())
