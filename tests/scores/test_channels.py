"""Scores of channels: gradients of masks on the outputs of all layers that produce them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
import zoo
from channel_score_nets import CASES, EXAMPLES, Net, axis_of, build, in_batches, tap_of
from score_examples import assert_equal
from torch import Tensor, nn

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import mask_leaves
from hf_gradnas.scores import collect_scores, methods
from hf_gradnas.scores.fingerprints import axes_fingerprint
from hf_gradnas.scores.gradients import GradientRecorder
from hf_gradnas.types import Axis, Kind, Slice, Tap

# -- the definition -------------------------------------------------------------------------------


@contextmanager
def _leaves(model: nn.Module, axes: Iterable[Axis]) -> Iterator[dict[str, Tensor]]:
    """A mask of ones per axis, multiplied at every tap."""
    leaves, handles = {}, []
    for axis in axes:
        leaf = leaves[axis.name] = torch.ones(axis.size, dtype=torch.float64, requires_grad=True)
        for tap in axis.taps:
            rows = torch.tensor(tap.rows(range(axis.size)))

            def multiply(module, args, output, leaf=leaf, tap=tap, rows=rows):
                mask = output.new_ones(output.shape[tap.dim])
                mask = mask.index_copy(0, rows, leaf.repeat_interleave(tap.width))
                shape = [1] * output.dim()
                shape[tap.dim] = -1
                return output * mask.view(shape)

            handles.append(model.get_submodule(tap.module).register_forward_hook(multiply))
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _by_definition(
    model: nn.Module, axes: list[Axis], examples: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """∂L_n/∂m of every mask ``(examples, size)``, each example alone."""
    rows = []
    for example in examples:
        with _leaves(model, axes) as leaves:
            loss = model(**example)["loss"]
            rows.append(torch.autograd.grad(loss, list(leaves.values())))
    return {axis.name: torch.stack([row[index] for row in rows]) for index, axis in enumerate(axes)}


def _recorded(
    model: nn.Module, axes: list[Axis], batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Gradients from the recorder, and how many passes it asked for."""
    recorder, passes, found = GradientRecorder(model, axes), 0, None
    model.requires_grad_(False)
    with recorder.attached():
        while found is None:
            recorder.start(EXAMPLES)
            (model(**batch)["loss"] * EXAMPLES).backward()
            found = recorder.gradients()
            passes += 1
    return found, passes


@pytest.mark.parametrize("case", CASES)
def test_recorded_gradients_are_those_of_explicit_masks(case: str) -> None:
    model, axes, batch = build(case)
    expected = _by_definition(model, axes, in_batches(batch, 1))
    found, passes = _recorded(model, axes, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-13), name
    with mask_leaves(model, axes) as leaves:
        loss = model(**batch)["loss"] * EXAMPLES
        for name, total in zip(
            leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True
        ):
            assert torch.allclose(found[name].sum(0), total, rtol=1e-10, atol=1e-13), name
    # Networks that write over a producer's output run once more; a ReLU after a norm does not, nor
    # do layers that run again in the backward, whose outputs are copied.
    assert passes == (2 if case in ("overwritten", "plain", "twice") else 1)


@pytest.mark.parametrize("case", CASES)
def test_recorded_gradients_are_finite_differences(case: str) -> None:
    model, axes, batch = build(case)
    found, _ = _recorded(model, axes, batch)
    step = 1e-6
    with _leaves(model, axes) as leaves, torch.no_grad():
        for name, leaf in leaves.items():
            for unit in range(len(leaf)):
                losses = []
                for value in (1 + step, 1 - step):
                    leaf[unit] = value
                    losses.append(float(model(**batch)["loss"]) * EXAMPLES)
                leaf[unit] = 1.0
                slope = (losses[0] - losses[1]) / (2 * step)
                expected = float(found[name][:, unit].sum())
                assert math.isclose(slope, expected, rel_tol=1e-5, abs_tol=1e-7), (name, unit)


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_the_batch_size(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, axes, batch = build(case)
    explicit = _by_definition(model, axes, in_batches(batch, 1))
    fisher = {name: gradient.square().sum(0) for name, gradient in explicit.items()}
    for size in (1, 4, EXAMPLES):
        assert_equal(collect_scores(model, axes, in_batches(batch, size)), fisher)
    norms = sum(gradient.square().sum(1, keepdim=True) for gradient in explicit.values())
    balanced = {name: (g.square() / norms).sum(0) / 2 for name, g in explicit.items()}
    for size in (1, 4, EXAMPLES):
        scores = collect_scores(model, axes, in_batches(batch, size), method="balanced")
        assert_equal(scores, balanced)
    tempered = {n: (g / norms**0.375).square().sum(0) / 2 for n, g in explicit.items()}
    monkeypatch.setattr(methods, "MIN_EFFECTIVE_RATIO", 1.01)
    assert_equal(collect_scores(model, axes, in_batches(batch, 4), method="tempered"), tempered)
    scores = collect_scores(model, axes, in_batches(batch, 4), method="gradnas")
    batches = {name: g.view(2, 4, -1).mean(1).square().sum(0) for name, g in explicit.items()}
    assert_equal(scores, batches)


def test_outputs_that_nothing_overwrites_are_not_copied() -> None:
    model, axes, batch = build("residual")
    seen = []
    model.layers["outer"].register_forward_hook(lambda *args: seen.append(args[2].data_ptr()))
    recorder = GradientRecorder(model, axes)
    with recorder.attached():
        recorder.start(EXAMPLES)
        loss = model(**batch)["loss"]
        kept = {k.site.path: k.values.data_ptr() for k in recorder._outputs.values()}
        assert kept["layers.outer"] == seen[0]
        loss.backward()
        assert not recorder._outputs


def test_an_axis_that_the_loss_does_not_depend_on_has_gradients_of_zero() -> None:
    model, axes, batch = build("plain")
    model.layers["unused"] = nn.Conv2d(1, 2, 1)
    model.body = lambda x, unused, **layers: Net.body(model, x, **layers)
    found, _ = _recorded(model, [*axes, axis_of(2, tap_of("layers.unused"))], batch)
    assert torch.equal(found["layers.unused:channels"], torch.zeros(EXAMPLES, 2).double())


# -- what does not fit ----------------------------------------------------------------------------


class _Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (super().forward(x),) * 2


class _First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


@pytest.mark.parametrize(
    ("layer", "axis", "message"),
    [
        (
            _Pair(2, 4, 1),
            axis_of(4, tap_of("layers.one")),
            "layers.one returned a tuple, but channels",
        ),
        (
            nn.Conv2d(2, 4, 1),
            axis_of(4, tap_of("layers.gone")),
            "layers.gone:channels: Net has no module 'layers.gone'; use the axes",
        ),
        (
            nn.Conv2d(2, 4, 1),
            axis_of(2, tap_of("layers.one", width=2, offset=1)),
            r"the output of layers.one holds 4 values in dimension 1, .* of 2 that reach to 5",
        ),
        (
            nn.Conv2d(2, 4, 1),
            axis_of(4, tap_of("layers.one", dim=-4)),
            r"the shape \(8, 4, 3, 3\), needed is a dimension -4 after one",
        ),
        (
            nn.Conv2d(2, 4, 1),
            axis_of(3, tap_of("layers.one", dim=4)),
            r"the shape \(8, 4, 3, 3\), needed is a dimension 4 after one",
        ),
    ],
)
def test_outputs_that_do_not_hold_the_axis_are_named(layer, axis: Axis, message: str) -> None:
    model = Net(36, one=layer, two=_First() if type(layer) is _Pair else nn.Identity()).double()
    batch = {"x": torch.randn(EXAMPLES, 2, 3, 3).double(), "labels": torch.zeros(EXAMPLES).long()}
    with pytest.raises(StructureError, match=message):
        collect_scores(model, [axis], [batch])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_belong_to_no_example_are_refused() -> None:
    model, axes, batch = build("plain")
    recorder = GradientRecorder(model, axes)
    with recorder.attached():
        recorder.start(3)
        with pytest.raises(
            StructureError, match=r"the output of layers\.one has 8 rows, which is no"
        ):
            model(**batch)


# -- what is recorded beside the scores -----------------------------------------------------------


def test_scores_name_the_places_of_their_masks() -> None:
    model, axes, batch = build("plain")
    neurons = Axis("ffn:neurons", "ffn", Kind.NEURONS, 6, (), (Tap("layers.fc", "input", -1),))
    places = {
        "out_projection_input": [neurons],
        "out_projection_input,producer_output": [*axes, neurons],
        "producer_output": axes,
    }
    for place, chosen in places.items():
        assert collect_scores(model, chosen, [batch]).metadata["mask_place"] == place


def test_a_fingerprint_of_axes_depends_on_taps_and_stays_for_axes_without() -> None:
    _, axes, _ = build("grouped")
    one = axes[0]
    other = replace(one, taps=(one.taps[0], replace(one.taps[1], offset=2)))
    assert axes_fingerprint([one]) != axes_fingerprint([other])
    assert axes_fingerprint([one]) != axes_fingerprint([replace(one, taps=one.taps[:1])])
    assert axes_fingerprint([one]) == axes_fingerprint([replace(one, slices=(Slice("a", 0),))])
    neurons = Axis("ffn:neurons", "ffn", Kind.NEURONS, 6, (), (Tap("layers.fc", "input", -1),))
    places = json.dumps([["ffn:neurons", 6, "layers.fc", 1]])
    assert axes_fingerprint([neurons]) == hashlib.sha256(places.encode()).hexdigest()


def test_magnitude_of_channels_counts_parameters_and_no_statistics() -> None:
    model, axes, _ = build("plain")
    slices = (
        Slice("layers.one.weight", 0),
        Slice("layers.one.bias", 0),
        *(Slice(f"layers.norm.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")),
        Slice("layers.two.weight", 1),
    )
    axis = replace(axes[0], slices=slices)
    found = collect_scores(model, [axis], [], method="magnitude").values[axis.name]
    one, norm, two = (model.layers[name] for name in ("one", "norm", "two"))
    expected = one.weight.square().sum((1, 2, 3)) + one.bias.square()
    expected += norm.weight.square() + norm.bias.square() + two.weight.square().sum((0, 2, 3))
    assert np.allclose(found, expected.detach().numpy(), rtol=1e-12)
    # Positions in groups: rows at several offsets, each once.
    grouped, (positions, *_), _ = build("grouped")
    parts = tuple(Slice("layers.one.weight", 0, 1, offset) for offset in (0, 3))
    axis = replace(positions, slices=parts)
    found = collect_scores(grouped, [axis], [], method="magnitude").values[axis.name]
    weight = grouped.layers["one"].weight.detach()
    assert np.allclose(found, weight.view(2, 3, -1).square().sum((0, 2)).numpy(), rtol=1e-12)


# -- Transformers' convolutional models -----------------------------------------------------------


def _resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[1, 2], layer_type="bottleneck", num_labels=3
    )
    pixels = torch.randn(EXAMPLES, 3, 16, 16).double()
    labels = torch.randint(3, (EXAMPLES,))
    return transformers.ResNetForImageClassification(config), {
        "pixel_values": pixels,
        "labels": labels,
    }


def _wav2vec2(reduction: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Wav2Vec2Config(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(6, 6),
        conv_kernel=(5, 3),
        conv_stride=(3, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        ctc_loss_reduction=reduction,
    )
    labels = torch.randint(1, 7, (EXAMPLES, 5))
    labels[1::2, 3:] = -100
    values = torch.randn(EXAMPLES, 120).double()
    return transformers.Wav2Vec2ForCTC(config), {"input_values": values, "labels": labels}


@pytest.mark.parametrize(
    ("make", "normaliser"),
    [
        (_resnet, "examples"),
        (partial(_wav2vec2, "sum"), "sum"),
        (partial(_wav2vec2, "mean"), "examples"),
    ],
    ids=["resnet", "wav2vec2-sum", "wav2vec2-mean"],
)
def test_models_of_transformers_without_attention_or_with_both(make, normaliser: str) -> None:
    model, batch = make()
    model = model.double().train()
    axes = [
        axis_of(layer.out_channels, tap_of(path))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d)
    ]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with zoo.float64_throughout():
        scores = [collect_scores(model, axes, in_batches(batch, size)) for size in (1, 4, EXAMPLES)]
        assert all(module.training for module in model.modules())
        explicit = _by_definition(model.eval(), axes, in_batches(batch, 1))
    fisher = {name: gradient.square().sum(0) for name, gradient in explicit.items()}
    for found in scores:
        assert_equal(found, fisher)
        assert found.metadata["normaliser"] == normaliser
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(values.any() for values in scores[0].values.values())
