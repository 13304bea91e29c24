"""Which batches can be scored, what cannot is named, and what a model divides its loss by."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo
from score_examples import IGNORED, assert_equal, build, examples_of, in_batches

from hf_gradnas.errors import DataError, GradNASWarning
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Axis, Kind, Tap


def test_exactly_the_first_examples_are_scored() -> None:
    model, axes, _ = build("llama")
    examples = examples_of("llama", 12)
    seen = []
    found = collect_scores(
        model,
        axes,
        in_batches(examples, 5),
        num_examples=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(5, 7), (7, 7)]
    assert found.metadata["examples"] == "7"
    expected = collect_scores(model, axes, in_batches(examples[:7], 7))
    assert_equal(found, dict(expected.values))


def test_an_example_without_labels_counts_nothing_at_any_batch_size() -> None:
    with zoo.float64_throughout():
        model, axes, _ = build("llama")
        examples = examples_of("llama", 6)
        examples[0]["labels"] = torch.full_like(examples[0]["labels"], IGNORED)
        one = collect_scores(model, axes, in_batches(examples, 1))
        assert_equal(collect_scores(model, axes, in_batches(examples, 6)), dict(one.values))


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
    model, axes, _ = build("bert")
    with pytest.raises(DataError, match=message):
        collect_scores(model, axes, batches)


def test_no_examples_asked_for() -> None:
    model, axes, inputs = build("bert")
    with pytest.raises(DataError, match="num_examples=0: nothing to score"):
        collect_scores(model, axes, [inputs], num_examples=0)


def test_a_loss_that_is_missing_or_not_finite_is_named() -> None:
    model, axes, inputs = build("bert")
    handle = model.register_forward_hook(lambda *_: {"logits": torch.zeros(1)})
    with pytest.raises(DataError, match="Batch 0: the model returned no scalar loss"):
        collect_scores(model, axes, [inputs])
    handle.remove()
    calls = itertools.count()

    def spoil(module, args, outputs):
        if next(calls) == 3:  # two to find the normaliser, one batch
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
    model, axes, inputs = build("bert")
    axis = axes[2]

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    handle = model.get_submodule(axis.taps[0].module).register_forward_hook(spoil)
    with pytest.raises(DataError, match=rf"Batch 0: a gradient of {axis.name} is (nan|inf)"):
        collect_scores(model, axes[2:], [inputs])
    handle.remove()


def test_scores_that_are_all_zero_are_refused() -> None:
    model, axes, inputs = build("llama")
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
    # A random T5 gives all labels nearly the same loss: too nearly for bfloat16 to tell.
    half = () if family == "t5" else (torch.bfloat16,)
    for dtype in (torch.float64, torch.float32, *half):
        model, axes, inputs = build(family, dtype=dtype)
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
    place = Tap("bert.encoder.layer.1.output.dense", "input", -1)
    axis = Axis("a:neurons", "a", Kind.NEURONS, 96, (), (place,))
    scores = collect_scores(model, [axis], [{"input_ids": ids, **labels}])
    assert scores.metadata["normaliser"] == normaliser


def test_labels_of_one_token_are_counted() -> None:
    model, axes, inputs = build("t5")
    columns = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    batch = {**columns, "labels": inputs["labels"][:, :1]}
    together = collect_scores(model, axes, [batch])
    assert together.metadata["normaliser"] == "labels"
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(zoo.BATCH)]
    assert_equal(collect_scores(model, axes, rows), together.values)


def test_a_loss_that_is_a_sum_is_found_and_one_that_fits_nothing_warned_of() -> None:
    model, axes, inputs = build("llama")
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
