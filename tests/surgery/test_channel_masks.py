"""Masks on channels: at 1 no bit changes, the gradient is Σ x·∂L/∂x, and norms are as if cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from channel_axes import CASES, Case, channels, plain, rows, tap
from torch import Tensor, nn

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.types import Axis, Tap

NAMES = sorted(CASES)
EPSILON = 1e-6
PARTS = ("left", "right", "norm")


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loss_of(case: Case) -> Tensor:
    out = case.model(*case.args)
    return (
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).square().sum()
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_at_one_changes_no_bit(name: str, training: bool) -> None:
    case = CASES[name]()
    case.model.train(training)
    before = case.run()
    with masked(case.model, case.axes, {axis.name: range(axis.size) for axis in case.axes}):
        assert torch.equal(case.run(), before)
    with mask_leaves(case.model, case.axes) as leaves:
        assert torch.equal(case.run(), before)
    assert {name: len(leaf) for name, leaf in leaves.items()} == {
        axis.name: axis.size for axis in case.axes
    }
    assert not hooks_of(case.model)


@pytest.mark.parametrize("name", NAMES)
def test_mask_gradient_is_the_sum_over_all_taps_and_the_finite_difference(name: str) -> None:
    case = CASES[name]()
    expected = {axis.name: _x_times_gradient(case, axis) for axis in case.axes}
    with mask_leaves(case.model, case.axes) as leaves:
        found = torch.autograd.grad(loss_of(case), list(leaves.values()))
        for axis, gradient in zip(case.axes, found, strict=True):
            assert torch.allclose(gradient, expected[axis.name], rtol=1e-10, atol=1e-12)
            leaf, losses = leaves[axis.name], []
            with torch.no_grad():
                for step in (EPSILON, -2 * EPSILON):
                    leaf[1] += step
                    losses.append(float(loss_of(case)))
                leaf[1] += EPSILON
            difference = (losses[0] - losses[1]) / (2 * EPSILON)
            assert difference == pytest.approx(float(gradient[1]), rel=1e-4, abs=1e-6)


def _x_times_gradient(case: Case, axis: Axis) -> Tensor:
    seen: list[tuple[Tap, Tensor]] = []
    handles = []
    for place in axis.taps:

        def keep(module: nn.Module, args: object, output: Tensor, place: Tap = place) -> None:
            output.retain_grad()
            seen.append((place, output))

        handles.append(case.model.get_submodule(place.module).register_forward_hook(keep))
    loss_of(case).backward()
    for handle in handles:
        handle.remove()
    total = torch.zeros(axis.size, dtype=torch.float64)
    for place, x in seen:
        products = (x * x.grad).movedim(place.dim, 0).flatten(1).sum(1).detach()
        total += torch.stack([products[place.rows([unit])].sum() for unit in range(axis.size)])
    case.model.zero_grad()
    return total


def test_only_the_units_of_the_axis_are_masked() -> None:
    case = CASES["concatenation"]()
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        seen[next(name for name, m in case.model.named_modules() if m is module)] = output

    with masked(case.model, case.axes, {"left:channels": [0, 5]}):
        handles = [case.model.get_submodule(p).register_forward_hook(note) for p in PARTS]
        case.run()
    for handle in handles:
        handle.remove()
    for path, gone in (("left", [1, 2, 3, 4]), ("norm", [1, 2, 3, 4]), ("right", [])):
        zero = [not entry.any() for entry in seen[path].movedim(1, 0)]
        assert [entry for entry, is_zero in enumerate(zero) if is_zero] == gone


@pytest.mark.parametrize("norm", ["group", "layer", "instance", "batch"])
def test_norms_take_their_statistics_from_the_kept_channels(norm: str) -> None:
    made = {
        "group": nn.GroupNorm(1, 6),
        "layer": nn.LayerNorm((6, 3, 3)),
        "instance": nn.InstanceNorm2d(6, affine=True),
        "batch": nn.BatchNorm2d(6),
    }[norm]
    model = nn.Sequential(nn.Conv2d(2, 6, 1), made).double()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(torch.rand_like(parameter))
    weights = [rows("1.weight"), rows("1.bias")]
    axis = channels(6, [rows("0.weight"), rows("0.bias"), *weights], [tap("0")], [tap("1")])
    kept = [1, 2, 5]
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    with masked(model, [axis], {"0:channels": kept}):
        found = model(x)
    y = model[0](x)[:, kept]
    dims = {"group": (1, 2, 3), "layer": (1, 2, 3), "instance": (2, 3), "batch": (0, 2, 3)}[norm]
    wanted = (y - y.mean(dims, keepdim=True)) / (
        y.var(dims, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    shape = (3, 3, 3) if norm == "layer" else (3, 1, 1)
    weight, bias = (p[kept].view(shape) for p in model[1].parameters())
    wanted = wanted * weight + bias
    assert torch.allclose(found[:, kept], wanted, rtol=0, atol=1e-12)
    assert not found[:, [0, 3, 4]].any()


@pytest.mark.parametrize("name", ["channels last", "concatenation", "grouped", "depthwise"])
def test_gradients_reach_the_kept_parameters_of_norms_only(name: str) -> None:
    case = CASES[name]()
    kept = case.kept()
    with masked(case.model, case.axes, kept):
        loss_of(case).backward()
    for axis in case.axes:
        gone = [unit for unit in range(axis.size) if unit not in kept[axis.name]]
        for s in axis.slices:
            if s.dim == 0 and not s.tensor.startswith("running", s.tensor.rindex(".") + 1):
                grad = case.model.get_parameter(s.tensor).grad
                assert not grad[s.rows(gone)].any(), s.tensor
                assert grad.any(), s.tensor


def test_a_norm_that_learns_inside_the_block_is_followed() -> None:
    case = CASES["grouped"]()
    kept = case.kept()
    with masked(case.model, case.axes, kept):
        before = case.run()
        with torch.no_grad():
            case.model[1].weight.mul_(2)
        after = case.run()
    with masked(case.model, case.axes, kept):
        assert torch.equal(case.run(), after)
    assert not torch.allclose(before, after)


def test_batch_norms_in_training_count_once_per_forward() -> None:
    case = plain()
    case.model.train()
    with masked(case.model, case.axes, case.kept()):
        case.run()
    assert int(case.model[1].num_batches_tracked) == 1


def test_everything_masked_leaves_zeros() -> None:
    case = CASES["grouped"]()
    with masked(case.model, case.axes, {"2:channels": []}):
        bias = case.model[4].bias.view(1, -1, 1, 1)
        assert torch.equal(case.run(), bias.expand_as(case.run()))
    with masked(case.model, case.axes, {"0:channels": []}):
        found = case.run()
    assert torch.isfinite(found).all()


def test_a_tap_at_an_input_along_channels() -> None:
    case = plain()
    at_input = replace(case.axes[0], taps=(Tap("3", "input", 1),), norms=())
    with masked(case.model, [at_input], {"0:channels": [0, 6]}):
        found = case.run()
    with torch.no_grad():
        case.model[3].weight[:, [1, 2, 3, 4, 5, 7]] = 0
    assert torch.allclose(case.run(), found, rtol=0, atol=1e-12)


def test_hooks_of_a_norm_run_once_and_all_go_after_an_exception() -> None:
    case = CASES["grouped"]()
    calls: list[int] = []
    handle = case.model[1].register_forward_hook(lambda *_: calls.append(1))
    before = hooks_of(case.model)
    with masked(case.model, case.axes, case.kept()):
        case.run()
        assert hooks_of(case.model) > before
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_inside(case)
    assert hooks_of(case.model) == before
    handle.remove()


def _fail_inside(case: Case) -> None:
    with masked(case.model, case.axes, case.kept()):
        raise RuntimeError("on purpose")


def test_axes_of_another_model_are_refused() -> None:
    case = plain()
    absent = replace(case.axes[0], taps=(tap("7"),))
    wide = replace(case.axes[0], size=9)
    normless = replace(case.axes[0], norms=(tap("1.norm"),))
    for axis, path in ((absent, "7"), (normless, r"1\.norm")):
        with (
            pytest.raises(StructureError, match=f"Sequential has no module '{path}'"),
            masked(case.model, [axis], {"0:channels": [0]}),
        ):
            pass
    with (
        masked(case.model, [wide], {"0:channels": [0]}),
        pytest.raises(
            StructureError, match=r"output of 0 holds 8 values in dimension 1.* reach to 9"
        ),
    ):
        case.run()
    assert not hooks_of(case.model)
