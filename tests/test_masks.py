"""A mask at 1 changes no bit; its gradient is x·∂L/∂x; at 0 a unit is gone."""

from __future__ import annotations

import pytest
import torch
import zoo
from families import structure_of

from hf_gradnas.errors import PlanError, StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.types import Axis, Kind, Tap

FAMILIES = ("bert", "albert", "gpt2", "llama", "t5")
EPSILON = 1e-5


def _build(family: str, **kwargs):
    model, inputs = zoo.build(family, **kwargs)
    return model, structure_of(family, **kwargs).axes, inputs


def _hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mask_at_one_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model, axes, inputs = _build(family, dtype=dtype)
    plain = model(**inputs).logits
    with masked(model, axes, {axis.name: range(axis.size) for axis in axes}):
        assert torch.equal(model(**inputs).logits, plain)
    with mask_leaves(model, axes) as leaves:
        assert torch.equal(model(**inputs).logits, plain)
    assert all(leaf.dtype == dtype for leaf in leaves.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_gradient_is_x_times_its_gradient_and_the_finite_difference(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, inputs = _build(family)
        expected = {axis.name: _x_times_gradient(model, axis, inputs) for axis in axes}
        with mask_leaves(model, axes) as leaves:
            loss = model(**inputs).loss
            found = torch.autograd.grad(loss, list(leaves.values()))
            for axis, gradient in zip(axes, found, strict=True):
                assert torch.allclose(gradient, expected[axis.name], rtol=1e-9, atol=1e-12)
                unit = int(gradient.abs().argmax())
                difference = _difference(model, leaves[axis.name], unit, inputs)
                assert difference == pytest.approx(float(gradient[unit]), rel=1e-4, abs=1e-9)


def _x_times_gradient(model, axis: Axis, inputs) -> torch.Tensor:
    """Σ_tokens Σ_{d in unit} x·∂L/∂x over all calls of the out-projection."""
    seen = []

    def watch(module, args):
        args[0].retain_grad()
        seen.append(args[0])

    handle = model.get_submodule(axis.taps[0].module).register_forward_pre_hook(watch)
    model(**inputs).loss.backward()
    handle.remove()
    model.zero_grad()
    products = sum((x * x.grad).flatten(0, -2).sum(0) for x in seen if x.grad is not None)
    return products.detach().view(axis.size, axis.width).sum(1)


def _difference(model, leaf: torch.Tensor, unit: int, inputs) -> float:
    losses = []
    with torch.no_grad():
        for step in (EPSILON, -2 * EPSILON):
            leaf[unit] += step
            losses.append(float(model(**inputs).loss))
        leaf[unit] += EPSILON
    return (losses[0] - losses[1]) / (2 * EPSILON)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_is_zeroing_the_columns_of_the_out_projection(family: str) -> None:
    model, axes, inputs = _build(family)
    kept = {axis.name: range(1, axis.size) for axis in axes}
    with masked(model, axes, kept):
        found = model(**inputs).logits
    with torch.no_grad():
        for axis in axes:
            projection = model.get_submodule(axis.taps[0].module)
            rows = (
                projection.weight.T
                if isinstance(projection, torch.nn.Linear)
                else (projection.weight)
            )
            rows[: axis.width] = 0
    assert torch.allclose(model(**inputs).logits, found, rtol=0, atol=1e-12)
    assert not torch.allclose(zoo.build(family)[0](**inputs).logits, found, rtol=1e-3)


def test_a_removed_kv_group_takes_its_heads_along() -> None:
    model, axes, inputs = _build("llama")
    groups = next(axis for axis in axes if axis.kind is Kind.KV_GROUPS)
    heads = next(axis for axis in axes if axis.parent == groups.name)
    with masked(model, axes, {groups.name: [1]}):
        by_group = model(**inputs).logits
    with masked(model, axes, {heads.name: range(heads.size // groups.size, heads.size)}):
        assert torch.equal(model(**inputs).logits, by_group)


def test_forward_and_backward_are_enclosed_and_hooks_go_after_an_exception() -> None:
    model, axes, inputs = _build("bert")
    before = _hooks(model)
    neurons = next(axis for axis in axes if axis.kind is Kind.NEURONS)
    with masked(model, axes, {neurons.name: [3, 5]}):
        model(**inputs).loss.backward()
        assert _hooks(model) == before + 1
    weight = model.get_submodule(neurons.taps[0].module).weight
    assert weight.grad.abs().sum(0).nonzero().flatten().tolist() == [3, 5]
    model.zero_grad()
    for context in (masked(model, axes, {neurons.name: []}), mask_leaves(model, axes)):
        with pytest.raises(RuntimeError, match="on purpose"), context:
            raise RuntimeError("on purpose")
        assert _hooks(model) == before


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"bert.pooler:heads": [0]}, "bert.pooler:heads: not an axis of this model"),
        ({"bert.encoder.layer.0:neurons": [96]}, "unit 96 does not exist, the axis has 96 units"),
        ({"bert.encoder.layer.0:neurons": [-1]}, "unit -1 does not exist"),
    ],
)
def test_a_plan_of_another_model_is_refused(kept, message: str) -> None:
    model, axes, _ = _build("bert")
    before = _hooks(model)
    with pytest.raises(PlanError, match=message), masked(model, axes, kept):
        pass
    assert _hooks(model) == before


def test_axes_of_another_model_are_refused() -> None:
    model, inputs = zoo.build("bert")
    before = _hooks(model)
    missing = Axis("a:heads", "a", Kind.HEADS, 4, (), (Tap("bert.nothing", "input", -1),))
    place = Tap("bert.pooler.dense", "input", -1, 8, 0, 8)
    narrow = Axis("a:heads", "a", Kind.HEADS, 4, (), (place,))
    with (
        pytest.raises(StructureError, match=r"has no module 'bert\.nothing'"),
        masked(model, [missing], {"a:heads": [0]}),
    ):
        pass
    with (
        masked(model, [narrow], {"a:heads": [0]}),
        pytest.raises(StructureError, match=r"holds 64 values .*, but the axis has 4 units of 8"),
    ):
        model(**inputs)
    assert _hooks(model) == before
