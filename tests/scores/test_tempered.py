"""Rows that are tempered only where few of them would count otherwise, chosen at the pass's end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from score_examples import assert_equal, build, examples_of, in_batches

from hf_gradnas.errors import DataError, ScoresError
from hf_gradnas.scores import check_scores, collect_scores, methods
from hf_gradnas.types import Scores

LONG = 53  # tokens: four rows, the last one short
MIN_RATIO = "MIN_EFFECTIVE_RATIO"


def _sums(weights: np.ndarray) -> np.ndarray:
    """Sums over rows of those weights: scores of two units with each power, and the weights."""
    return np.array([1.0, 2.0, 3.0, 4.0, len(weights), weights.sum(), np.square(weights).sum()])


@pytest.mark.parametrize(
    ("weights", "power", "ratio"),
    [
        (np.ones(512), 0.0, 1.0),  # all rows weigh the same
        (np.array([1e6] + [1.0] * 511), 0.75, 1 / 512),  # one row is nearly all
        (np.array([1.0] * 179 + [0.0] * 333), 0.75, 179 / 512),
        (np.array([1.0] * 180 + [0.0] * 332), 0.0, 180 / 512),
        (np.zeros(0), 0.0, 1.0),
    ],
)
def test_rows_stay_as_they_are_where_enough_of_them_count(weights, power, ratio) -> None:
    found = methods.chosen("tempered", _sums(weights), 2)
    assert (found.power, found.scores.tolist()) == (power, [1.0, 2.0] if power == 0 else [3.0, 4.0])
    assert found.effective_ratio == pytest.approx(ratio, rel=1e-2)
    assert found.metadata()["row_power"] == f"{power:g}"


@pytest.mark.parametrize("method", ["tempered", "balanced", "fisher", "gradnas", "taylor"])
def test_terms_of_axes_together_are_those_of_each(method: str, monkeypatch) -> None:
    _, axes, _ = build("llama")  # with KV groups, which the norms of rows leave out
    generator = torch.Generator().manual_seed(0)
    rows = {a.name: torch.randn(3, 1, a.size, generator=generator) for a in axes}
    rows[axes[0].name] = torch.randn(3, 2, axes[0].size, generator=generator)  # rows of positions
    scale = torch.tensor(1.7, dtype=torch.float64)
    terms = list(methods.terms_of(method, rows, axes, 5, scale=scale))
    scaled = {name: value.double() * scale for name, value in rows.items()}
    monkeypatch.setattr(methods, "_place", lambda rows: (True, rows.device))
    apart = list(methods.terms_of(method, scaled, axes, 5))
    assert len(terms) < len(apart)
    assert torch.allclose(torch.cat(terms), torch.cat(apart), rtol=1e-12, atol=0)


def test_a_method_without_a_choice_is_its_sums() -> None:
    sums = np.arange(4.0)
    for method in ("balanced", "fisher", "gradnas", "taylor"):
        assert methods.sums_of(method, 4) == 4
        found = methods.chosen(method, sums, 4)
        assert found.scores is sums
        assert (found.power, found.metadata()) == (None, {})
    assert methods.sums_of("tempered", 4) == 11


def _row_squares(rows: dict[str, torch.Tensor], axes) -> torch.Tensor:
    """Squared norms of rows ``(examples, rows)`` over all axes but KV groups."""
    groups = {axis.parent for axis in axes}
    return sum(rows[a.name].square().sum(-1) for a in axes if a.name not in groups)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_share_of_effective_rows_is_kishs(family: str, monkeypatch) -> None:
    squares = []
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        plain = methods.terms_of

        def watched(method, rows, axes, count):
            squares.append(_row_squares(rows, axes).flatten())
            return plain(method, rows, axes, count)

        monkeypatch.setattr("hf_gradnas.scores.measure.terms_of", watched)
        batches = in_batches(examples_of(family, 12, longest=LONG), 5)
        found = collect_scores(model, axes, batches, method="tempered")
    weights = torch.cat(squares)
    weights = weights[weights > 0]
    expected = float(weights.sum() ** 2 / weights.square().sum() / len(weights))
    assert float(found.metadata["effective_ratio"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("place", ["below", "above"])
def test_the_choice_does_not_depend_on_the_batches(family: str, place: str, monkeypatch) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        examples = examples_of(family, 12, longest=14 if family == "bert" else LONG)
        expected = collect_scores(model, axes, in_batches(examples, 1), method="tempered")
        ratio = float(expected.metadata["effective_ratio"])
        monkeypatch.setattr(methods, MIN_RATIO, ratio * (0.99 if place == "below" else 1.01))
        expected = collect_scores(model, axes, in_batches(examples, 1), method="tempered")
        assert expected.metadata["row_power"] == ("0" if place == "below" else "0.75")
        for size in (8, 32):
            found = collect_scores(model, axes, in_batches(examples, size), method="tempered")
            assert found.metadata["row_power"] == expected.metadata["row_power"]
            assert found.metadata["effective_ratio"] == expected.metadata["effective_ratio"]
            assert_equal(found, dict(expected.values))


def test_rows_of_zeros_are_not_counted() -> None:
    model, axes, _ = build("llama")
    examples = examples_of("llama", 4, longest=LONG)
    silent = {**examples[0], "labels": torch.full_like(examples[0]["labels"], -100)}
    expected = collect_scores(model, axes, in_batches(examples, 4), method="tempered")
    found = collect_scores(model, axes, in_batches([*examples, silent], 5), method="tempered")
    assert found.metadata["effective_ratio"] == expected.metadata["effective_ratio"]


@pytest.mark.parametrize("minimum", [0.0, 1.01])
def test_a_pass_that_broke_off_goes_on_with_all_sums(minimum, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(methods, MIN_RATIO, minimum)
    model, axes, _ = build("llama")
    batches = in_batches(examples_of("llama", 12, longest=LONG), 3)
    options = {"method": "fisher", "also": ("tempered",)}
    expected = collect_scores(model, axes, batches, **options)
    file = tmp_path / "scores.safetensors"

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, interrupted(), file=file, **options)
    found = collect_scores(model, axes, batches, file=file, **options)
    with model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        again = collect_scores(model, axes, batches, file=file, **options)
    for scores in (found, again, Scores.load(file)):
        assert scores.metadata == expected.metadata
        assert np.array_equal(scores.sums["tempered"], expected.sums["tempered"])
        for name, values in expected.also["tempered"].items():
            assert np.array_equal(scores.also["tempered"][name], values)
    check_scores(Scores.load(file), model, axes)


def test_one_of_several_methods_is_as_alone() -> None:
    with zoo.float64_throughout():
        model, axes, _ = build("bert")
        batches = in_batches(examples_of("bert", 8), 4)
        joint = collect_scores(model, axes, batches, method="tempered", also=("fisher",))
        for method in joint.methods:
            alone = collect_scores(model, axes, batches, method=method)
            assert joint.of(method).metadata == alone.metadata
            assert joint.of(method).sums.keys() == alone.sums.keys()
            assert ("row_power" in alone.metadata) == (method == "tempered")


def test_a_file_without_the_sums_is_scored_again_or_damaged(tmp_path: Path, caplog) -> None:
    model, axes, _ = build("bert")
    batches = in_batches(examples_of("bert", 8), 4)
    file = tmp_path / "scores.safetensors"
    scores = collect_scores(model, axes, batches, method="tempered", file=file)
    older = scores.metadata["settings"].replace('"row_powers": {"tempered": [0.0, 0.75]}, ', "")
    assert older != scores.metadata["settings"]
    replace(scores, sums={}, metadata={**scores.metadata, "settings": older}).save(file)
    with caplog.at_level(logging.WARNING):
        found = collect_scores(model, axes, batches, method="tempered", file=file)
    assert "of another row_powers: scoring starts over" in caplog.text
    assert np.array_equal(found.sums["tempered"], scores.sums["tempered"])
    for broken in ({}, {"tempered": scores.sums["tempered"][1:]}):
        replace(scores, sums=broken).save(file)
        with pytest.raises(ScoresError, match="sums of tempered are no"):
            collect_scores(model, axes, batches, method="tempered", file=file)


@pytest.mark.parametrize("named", [("tempered", "fisher"), ("fisher", "tempered")])
def test_a_second_method_that_is_not_finite_names_its_axis(named, monkeypatch) -> None:
    model, axes, _ = build("bert")
    batch = in_batches(examples_of("bert", 4), 4)
    method, other = named
    *others, last = axes

    def broken(gradients, count):  # (examples, units of all axes)
        sums = torch.zeros_like(gradients[0])
        sums[sum(axis.size for axis in others) :] = np.nan
        return sums

    monkeypatch.setitem(methods.GRADIENT_METHODS, other, broken)
    with pytest.raises(DataError, match=f"a gradient of {last.name} is nan"):
        collect_scores(model, axes, batch, method=method, also=[other])
