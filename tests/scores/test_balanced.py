"""Scores that weigh rows of gradients by their norm, whatever the batches look like."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from score_examples import assert_equal, build, examples_of, in_batches
from torch import nn

from hf_gradnas.batches.batch import Batch
from hf_gradnas.errors import DataError
from hf_gradnas.masks import out_projection
from hf_gradnas.running.hooks import add_pre_hook
from hf_gradnas.scores import collect_scores, measure, methods
from hf_gradnas.scores.rows import (
    Positions,
    Sequences,
    added,
    block_sums,
    positions_of,
    token_lengths,
)
from hf_gradnas.types import Axis, Kind, Scores, Tap

LONG = 53  # tokens: four rows, the last one short
CAUSAL = ("llama", "opt")  # an OPT's neurons see examples and positions as one dimension
PER_TOKEN = (*CAUSAL, "t5", "bart")


def _position_gradients(model, axes, example) -> dict[str, torch.Tensor]:
    """∂L/∂m of a mask of its own at every position ``(positions, size)``; L is the loss sum."""
    leaves: dict[str, list[torch.Tensor]] = {axis.name: [] for axis in axes}
    with ExitStack() as stack:
        for axis in axes:

            def hook(module, args, axis=axis):
                x = args[0]
                leaf = x.new_ones(x.shape[-2], axis.size).requires_grad_()
                leaves[axis.name].append(leaf)
                return (x * leaf.repeat_interleave(axis.width, 1), *args[1:])

            add_pre_hook(stack, out_projection(model, axis), hook)
        loss = model(**example).loss
    labels = example["labels"]
    shifted = labels[:, 1:] if model.config.model_type in CAUSAL else labels
    loss = loss * (shifted != -100).sum()
    flat = [leaf for found in leaves.values() for leaf in found]
    gradients = iter(torch.autograd.grad(loss, flat))
    return {name: sum(next(gradients) for _ in found) for name, found in leaves.items()}


def _blocks(gradients: torch.Tensor) -> torch.Tensor:
    """Sums over 16 positions ``(rows, size)``."""
    return torch.stack([part.sum(0) for part in gradients.split(16)])


def _by_definition(
    model, axes, examples, *, per_token: bool, power: float
) -> dict[str, torch.Tensor]:
    """½ Σ over rows of (g / ‖g‖^power)², the norm over all axes but KV groups."""
    scores = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    groups = {axis.parent for axis in axes}
    for example in examples:
        found = _position_gradients(model, axes, example)
        rows = {n: _blocks(g) if per_token else g.sum(0)[None] for n, g in found.items()}
        for index in range(max(map(len, rows.values()))):
            row = {n: r[index] for n, r in rows.items() if index < len(r)}
            square = sum(g.square().sum() for n, g in row.items() if n not in groups)
            if not square:  # the last token of a causal model has no label
                continue
            for name, gradient in row.items():
                scores[name] += 0.5 * gradient.square() / square**power
    return scores


def _left_padded(batches):
    """The same batches with their padding on the left, and positions that count from the text."""
    for batch in batches:
        lengths = batch["attention_mask"].sum(1).tolist()
        width = batch["attention_mask"].shape[1]
        turned = {
            name: torch.stack([value[n].roll(width - length) for n, length in enumerate(lengths)])
            for name, value in batch.items()
        }
        turned["labels"][range(len(lengths)), [width - length for length in lengths]] = -100
        turned["position_ids"] = (turned["attention_mask"].cumsum(1) - 1).clamp(min=0)
        yield turned


@pytest.mark.parametrize(
    ("family", "method", "power"),
    [(family, "balanced", 1.0) for family in ("bert", "albert", "llama", "opt", "t5", "bart")]
    + [(family, "tempered", power) for family in ("bert", "llama") for power in (0.0, 0.75)],
)
def test_scores_are_those_of_a_mask_at_every_position(
    family: str, method: str, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MIN_EFFECTIVE_RATIO", 1.01 if power else 0.0)
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        per_token = family in PER_TOKEN
        examples = examples_of(family, 12, longest=LONG if per_token else 14)
        expected = _by_definition(model, axes, examples, per_token=per_token, power=power)
        for size in (1, 8, 32):
            found = collect_scores(model, axes, in_batches(examples, size), method=method)
            assert_equal(found, expected)
        assert found.metadata["method"] == method


def test_padding_on_the_left_changes_nothing() -> None:
    with zoo.float64_throughout():
        model, axes, _ = build("llama")
        examples = examples_of("llama", 12, longest=LONG)
        expected = collect_scores(model, axes, in_batches(examples, 1), method="balanced")
        for size in (5, 12):
            batches = list(_left_padded(in_batches(examples, size)))
            found = collect_scores(model, axes, batches, method="balanced")
            assert_equal(found, dict(expected.values))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_every_row_weighs_the_same(family: str) -> None:
    model, axes, _ = build(family)
    examples = examples_of(family, 6, longest=LONG if family in PER_TOKEN else 14)
    scores = collect_scores(model, axes, in_batches(examples, 3), method="balanced")
    groups = {axis.parent for axis in axes}
    total = sum(scores.values[axis.name].sum() for axis in axes if axis.name not in groups)
    lengths = [example["input_ids"].shape[1] - (family == "llama") for example in examples]
    rows = sum(-(-length // 16) for length in lengths) if family in PER_TOKEN else len(examples)
    assert total == pytest.approx(rows / 2)


def test_a_row_of_zeros_adds_nothing() -> None:
    model, axes, _ = build("llama")
    examples = examples_of("llama", 4, longest=LONG)
    silent = {**examples[0], "labels": torch.full_like(examples[0]["labels"], -100)}
    expected = collect_scores(model, axes, in_batches(examples, 4), method="balanced")
    found = collect_scores(model, axes, in_batches([*examples, silent], 5), method="balanced")
    assert_equal(found, dict(expected.values), rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_sampled_labels_do_not_depend_on_the_batch_size(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        examples = examples_of(family, 12, longest=LONG if family in PER_TOKEN else 14)
        options = {"method": "balanced", "labels": "model"}
        one = collect_scores(model, axes, in_batches(examples, 1), **options)
        for size in (8, 12):
            assert_equal(
                collect_scores(model, axes, in_batches(examples, size), **options),
                dict(one.values),
            )


@pytest.mark.parametrize("options", [{}, {"labels": "model"}], ids=str)
def test_a_batch_of_too_many_rows_is_run_in_parts(options, monkeypatch) -> None:
    model, axes, _ = build("llama")
    batches = in_batches(examples_of("llama", 6, longest=LONG), 6)
    options = {"method": "balanced", "also": ("gradnas", "fisher"), **options}
    expected = collect_scores(model, axes, batches, **options)
    sizes = []

    def note(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))

    rows = -(-batches[0]["input_ids"].shape[1] // 16)
    one_example = rows * sum(axis.size for axis in axes) * model.dtype.itemsize
    monkeypatch.setattr(measure, "MAX_ROW_BYTES", 5 * one_example - 1)
    with model.register_forward_pre_hook(note, with_kwargs=True):
        found = collect_scores(model, axes, batches, **options)
    assert sizes[-2:] == [4, 2]
    monkeypatch.setattr(measure, "MAX_ROW_BYTES", 1)  # an example at least
    least = collect_scores(model, axes, batches, **options)
    for scores in (found, least):
        for method in expected.methods:
            assert_equal(scores.of(method), dict(expected.of(method).values), rtol=1e-5)
        assert scores.metadata["labels_scored"] == expected.metadata["labels_scored"]
        assert float(scores.metadata["loss_sum"]) == pytest.approx(
            float(expected.metadata["loss_sum"])
        )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_other_methods_of_the_same_pass_are_as_alone(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        batches = in_batches(examples_of(family, 8, longest=30), 4)
        joint = collect_scores(
            model, axes, batches, method="balanced", also=("fisher", "taylor", "gradnas")
        )
        for method in joint.methods:
            alone = collect_scores(model, axes, batches, method=method)
            assert_equal(joint.of(method), dict(alone.values))


def test_a_resumed_pass_is_bit_equal(tmp_path: Path) -> None:
    model, axes, _ = build("llama")
    batches = in_batches(examples_of("llama", 12, longest=LONG), 3)
    options = {"method": "balanced", "also": ("fisher",)}
    expected = collect_scores(model, axes, batches, **options)
    file = tmp_path / "scores.safetensors"

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, interrupted(), file=file, **options)
    found = collect_scores(model, axes, batches, file=file, **options)
    assert found.metadata == expected.metadata == Scores.load(file).metadata
    for method in expected.methods:
        for name, values in expected.of(method).values.items():
            assert np.array_equal(found.of(method).values[name], values)


def test_a_row_that_is_not_finite_is_an_error() -> None:
    model, axes, _ = build("bert")
    batch = in_batches(examples_of("bert", 4), 4)

    def break_gradient(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    message = r"a gradient of .* is nan though the loss is finite"
    with (
        model.classifier.register_forward_hook(break_gradient),
        pytest.raises(DataError, match=message),
    ):
        collect_scores(model, axes, batch, method="balanced")


# -- rows of one example where positions are no sequence ------------------------------------------


class _Windows(nn.Module):
    """A sequence model one of whose layers sees windows of four positions as examples."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(input_ids)
        hidden = hidden + self.down(nn.functional.gelu(self.up(hidden)))
        windows = hidden.view(-1, 4, 6)
        windows = windows + self.narrow(nn.functional.gelu(self.wide(windows)))
        logits = self.head(windows.view(hidden.shape))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_one_example_is_one_row_where_any_place_has_no_sequence() -> None:
    torch.manual_seed(0)
    model = _Windows().double()
    axes = [
        Axis("up:neurons", "up", Kind.NEURONS, 8, (), (Tap("down", "input", -1),)),
        Axis("wide:neurons", "wide", Kind.NEURONS, 8, (), (Tap("narrow", "input", -1),)),
    ]
    ids = torch.randint(11, (3, 40))
    batch = {"input_ids": ids, "labels": torch.randint(11, (3, 40))}
    scores = collect_scores(model, axes, [batch], method="balanced")
    assert scores.metadata["normaliser"] == "labels"
    assert sum(values.sum() for values in scores.values.values()) == pytest.approx(3 / 2)
    alone = collect_scores(model, axes[:1], [batch], method="balanced")
    assert sum(values.sum() for values in alone.values.values()) == pytest.approx(3 * 3 / 2)


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 50])
def test_sums_of_blocks(length: int) -> None:
    values = torch.randn(3, length, 2, dtype=torch.float64)
    expected = torch.stack([_blocks(example) for example in values])
    assert torch.allclose(block_sums(values), expected)
    starts = [0, length // 2, length - 1]
    shifted = block_sums(values, starts)
    assert shifted.shape == expected.shape
    for example, start, found in zip(values, starts, shifted, strict=True):
        own = _blocks(example[start:])
        own[0] += example[:start].sum(0)
        assert torch.allclose(found[: len(own)], own)
        assert not found[len(own) :].any()


def test_sums_of_different_lengths_add_up() -> None:
    one, other = torch.ones(2, 3, 4), torch.ones(2, 1, 4, dtype=torch.float64)
    for pair in ((one.clone(), other.clone()), (other.clone(), one.clone())):
        assert added(*pair)[:, :, 0].tolist() == [[2.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("length", "is_exact", "shape", "found"),
    [
        (20, False, (4, 20, 8), 20),
        (20, False, (80, 8), 20),
        (20, False, (4, 32, 8), 32),  # padded by the model
        (20, True, (4, 32, 8), None),  # pictures
        (20, False, (4, 10, 8), None),  # pooled
        (20, False, (8, 10, 8), None),  # windows
        (20, False, (4, 2, 20, 8), None),
        (20, False, (81, 8), None),
        (None, True, (4, 9, 8), 9),
    ],
)
def test_positions_are_a_sequence_or_not(length, is_exact, shape, found) -> None:
    assert Sequences(length, (), is_exact).positions_in(shape, 4) == found


def _batch(**columns) -> Batch:
    return Batch(0, columns, 2, tuple({"labels"} & columns.keys()))


def test_columns_tell_the_sequences() -> None:
    model, _, _ = build("llama")
    ids, mask = torch.ones(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.long)
    assert positions_of(model, _batch(input_ids=ids)) == _same(Sequences(20))
    mask[1, :5] = 0
    found = positions_of(model, _batch(input_ids=ids, attention_mask=mask))
    assert found is not None
    assert found.own == Sequences(20, (0, 5))
    assert found.rows == 2
    pixels = torch.zeros(2, 3, 4, 4)
    found = positions_of(model, _batch(input_ids=ids, pixel_values=pixels))
    assert found is not None
    assert found.own.is_exact
    embeddings = torch.zeros(2, 7, 4)
    found = positions_of(model, _batch(inputs_embeds=embeddings))
    assert found is not None
    assert found.own == Sequences(7)
    assert positions_of(model, _batch(pixel_values=pixels)) is None
    assert token_lengths({"input_ids": ids, "decoder_inputs_embeds": embeddings}) == {20, 7}


class _same:
    """Equal to positions of one sequence."""

    def __init__(self, own: Sequences) -> None:
        self.own = own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Positions) and other.own == self.own and other.encoder is None

    __hash__ = None  # type: ignore[assignment]


def test_an_encoder_and_a_decoder_have_sequences_of_their_own() -> None:
    model, _, _ = build("t5")
    ids, labels = torch.ones(2, 20, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    found = positions_of(model, _batch(input_ids=ids, labels=labels))
    assert found is not None
    assert (found.own.length, found.encoder.length, found.rows) == (6, 20, 2)
    inside, outside = model.encoder.block[0], model.decoder.block[0]
    assert found.sums(inside, torch.ones(2, 20, 3), 2).shape == (2, 2, 3)
    assert found.sums(outside, torch.ones(2, 6, 3), 2).shape == (2, 1, 3)
    found = positions_of(model, _batch(input_ids=ids, decoder_input_ids=labels))
    assert found is not None
    assert found.own.length == 6
    found = positions_of(model, _batch(input_ids=ids))
    assert found is not None
    assert found.own.length == 20
    sound = torch.zeros(2, 80, 100)
    assert positions_of(model, _batch(input_features=sound)) is None
    found = positions_of(model, _batch(input_features=sound, labels=labels))
    assert found is not None
    assert found.encoder == Sequences(None, (), True)
