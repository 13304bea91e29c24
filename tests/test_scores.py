"""Scores are sums over examples of the masks' gradients, whatever the batches look like."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_gradnas.errors import DataError, GradNASWarning, ScoresError, StructureError
from hf_gradnas.masks import mask_leaves
from hf_gradnas.scores import METHODS, collect_scores, gradients
from hf_gradnas.types import Axis, Kind
from hf_gradnas.verification import find_structure

EXAMPLES = 32
IGNORED = -100
TOKEN_LABELS = {"llama": lambda labels: labels[:, 1:], "t5": lambda labels: labels}


def _build(family: str, **kwargs):
    model, inputs = zoo.build(family, **kwargs)
    return model, find_structure(model, inputs).axes, inputs


def _examples(family: str, count: int = EXAMPLES) -> list[dict[str, torch.Tensor]]:
    """Unpadded examples of mixed lengths, each a batch of one."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in torch.randint(4, 14, (count,), generator=generator).tolist():
        ids = torch.randint(3, zoo.VOCAB, (1, length), generator=generator)
        target = torch.randint(3, zoo.VOCAB, (1, 2 + length // 2), generator=generator)
        classes = torch.randint(0, zoo.LABELS, (1,), generator=generator)
        labels = {"t5": target, "llama": ids}.get(family, classes)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def _batches(examples, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of examples, padded on the right to the longest of each."""
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        ids = _padded([example["input_ids"] for example in part], 0)
        mask = _padded([torch.ones_like(example["input_ids"]) for example in part], 0)
        labels = [example["labels"] for example in part]
        joined = _padded(labels, IGNORED) if labels[0].dim() > 1 else torch.cat(labels)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": joined})
    return batches


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence([row[0] for row in rows], True, value)


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


def _assert_equal(found, expected, rtol: float = 1e-9) -> None:
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        values = np.asarray(value)
        assert np.abs(found.values[name] - values).max() <= rtol * np.abs(values).max(), name


# -- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "albert"])
def test_scores_are_those_of_explicit_masks_at_every_batch_size(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = _build(family)
        examples = _examples(family)
        explicit = _gradients_by_definition(family, model, axes, examples)
        fisher = {name: g.square().sum(0) for name, g in explicit.items()}
        taylor = {name: g.abs().sum(0) for name, g in explicit.items()}
        for size in (1, 8, 32):
            batches = _batches(examples, size)
            _assert_equal(collect_scores(model, axes, batches), fisher)
        _assert_equal(collect_scores(model, axes, batches, method="taylor"), taylor)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fisher_of_a_model_as_it_is_does_not_depend_on_the_batch_size(family: str) -> None:
    model, axes, _ = _build(family)
    examples = _examples(family)
    one = collect_scores(model, axes, _batches(examples, 1))
    for size in (8, 32):
        _assert_equal(collect_scores(model, axes, _batches(examples, size)), dict(one.values))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradnas_is_the_squared_gradient_of_each_batch_loss(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = _build(family)
        batches = _batches(_examples(family), 8)
        expected = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        for batch in batches:
            with mask_leaves(model, axes) as leaves:
                found = torch.autograd.grad(model(**batch).loss, list(leaves.values()))
            for name, gradient in zip(leaves, found, strict=True):
                expected[name] += gradient.square()
        _assert_equal(collect_scores(model, axes, batches, method="gradnas"), expected)


@pytest.mark.parametrize("method", ["fisher", "taylor"])
def test_a_kv_group_is_scored_jointly(method: str) -> None:
    with zoo.float64_throughout():
        model, axes, _ = _build("llama")
        examples = _examples("llama", 8)
        explicit = _gradients_by_definition("llama", model, axes, examples)
        scores = collect_scores(model, axes, _batches(examples, 4), method=method)
    for heads in (axis for axis in axes if axis.parent):
        joint = explicit[heads.name].view(8, scores.values[heads.parent].size, -1).sum(2)
        expected = joint.square() if method == "fisher" else joint.abs()
        assert np.allclose(scores.values[heads.parent], expected.sum(0), rtol=1e-9)
        assert not np.allclose(
            scores.values[heads.parent],
            scores.values[heads.name].reshape(joint.shape[1], -1).sum(1),
        )


def test_magnitude_is_the_norm_of_all_that_goes_with_a_unit() -> None:
    model, axes, _ = _build("llama")
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
    model, axes, _ = _build("bert")
    one, again, other = (
        collect_scores(model, part, [], method="random", seed=seed).values
        for part, seed in ((axes, 0), (axes[2:], 0), (axes, 1))
    )
    assert all(np.array_equal(again[axis.name], one[axis.name]) for axis in axes[2:])
    assert not np.array_equal(one[axes[0].name], other[axes[0].name])
    assert not np.array_equal(one[axes[0].name], one[axes[2].name])


def test_methods_are_listed() -> None:
    assert list(METHODS) == ["fisher", "gradnas", "taylor", "magnitude", "random"]
    model, axes, inputs = _build("bert")
    with pytest.raises(ScoresError, match="method='wanda' is not known; choose one of fisher"):
        collect_scores(model, axes, [inputs], method="wanda")
    with pytest.raises(ScoresError, match="labels='none' is not known; choose one of data, model"):
        collect_scores(model, axes, [inputs], labels="none")


# -- how the gradients are taken ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_input_is_the_kept_one(family: str, dtype: torch.dtype, monkeypatch) -> None:
    model, axes, inputs = _build(family, dtype=dtype, attn="sdpa")
    replayed = collect_scores(model, axes, [inputs])
    monkeypatch.setattr(gradients, "REPLAYS", {})
    kept = collect_scores(model, axes, [inputs])
    for axis in axes:
        assert np.array_equal(replayed.values[axis.name], kept.values[axis.name]), axis.name
        assert kept.values[axis.name].dtype == np.float64


def test_inputs_that_autograd_keeps_are_not_kept_twice() -> None:
    model, axes, inputs = _build("bert")
    recorder = gradients.GradientRecorder(model, axes)
    model.requires_grad_(False)
    with recorder.attached():
        recorder.start(zoo.BATCH)
        model(**inputs)
        kept = [take.__name__ for take in recorder._inputs.values() if hasattr(take, "__name__")]
        assert len(recorder._inputs) == 6
        assert len(kept) == 3  # the attentions; the neurons' GELU is replayed
    model.requires_grad_(True)


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
    axis = Axis(":neurons", "", Kind.NEURONS, 8, "down", 1, ())
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
    axis = Axis("ffn:neurons", "ffn", Kind.NEURONS, 8, "down", 1, ())
    recorder = gradients.GradientRecorder(model, [axis])
    with recorder.attached():
        recorder.start(3)
        with pytest.raises(StructureError, match="5 rows, which is no multiple of the 3 examples"):
            model.down(torch.zeros(5, 8, dtype=torch.float64))


# -- the model is left as it was ------------------------------------------------------------------


@pytest.mark.leaves_state
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_and_no_gradient_allocated(fails: bool) -> None:
    model, axes, inputs = _build("llama")
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
    model, axes, inputs = _build("bert")
    expected = collect_scores(model, axes, [inputs])
    with torch.inference_mode():
        found = collect_scores(model, axes, [inputs])
    _assert_equal(found, dict(expected.values), rtol=0)


# -- data -----------------------------------------------------------------------------------------


def test_exactly_the_first_examples_are_scored() -> None:
    model, axes, _ = _build("llama")
    examples = _examples("llama", 12)
    seen = []
    found = collect_scores(
        model,
        axes,
        _batches(examples, 5),
        num_examples=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(5, 7), (7, 7)]
    assert found.metadata["examples"] == "7"
    expected = collect_scores(model, axes, _batches(examples[:7], 7))
    _assert_equal(found, dict(expected.values))


def test_an_example_without_labels_counts_nothing_at_any_batch_size() -> None:
    model, axes, _ = _build("llama")
    examples = _examples("llama", 6)
    examples[0]["labels"] = torch.full_like(examples[0]["labels"], IGNORED)
    one = collect_scores(model, axes, _batches(examples, 1))
    _assert_equal(collect_scores(model, axes, _batches(examples, 6)), dict(one.values))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "The loader yields no batch"),
        ([(1, 2)], "Batch 0 is a tuple, needed a dict"),
        ([{"input_ids": torch.ones(0, 3, dtype=torch.long)}], "Batch 0 holds no example"),
        ([{"text": ["a"]}], r"Batch 0 holds no example \(columns \['text'\]\)"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long)}],
            r'no labels \(columns: input_ids\).*BertForSequenceClassification.*labels="model"',
        ),
    ],
)
def test_batches_that_cannot_be_scored(batches, message: str) -> None:
    model, axes, _ = _build("bert")
    with pytest.raises(DataError, match=message):
        collect_scores(model, axes, batches)


def test_no_examples_asked_for() -> None:
    model, axes, inputs = _build("bert")
    with pytest.raises(DataError, match="num_examples=0: nothing to score"):
        collect_scores(model, axes, [inputs], num_examples=0)


def test_a_loss_that_is_missing_or_not_finite_is_named() -> None:
    model, axes, inputs = _build("bert")
    handle = model.register_forward_hook(lambda *_: {"logits": torch.zeros(1)})
    with pytest.raises(DataError, match="Batch 0: the model returned no scalar loss"):
        collect_scores(model, axes, [inputs])
    handle.remove()
    calls = itertools.count()

    def spoil(module, args, outputs):
        if next(calls) == 4:  # three to find the normaliser, one batch
            outputs.loss = outputs.loss * float("nan")

    handle = model.register_forward_hook(spoil)
    with pytest.raises(DataError, match="Batch 1: the loss is nan; look for broken inputs"):
        collect_scores(model, axes, [inputs, inputs])
    handle.remove()
    handle = model.register_forward_hook(lambda module, args, outputs: {"loss": outputs.loss / 0.0})
    with pytest.raises(DataError, match="Batch 0: the loss is inf for a single example"):
        collect_scores(model, axes, [inputs])
    handle.remove()


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, axes, inputs = _build("bert")
    axis = axes[2]

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    handle = model.get_submodule(axis.read_at).register_forward_hook(spoil)
    with pytest.raises(DataError, match=rf"Batch 0: a gradient of {axis.name} is (nan|inf)"):
        collect_scores(model, axes[2:], [inputs])
    handle.remove()


def test_scores_that_are_all_zero_are_refused() -> None:
    model, axes, inputs = _build("llama")
    ignored = {**inputs, "labels": torch.full_like(inputs["labels"], IGNORED)}
    with pytest.raises(DataError, match="All scores are zero after 4 examples"):
        collect_scores(model, axes, [ignored])


# -- the normaliser -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "normaliser"),
    [
        ("bert", "examples"),
        ("vit", "examples"),
        ("gpt2", "labels_after_shift"),
        ("llama", "labels_after_shift"),
        ("t5", "labels"),
        ("bart", "labels"),
        ("whisper", "labels"),
    ],
)
def test_normalisers_of_the_families(family: str, normaliser: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, axes, inputs = _build(family, dtype=dtype)
        one = {key: value[:1] for key, value in inputs.items()}
        for batch in (inputs, one):
            scores = collect_scores(model, axes, [batch])
            assert scores.metadata["normaliser"] == normaliser


@pytest.mark.parametrize(
    ("head", "labels", "normaliser"),
    [
        ("BertForMaskedLM", {"labels": torch.tensor([[-100, 5, -100, 7], [-100] * 4])}, "labels"),
        ("BertForTokenClassification", {"labels": torch.randint(3, (2, 4))}, "labels"),
        (
            "BertForQuestionAnswering",
            {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 3])},
            "examples",
        ),
        ("BertForSequenceClassification", {"labels": torch.rand(2, 3)}, "examples"),
        ("BertForMultipleChoice", {"labels": torch.tensor([1])}, "examples"),
    ],
)
def test_normalisers_of_the_heads(head: str, labels, normaliser: str) -> None:
    config = {**zoo.ENCODER, "problem_type": None, "num_labels": 2 if "Question" in head else 3}
    model = getattr(transformers, head)(transformers.BertConfig(**config)).double().eval()
    ids = torch.randint(3, zoo.VOCAB, (2, 4))
    ids = ids[None] if head == "BertForMultipleChoice" else ids
    labels = {key: v.double() if v.is_floating_point() else v for key, v in labels.items()}
    read_at = "bert.encoder.layer.1.output.dense"
    axis = Axis("a:neurons", "a", Kind.NEURONS, 96, read_at, 1, ())
    scores = collect_scores(model, [axis], [{"input_ids": ids, **labels}])
    assert scores.metadata["normaliser"] == normaliser


def test_a_loss_that_is_a_sum_is_found_and_one_that_fits_nothing_warned_of() -> None:
    model, axes, inputs = _build("llama")
    losses = SimpleNamespace(plain=model.loss_function)
    model.loss_function = lambda *args, **kwargs: losses.plain(
        *args, num_items_in_batch=torch.tensor(1), **kwargs
    )
    scores = collect_scores(model, axes, [inputs])
    assert scores.metadata["normaliser"] == "sum"
    model.loss_function = lambda *args, **kwargs: losses.plain(*args, **kwargs).exp()
    with pytest.warns(GradNASWarning, match="is no mean and no sum over labels or examples"):
        scores = collect_scores(model, axes, [inputs])
    assert scores.metadata["normaliser"] == "examples"
