"""Labels drawn from the model's own predictions: any head, any batch size, no labels needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import zoo
from score_examples import assert_equal, build, examples_of, in_batches
from torch.nn import functional

from hf_gradnas.errors import DataError
from hf_gradnas.scores import collect_scores
from hf_gradnas.scores.losses import bernoulli, categorical, gaussian
from hf_gradnas.types import Axis, Kind, Tap

HEADS = {
    "classes": ("BertForSequenceClassification", {}),
    "yes or no": (
        "BertForSequenceClassification",
        {"problem_type": "multi_label_classification"},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}),
    "regressions": ("BertForSequenceClassification", {"problem_type": "regression"}),
    "tokens": ("BertForTokenClassification", {}),
    "masked tokens": ("BertForMaskedLM", {}),
    "pretraining": ("BertForPreTraining", {}),
    "replaced tokens": ("ElectraForPreTraining", {}),
    "spans": ("BertForQuestionAnswering", {"num_labels": 2}),
    "no head": ("BertModel", {"add_pooling_layer": False}),
}


def _axis_of(model) -> Axis:
    path = next(n for n, _ in model.named_modules() if n.endswith("encoder.layer.1.output.dense"))
    return Axis("a:neurons", "a", Kind.NEURONS, 96, (), (Tap(path, "input", -1),))


def _unlabelled(count: int, size: int) -> list[dict[str, torch.Tensor]]:
    batches = in_batches(examples_of("bert", count), size)
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_needs_no_labels_and_depends_on_no_batch_size(head: str) -> None:
    name, settings = HEADS[head]
    options = {k: v for k, v in settings.items() if k == "add_pooling_layer"}
    config = {**zoo.ENCODER, "problem_type": None, **settings}
    config_class = getattr(transformers, f"{name.partition('For')[0].removesuffix('Model')}Config")
    model = getattr(transformers, name)(config_class(**config), **options).double().eval()
    with zoo.float64_throughout():
        one, four, six = (
            collect_scores(model, [_axis_of(model)], _unlabelled(6, size), labels="model")
            for size in (1, 4, 6)
        )
    assert_equal(four, one.values)
    assert_equal(six, one.values)
    assert one.metadata["normaliser"] == "sampled_labels"


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
@pytest.mark.parametrize("labels", [True, False])
def test_every_family_is_scored_without_labels(family: str, labels: bool) -> None:
    if family == "whisper" and not labels:
        pytest.skip("there is nothing for its decoder to read")
    with zoo.float64_throughout():
        model, axes, inputs = build(family)
        if not labels:
            inputs.pop("labels")
        whole = collect_scores(model, axes, [inputs], labels="model")
        rows = [{k: v[row : row + 1] for k, v in inputs.items()} for row in range(zoo.BATCH)]
        assert_equal(collect_scores(model, axes, rows, labels="model"), whole.values)
        other = collect_scores(model, axes, [inputs], labels="model", seed=1)
    assert not np.array_equal(other.values[axes[0].name], whole.values[axes[0].name])


def test_gradnas_divides_by_the_labels_drawn() -> None:
    model, axes, inputs = build("llama")
    fisher, gradnas = (
        collect_scores(
            model, axes, [{k: v[:1] for k, v in inputs.items()}], labels="model", method=method
        )
        for method in ("fisher", "gradnas")
    )
    count = int(inputs["attention_mask"][0].sum())
    for axis in axes:
        assert np.allclose(gradnas.values[axis.name], fisher.values[axis.name] / count**2)


def test_decoder_inputs_are_taken_as_they_are() -> None:
    model, axes, inputs = build("t5")
    labels = inputs.pop("labels")
    read = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given = {**inputs, "decoder_input_ids": read, "decoder_attention_mask": (labels != -100).long()}
    expected = collect_scores(model, axes, [{**inputs, "labels": labels}], labels="model")
    found = collect_scores(model, axes, [given], labels="model")
    # The mask of the decoder is passed to the model here; its padding comes last and is not read.
    assert_equal(found, expected.values)


def test_a_decoder_with_nothing_to_read_is_named() -> None:
    model, axes, inputs = build("whisper")
    inputs.pop("labels")
    with pytest.raises(DataError, match="the decoder of WhisperForConditionalGeneration has noth"):
        collect_scores(model, axes, [inputs], labels="model")


def test_outputs_without_a_prediction_are_named() -> None:
    model, axes, inputs = build("bert")
    handle = model.register_forward_hook(lambda *_: {"ids": torch.zeros(4, dtype=torch.long)})
    with pytest.raises(DataError, match=r"returned \['ids'\], none of which is a prediction"):
        collect_scores(model, axes, [inputs], labels="model")
    handle.remove()


def test_a_batch_of_padding_alone_counts_nothing() -> None:
    model, axes, inputs = build("llama")
    padding = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    with pytest.raises(DataError, match="All scores are zero after 4 examples"):
        collect_scores(model, axes, [padding], labels="model")


# -- the distributions ----------------------------------------------------------------------------


def _streams(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([0, row]) for row in range(count)]


def test_classes_are_drawn_with_their_probabilities() -> None:
    count = 4000
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64).expand(count, 1, 3)
    logits = logits.clone().requires_grad_()
    loss = categorical(logits, torch.ones(count, 1, dtype=torch.bool), _streams(count))
    (gradient,) = torch.autograd.grad(loss, logits)
    drawn = functional.softmax(logits, -1) - gradient  # the gradient is p - [drawn]
    share = drawn.mean((0, 1))
    assert torch.allclose(share, functional.softmax(logits[0, 0], -1), atol=0.02)
    assert torch.allclose(loss, -(drawn * logits.log_softmax(-1)).sum())


def test_answers_are_drawn_with_their_probabilities() -> None:
    count = 4000
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64).expand(count, 1, 2)
    logits = logits.clone().requires_grad_()
    loss = bernoulli(logits, torch.ones(count, 1, dtype=torch.bool), _streams(count))
    (gradient,) = torch.autograd.grad(loss, logits)
    share = (logits.sigmoid() - gradient).mean((0, 1))
    assert torch.allclose(share, logits[0, 0].sigmoid(), atol=0.02)


def test_the_gradient_of_a_gaussian_is_standard_normal() -> None:
    means = torch.randn(50, 40, 2, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(50, 40) < 0.5
    (gradient,) = torch.autograd.grad(gaussian(means, valid, _streams(50)), means)
    assert not gradient[~valid].any()
    assert gradient[valid].std() == pytest.approx(1.0, abs=0.05)
    assert gradient[valid].mean() == pytest.approx(0.0, abs=0.05)
