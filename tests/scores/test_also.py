"""Several methods from one pass: each as its own pass would have given it, also in files."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from score_examples import build, examples_of, in_batches

from hf_gradnas.errors import DataError, ScoresError
from hf_gradnas.scores import check_scores, collect_scores, methods
from hf_gradnas.types import Scores

BATCHES = in_batches(examples_of("bert", 20), 4)
METHODS = ("taylor", "fisher", "gradnas")


def _assert_same(found: Scores, expected: Scores) -> None:
    assert found.metadata == expected.metadata
    assert found.also.keys() == expected.also.keys()
    for one, other in zip(
        (found.values, *found.also.values()),
        (expected.values, *expected.also.values()),
        strict=True,
    ):
        assert list(one) == list(other)
        for name, values in other.items():
            assert np.array_equal(one[name], values), name


def _joint(model, axes, batches=BATCHES, **settings) -> Scores:
    return collect_scores(model, axes, batches, method=METHODS[0], also=METHODS[1:], **settings)


@pytest.mark.parametrize("settings", [{}, {"labels": "model", "seed": 2}], ids=str)
def test_each_method_is_as_from_a_pass_of_its_own(settings) -> None:
    model, axes, _ = build("bert")
    joint = _joint(model, axes, **settings)
    assert joint.methods == METHODS
    for method in METHODS:
        alone = collect_scores(model, axes, BATCHES, method=method, **settings)
        _assert_same(joint.of(method), alone)
        _assert_same(alone.of(method), alone)


def test_one_pass_serves_all_methods() -> None:
    model, axes, _ = build("bert")
    calls = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        collect_scores(model, axes, BATCHES)
        one = len(calls)
        _joint(model, axes)
    assert len(calls) == 2 * one


def test_global_batches_are_squared_as_a_whole_beside_other_methods() -> None:
    model, axes, _ = build("bert")
    accelerator = Accelerator(gradient_accumulation_steps=2)
    joint = _joint(model, axes, accelerator=accelerator)
    for method in METHODS:
        alone = collect_scores(model, axes, BATCHES, method=method, accelerator=accelerator)
        for axis in axes:
            one, other = joint.of(method).values[axis.name], alone.values[axis.name]
            assert np.allclose(one, other, rtol=1e-12, atol=0)


def test_a_file_keeps_all_methods(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    joint = _joint(model, axes, file=file)
    _assert_same(Scores.load(file), joint)
    names = {axis.name for axis in axes}
    assert load_file(file).keys() == names | {f"{m}/{n}" for m in METHODS[1:] for n in names}
    check_scores(Scores.load(file), model, axes)
    changed = load_file(file)
    changed[f"fisher/{axes[0].name}"] += 1.0
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    save_file(changed, file, metadata=metadata)
    with pytest.raises(ScoresError, match="was changed since it was written"):
        Scores.load(file)


@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_pass_has_all_methods(tmp_path: Path, after: int) -> None:
    model, axes, _ = build("bert")
    expected = _joint(model, axes)
    file = tmp_path / "scores.safetensors"

    def interrupted():
        yield from BATCHES[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _joint(model, axes, interrupted(), file=file)
    assert Scores.load(file).methods == METHODS
    found = _joint(model, axes, iter(BATCHES), file=file)
    _assert_same(found, expected)
    _assert_same(Scores.load(file), expected)
    with model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        _assert_same(_joint(model, axes, file=file), expected)


def test_a_file_of_other_methods_starts_over_and_one_view_of_it_does_not(tmp_path, caplog) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    joint = _joint(model, axes, file=file)
    with caplog.at_level(logging.WARNING):
        collect_scores(model, axes, BATCHES, method=METHODS[0], file=file)
    assert "of another also: scoring starts over" in caplog.text
    caplog.clear()
    joint.of("fisher").save(file)
    with model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        _assert_same(collect_scores(model, axes, BATCHES, file=file), joint.of("fisher"))
    assert not caplog.records


def test_what_scores_do_not_hold_is_refused() -> None:
    model, axes, _ = build("bert")
    joint = _joint(model, axes)
    with pytest.raises(ScoresError, match="they hold 'taylor', 'fisher', 'gradnas', but 'random'"):
        joint.of("random")
    broken = replace(joint, metadata={**joint.metadata, "settings": "[1"})
    with pytest.raises(ScoresError, match="settings hold '\\[1', needed a JSON object"):
        broken.of("fisher")
    fewer = {name: values for name, values in joint.values.items() if name != axes[0].name}
    with pytest.raises(ScoresError, match="the scores hold none for this axis"):
        check_scores(replace(joint, also={"fisher": fewer}), model, axes)
    with pytest.raises(ScoresError, match="their method is 'magic', known are"):
        check_scores(replace(joint, also={"magic": joint.values}), model, axes)


@pytest.mark.parametrize(
    ("also", "said"),
    [
        (("wanda",), "also='wanda' is not known; choose one of"),
        (("magnitude",), "also='magnitude' is not known; choose one of"),
        (("fisher",), "found one twice"),
        ("taylor", "also='taylor': needed a list of methods"),
        (7, "also=7: needed a list of methods"),
    ],
)
def test_wrong_methods_are_refused_before_the_first_batch(also, said: str) -> None:
    model, axes, _ = build("bert")
    with pytest.raises(ScoresError, match=said):
        collect_scores(model, axes, [], also=also)
    with pytest.raises(ScoresError, match="also='magnitude' is not known"):
        collect_scores(model, axes, [], method="magnitude", also=("fisher",))


def test_a_gradient_that_is_not_finite_names_its_axis_with_several_methods(monkeypatch) -> None:
    model, axes, _ = build("bert")

    def broken(gradients, count):
        return gradients.sum(0) * np.nan

    monkeypatch.setitem(methods.GRADIENT_METHODS, "gradnas", broken)
    monkeypatch.setitem(methods.GRADIENT_METHODS, "fisher", broken)
    with pytest.raises(DataError, match=f"a gradient of {axes[0].name} is nan"):
        _joint(model, axes)
