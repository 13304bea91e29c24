"""Channels are proved on the whole model, all at once; those at fault are found and refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from channel_axes import CASES, plain, residual, tap, two_blocks
from torch import Tensor, nn

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import masked
from hf_gradnas.structure.discovery import discover
from hf_gradnas.structure.places import Discovery, move_axis
from hf_gradnas.structure.trace import Call
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Attribute, Axis, Kind, Refusal, Slice
from hf_gradnas.verification import find_structure, models, proof, prove_channels


def without(axis: Axis, tensor: str) -> Axis:
    return replace(axis, slices=tuple(s for s in axis.slices if s.tensor != tensor))


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_axes_by_hand_are_proved_and_the_model_is_left_as_it_was(
    name: str, dtype: torch.dtype
) -> None:
    case = CASES[name]()
    case.model.to(dtype).train()
    args = tuple(a.to(dtype) for a in case.args)
    before = copy.deepcopy(case.model.state_dict())
    assert prove_channels(case.model, case.axes, args, {}) == (case.axes, ())
    after = case.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(m.training and not m._forward_hooks for m in case.model.modules())
    assert all(p.requires_grad and p.dtype == dtype for p in case.model.parameters())


def test_nothing_to_prove() -> None:
    assert prove_channels(plain().model, (), (), {}) == ((), ())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda axis: without(axis, "3.weight"), r"^cut to 3 channels it does not run \(Runtime"),
        (lambda axis: without(axis, "1.running_var"), "^cut to 3 channels it does not run"),
        (lambda axis: replace(axis, norms=()), "differs from masked by .* relative, float64"),
        (
            lambda axis: replace(axis, taps=(tap("0", offset=9),)),
            "masked down to 3 channels it does not run",
        ),
        (lambda axis: replace(axis, norms=(tap("9"),)), "no module '9'"),
        (
            lambda axis: replace(axis, attributes=(Attribute("3", "groups", axis.name),)),
            "it does not run",
        ),
        (
            lambda axis: replace(axis, slices=(*axis.slices, Slice("4.weight", 0, 1, 0, 1))),
            "it does not run",
        ),
    ],
)
def test_an_axis_at_fault_is_refused_and_the_other_proved(
    spoil: Callable[[Axis], Axis], reason: str
) -> None:
    case = two_blocks()
    first, second = case.axes
    good, refusals = prove_channels(case.model, (spoil(first), second), case.args, {})
    assert good == (second,)
    assert [(r.module, r.kind) for r in refusals] == [("0", "channels")]
    assert re.search(reason, refusals[0].reason)


def test_an_axis_without_effect_is_refused() -> None:
    case = two_blocks()
    with torch.no_grad():
        case.model[3].weight.zero_()
    good, refusals = prove_channels(case.model, case.axes, case.args, {})
    assert good == case.axes[1:]
    assert refusals[0].reason == "masking down to 3 channels has no effect on the input"


def test_an_axis_with_next_to_no_effect_is_proved_with_drawn_values() -> None:
    case = two_blocks()
    with torch.no_grad():
        case.model[3].weight.mul_(1e-12)
    before = copy.deepcopy(case.model.state_dict())
    assert prove_channels(case.model, case.axes, case.args, {}) == (case.axes, ())
    assert all(torch.equal(before[key], value) for key, value in case.model.state_dict().items())
    broken = (without(case.axes[0], "1.weight"), case.axes[1])
    good, refusals = prove_channels(case.model, broken, case.args, {})
    assert good == case.axes[1:]
    assert "no effect on the input, but for next to nothing" in refusals[0].reason


def test_of_two_axes_that_clash_the_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = residual()
    axes = tuple(replace(case.axes[0], name=f"{i}:channels", module=str(i)) for i in range(4))
    tried: list[list[str]] = []

    def disproof(self: Any, together: Sequence[Axis], kept: Any) -> str:
        names = [axis.module for axis in together]
        tried.append(names)
        return "they clash" if {"1", "2"} <= set(names) or "0" in names else ""

    monkeypatch.setattr(proof.Trial, "disproof", disproof)
    good, refusals = prove_channels(case.model, axes, case.args, {})
    assert [axis.module for axis in good] == ["1", "3"]
    assert {r.module: r.reason for r in refusals} == {
        "0": "they clash",
        "2": "beside the channels before it, they clash",
    }
    assert tried[0] == ["0", "1", "2", "3"]
    assert ["1", "2", "3"] in tried


@dataclass
class Outputs:
    logits: Tensor
    extra: tuple[Any, ...] = ()


class Returning(nn.Module):
    """Runs a network and returns its output, or what it finds on the way, in some structure."""

    def __init__(self, net: nn.Module, structure: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net = net
        self.structure = structure

    def forward(self, *, pixels: Tensor, unused: Any = None) -> Any:
        return self.structure(self.net, pixels)


def _inside(axis: Axis) -> Axis:
    moved = move_axis(axis, "net")
    places = {
        name: tuple(replace(t, module=f"net.{t.module}") for t in taps)
        for name, taps in (("taps", axis.taps), ("norms", axis.norms))
    }
    return replace(moved, name=axis.name, attributes=(), **places)


@pytest.mark.parametrize(
    "structure",
    [
        lambda net, x: {"logits": net(x), "none": None, "count": torch.ones(1, dtype=torch.long)},
        lambda net, x: (None, [x, net(x)]),
        lambda net, x: net(x.float()),  # float64 throughout
        lambda net, x: Outputs(net(x).argmax(1), (net(x),)),
        lambda net, x: (net(x), torch.full((2,), -torch.inf), torch.zeros(0)),
    ],
)
def test_every_floating_tensor_of_the_output_is_compared(structure: Callable[..., Any]) -> None:
    case = plain()
    model = Returning(case.model, structure).double().eval()
    axis = _inside(case.axes[0])
    kwargs = {"pixels": case.args[0].float(), "unused": None}
    assert prove_channels(model, [axis], (), kwargs) == ((axis,), ())
    broken = replace(axis, norms=())
    good, refusals = prove_channels(model, [broken], (), kwargs)
    assert not good
    assert "differs from masked by" in refusals[0].reason


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (lambda net, x: (net(x), net[0](x)), "puts out tensors of"),
        (lambda net, x: net(x) * torch.nan, "has no effect"),
        (lambda net, x: net(x).long(), "has no effect"),
        (lambda net, x: net(x.view(torch.int64)), "in float64 it does not run"),
    ],
)
def test_outputs_that_prove_nothing(structure: Callable[..., Any], reason: str) -> None:
    case = plain()
    model = Returning(case.model, structure).double().eval()
    _, refusals = prove_channels(model, [_inside(case.axes[0])], (), {"pixels": case.args[0]})
    assert len(refusals) == 1
    assert reason in refusals[0].reason


def test_rounding_inside_is_tried_on_scaled_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    differences = iter([1e-9, 1e-9, 1e-12])
    monkeypatch.setattr(proof.Trial, "compared", lambda *_, **__: (next(differences), 1.0))
    assert prove_channels(case.model, case.axes, case.args, {}) == (case.axes, ())
    differences = iter([1e-9, 1e-9, 1e-9, *[1e-9] * 3])
    good, refusals = prove_channels(case.model, case.axes, case.args, {})
    assert not good
    assert refusals[0].reason.endswith("differs from masked by 1.0e-09 (eager, relative, float64)")


def test_about_half_of_the_units_stay_in_another_number_for_each_axis() -> None:
    case = plain()
    axes = [
        replace(case.axes[0], name=f"{i}:channels", size=size)
        for i, size in enumerate((1, 2, 3, 32, 32))
    ]
    kept = proof._irregular(axes)
    assert [len(units) for units in kept.values()] == [1, 1, 1, 6, 7]
    assert kept["3:channels"] != kept["4:channels"]
    assert kept == proof._irregular(axes)
    assert all(units == sorted(set(units)) for units in kept.values())


class Reshaped(nn.Module):
    """Reads the number of channels off one tensor to reshape another, as GLPN's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.three, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        two = two.reshape(len(x), one.shape[1], -1).mean(-1)
        return self.last(two) + self.three(one).mean((1, 2, 3))[:, None]


def test_axes_that_must_keep_equal_counts_are_not_proved_as_if_they_were_independent() -> None:
    torch.manual_seed(0)
    model, args = Reshaped().eval(), (torch.randn(2, 3, 4, 4),)
    axes, refusals = prove_channels(model, discover(model, args, {}).channels, args, {})
    assert {axis.module for axis in axes} <= {"three"}
    refused = {refusal.module: refusal.reason for refusal in refusals}
    assert "does not run" in refused["one"]
    assert "does not run" in refused["two"]


# --- whole Transformers models --------------------------------------------------------------------


def resnet(depths: tuple[int, ...] = (2, 1)) -> tuple[transformers.PreTrainedModel, dict]:
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=list(depths), layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


def test_a_model_of_convolutions_only_gets_channels() -> None:
    model, batch = resnet()
    structure = find_structure(model, batch)
    assert {axis.kind for axis in structure.axes} == {Kind.CHANNELS}
    assert len(structure.axes) >= 4
    kept = {axis.name: list(range(0, axis.size, 2)) for axis in structure.axes}
    model.double()
    inputs = {"pixel_values": batch["pixel_values"].double()}
    with torch.no_grad():
        whole = model(**inputs).logits
        with masked(model, structure.axes, kept):
            wanted = model(**inputs).logits
        cut(model, structure.axes, kept)
        found = model(**inputs).logits
    scale = whole.abs().max()
    assert (found - wanted).abs().max() <= 1e-12 * scale
    assert (whole - wanted).abs().max() > 1e-3 * scale


def test_channels_come_after_heads_and_neurons() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 6),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=9,
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    structure = find_structure(model, {"input_values": torch.randn(2, 800)})
    kinds = [axis.kind for axis in structure.axes]
    assert kinds == [Kind.HEADS, Kind.NEURONS, Kind.CHANNELS, Kind.CHANNELS]


def test_a_model_that_gives_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = resnet()
    refusal = Refusal("resnet.embedder", "channels", "the model puts them out")
    for refusals, reason in (
        ((refusal,), r"found 1 modules, .*\(resnet\.embedder channels: the model puts them out\)"),
        ((), "no attention, no FFN, no channels"),
    ):
        found = Discovery((), (), (), refusals, Call((), batch, ()))
        monkeypatch.setattr(models, "discover", lambda *_, found=found: found)
        with pytest.raises(StructureError, match=f"ResNetForImageClassification: .*{reason}"):
            find_structure(model, batch)
