"""Scores are sums over examples of the masks' gradients, whatever the batches look like."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import zoo
from score_examples import assert_equal, build, examples_of, in_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_gradnas.errors import ScoresError, StructureError
from hf_gradnas.masks import mask_leaves
from hf_gradnas.scores import METHODS, collect_scores, gradients, products
from hf_gradnas.types import Axis, Kind, Tap

TOKEN_LABELS = {"llama": lambda labels: labels[:, 1:], "t5": lambda labels: labels}


def _gradients_by_definition(family, model, axes, examples) -> dict[str, torch.Tensor]:
    """∂L_n/∂m of every mask ``(examples, size)``, each example alone, L_n its loss sum."""
    rows = []
    for example in examples:
        labels = example["labels"]
        count = TOKEN_LABELS[family](labels).numel() if family in TOKEN_LABELS else 1
        with mask_leaves(model, axes) as leaves:
            loss = model(**example).loss * count
            rows.append(torch.autograd.grad(loss, list(leaves.values())))
    return {axis.name: torch.stack([row[index] for row in rows]) for index, axis in enumerate(axes)}


# -- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "albert"])
def test_scores_are_those_of_explicit_masks_at_every_batch_size(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        examples = examples_of(family)
        explicit = _gradients_by_definition(family, model, axes, examples)
        fisher = {name: g.square().sum(0) for name, g in explicit.items()}
        taylor = {name: g.abs().sum(0) for name, g in explicit.items()}
        for size in (1, 8, 32):
            batches = in_batches(examples, size)
            assert_equal(collect_scores(model, axes, batches), fisher)
        assert_equal(collect_scores(model, axes, batches, method="taylor"), taylor)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fisher_of_a_model_as_it_is_does_not_depend_on_the_batch_size(family: str) -> None:
    # Llama and T5 round to float32 inside, and which way depends on the CPU's kernels; without
    # that rounding the scores agree to 1e-9, see above.
    rtol = 1e-9 if family == "bert" else 1e-6
    model, axes, _ = build(family)
    examples = examples_of(family)
    one = collect_scores(model, axes, in_batches(examples, 1))
    for size in (8, 32):
        many = collect_scores(model, axes, in_batches(examples, size))
        assert_equal(many, dict(one.values), rtol)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradnas_is_the_squared_gradient_of_each_batch_loss(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        batches = in_batches(examples_of(family), 8)
        expected = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        for batch in batches:
            with mask_leaves(model, axes) as leaves:
                found = torch.autograd.grad(model(**batch).loss, list(leaves.values()))
            for name, gradient in zip(leaves, found, strict=True):
                expected[name] += gradient.square()
        assert_equal(collect_scores(model, axes, batches, method="gradnas"), expected)


@pytest.mark.parametrize("method", ["fisher", "taylor"])
def test_a_kv_group_is_scored_jointly(method: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build("llama")
        examples = examples_of("llama", 8)
        explicit = _gradients_by_definition("llama", model, axes, examples)
        scores = collect_scores(model, axes, in_batches(examples, 4), method=method)
    for heads in (axis for axis in axes if axis.parent):
        joint = explicit[heads.name].view(8, scores.values[heads.parent].size, -1).sum(2)
        expected = joint.square() if method == "fisher" else joint.abs()
        assert np.allclose(scores.values[heads.parent], expected.sum(0), rtol=1e-9)
        assert not np.allclose(
            scores.values[heads.parent],
            scores.values[heads.name].reshape(joint.shape[1], -1).sum(1),
        )


def test_magnitude_is_the_norm_of_all_that_goes_with_a_unit() -> None:
    model, axes, _ = build("llama")
    scores = collect_scores(model, axes, [], method="magnitude")
    assert scores.metadata["examples"] == "0"
    parts = {name: weight.detach() for name, weight in model.named_parameters()}
    layer = "model.layers.0."
    neurons = [parts[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    expected = sum(weight.square().sum(1) for weight in neurons)
    expected += parts[f"{layer}mlp.down_proj.weight"].square().sum(0)
    name = next(a.name for a in axes if a.kind is Kind.NEURONS and a.name.startswith(layer))
    assert np.allclose(scores.values[name], expected)
    attention = sum(
        float(parts[f"{layer}self_attn.{part}_proj.weight"].square().sum()) for part in "qkvo"
    )
    groups = next(axis.name for axis in axes if axis.kind is Kind.KV_GROUPS)
    assert scores.values[groups].sum() == pytest.approx(attention)


def test_random_depends_on_seed_and_name_only() -> None:
    model, axes, _ = build("bert")
    one, again, other = (
        collect_scores(model, part, [], method="random", seed=seed).values
        for part, seed in ((axes, 0), (axes[2:], 0), (axes, 1))
    )
    assert all(np.array_equal(again[axis.name], one[axis.name]) for axis in axes[2:])
    assert not np.array_equal(one[axes[0].name], other[axes[0].name])
    assert not np.array_equal(one[axes[0].name], one[axes[2].name])


def test_methods_are_listed() -> None:
    assert list(METHODS) == [
        "tempered",
        "balanced",
        "fisher",
        "gradnas",
        "taylor",
        "magnitude",
        "random",
    ]
    model, axes, inputs = build("bert")
    with pytest.raises(ScoresError, match="method='wanda' is not known; choose one of tempered"):
        collect_scores(model, axes, [inputs], method="wanda")
    with pytest.raises(ScoresError, match="labels='none' is not known; choose one of data, model"):
        collect_scores(model, axes, [inputs], labels="none")


# -- how the gradients are taken ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_input_is_the_kept_one(family: str, dtype: torch.dtype, monkeypatch) -> None:
    model, axes, inputs = build(family, dtype=dtype, attn="sdpa")
    replayed = collect_scores(model, axes, [inputs])
    monkeypatch.setattr(products, "REPLAYS", {})
    kept = collect_scores(model, axes, [inputs])
    for axis in axes:
        assert np.array_equal(replayed.values[axis.name], kept.values[axis.name]), axis.name
        assert kept.values[axis.name].dtype == np.float64


def test_inputs_that_autograd_keeps_are_not_kept_twice(monkeypatch) -> None:
    model, axes, inputs = build("bert")
    made, own = [], products.product_with
    monkeypatch.setattr(products, "product_with", lambda x: made.append(own(x)) or made[-1])
    recorder = gradients.GradientRecorder(model, axes)
    model.requires_grad_(False)
    with recorder.attached():
        recorder.start(zoo.BATCH)
        model(**inputs)
        functions = [product.func for product in made]
        assert functions.count(products._replay) == 3  # the GELU before each layer's neurons
        assert functions.count(products.multiply) == 3  # the attentions
    model.requires_grad_(True)


def _noted(made: list[torch.Tensor], own, x: torch.Tensor):
    made.append(x)
    return own(x)


def test_inputs_that_are_kept_for_their_weights_are_not_made_again(monkeypatch) -> None:
    with zoo.float64_throughout():
        model, axes, inputs = build("bert")
        found = {}
        for name, is_trained in (("frozen", False), ("trained", True)):
            made: list[torch.Tensor] = []
            own = products.product_with
            watch = partial(_noted, made, own)
            monkeypatch.setattr(products, "product_with", watch)
            recorder = gradients.GradientRecorder(model, axes)
            model.requires_grad_(is_trained)
            with recorder.attached():
                recorder.start(zoo.BATCH)
                model(**inputs).loss.backward()
                found[name] = recorder.gradients()
                again = recorder.gradients()
            monkeypatch.undo()
            assert len(made) == (0 if is_trained else 6)
            assert all(torch.equal(again[key], value) for key, value in found[name].items())
        model.zero_grad()
    for key, value in found["frozen"].items():
        assert torch.equal(found["trained"][key], value), key


def test_autograd_keeps_an_input_for_weights_that_train_alone() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    assert products.keeps_input(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.keeps_input(layer, x)  # it keeps a copy in bfloat16
        assert products.keeps_input(layer, x.bfloat16())
    assert not products.keeps_input(layer.requires_grad_(False), x)


class _Block(nn.Module):
    """Two residual FFN calls of one shared layer, whose input is flattened and read twice."""

    def __init__(self, *, checkpointed: bool, reads: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.checkpointed, self.reads = checkpointed, reads

    def _ffn(self, hidden: torch.Tensor) -> torch.Tensor:
        inside = nn.functional.gelu(self.up(hidden))
        return (
            hidden + sum(self.down(inside) for _ in range(self.reads)) + inside.sum(-1)[..., None]
        )

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(input_ids).flatten(0, 1)
        for _ in range(2):
            if self.checkpointed:
                hidden = checkpoint(self._ffn, hidden, use_reentrant=False)
            else:
                hidden = self._ffn(hidden)
        logits = hidden.view(*input_ids.shape, -1).mean(1)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("reads", [1, 2])
def test_shared_layers_flat_inputs_second_readers_and_checkpoints(checkpointed, reads) -> None:
    model = _Block(checkpointed=checkpointed, reads=reads).double()
    axis = Axis(":neurons", "", Kind.NEURONS, 8, (), (Tap("down", "input", -1),))
    batch = {"input_ids": torch.randint(11, (4, 5)), "labels": torch.randint(6, (4,))}
    scores = collect_scores(model, [axis], [batch])
    expected = torch.zeros(8, dtype=torch.float64)
    for row in range(4):
        with mask_leaves(model, [axis]) as leaves:
            loss = model(**{key: value[row : row + 1] for key, value in batch.items()})["loss"]
            expected += torch.autograd.grad(loss, leaves[axis.name])[0].square()
    assert np.allclose(scores.values[axis.name], expected, rtol=1e-12)


def test_rows_that_belong_to_no_example_are_refused() -> None:
    model = _Block(checkpointed=False).double()
    axis = Axis("ffn:neurons", "ffn", Kind.NEURONS, 8, (), (Tap("down", "input", -1),))
    recorder = gradients.GradientRecorder(model, [axis])
    with recorder.attached():
        recorder.start(3)
        with pytest.raises(StructureError, match="5 rows, which is no multiple of the 3 examples"):
            model.down(torch.zeros(5, 8, dtype=torch.float64))


# -- the model is left as it was ------------------------------------------------------------------


@pytest.mark.leaves_state
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_and_no_gradient_allocated(fails: bool) -> None:
    model, axes, inputs = build("llama")
    model.model.layers[1].train()
    model.lm_head.requires_grad_(False)
    before = _state(model)
    seen = []

    def batches():
        yield inputs
        seen.append((_state(model), torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("on purpose")

    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                collect_scores(model, axes, batches())
        else:
            collect_scores(model, axes, batches())
        assert not torch.is_grad_enabled()
    during, is_enabled = seen[0]
    assert is_enabled
    assert not any(during["requires_grad"])
    assert not any(during["training"])
    assert not during["use_cache"]
    assert _state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def _state(model) -> dict:
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()]
        if all(p.requires_grad is False for p in model.parameters()) is False
        else None,
        "use_cache": model.config.use_cache,
    }


def test_scoring_works_inside_inference_mode() -> None:
    model, axes, inputs = build("bert")
    expected = collect_scores(model, axes, [inputs])
    with torch.inference_mode():
        found = collect_scores(model, axes, [inputs])
    assert_equal(found, dict(expected.values), rtol=0)
