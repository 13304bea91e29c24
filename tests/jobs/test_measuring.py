"""Loss, accuracy and perplexity are means over labels, whatever the batches."""

import math

import pytest
import torch
import transformers as tf
import zoo

from hf_gradnas.data.tasks import Head
from hf_gradnas.errors import DataError
from hf_gradnas.jobs.measuring import Metrics, evaluate


def _bert(cls="BertForSequenceClassification", **config):
    values = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "intermediate_size": 16}
    return getattr(tf, cls)(tf.BertConfig(**values, **config)).double()


def _ids(*shape):
    return torch.randint(3, 20, shape)


def test_a_classifier():
    model = _bert().train()
    ids, labels = _ids(5, 6), torch.tensor([0, 1, 1, 0, 1])
    batches = [
        {"input_ids": ids[:3], "labels": labels[:3]},
        {"input_ids": ids[3:], "labels": labels[3:]},
    ]
    done = []
    metrics = evaluate(model, batches, Head.CLASS, total=5, progress=lambda *x: done.append(x))
    assert model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    assert metrics.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert metrics.accuracy == (logits.argmax(-1) == labels).double().mean().item()
    assert metrics.perplexity is None
    assert done == [(3, 5), (5, 5)]
    assert set(metrics.to_dict()) == {"examples", "loss", "accuracy"}


@pytest.mark.parametrize(
    ("cls", "head", "shift"),
    [
        ("BertForMaskedLM", Head.MASKED, 0),
        ("BertForTokenClassification", Head.TOKENS, 0),
        ("BertLMHeadModel", Head.CAUSAL, 1),
    ],
)
def test_losses_of_tokens_are_weighted_by_labels(cls, head, shift):
    model = _bert(cls, is_decoder=head is Head.CAUSAL).eval()
    ids = _ids(4, 6)
    labels = ids % 2 if head is Head.TOKENS else ids.clone()
    labels[0, 2:] = -100
    whole = [{"input_ids": ids, "labels": labels}]
    parts = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)]
    one, other = evaluate(model, whole, head), evaluate(model, parts, head)
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.accuracy == other.accuracy
    if head is not Head.TOKENS:
        assert one.perplexity == pytest.approx(math.exp(one.loss))


def test_every_module_gets_its_own_training_flag_back():
    model = _bert().train()
    model.bert.embeddings.eval()  # as where a part is frozen
    before = {name: module.training for name, module in model.named_modules()}
    evaluate(model, [{"input_ids": _ids(2, 4), "labels": torch.tensor([0, 1])}], Head.CLASS)
    assert before == {name: module.training for name, module in model.named_modules()}


def test_several_labels_and_regressions():
    multi = _bert(num_labels=3, problem_type="multi_label_classification").eval()
    labels = torch.ones(2, 3, dtype=torch.float64)
    assert evaluate(multi, [{"input_ids": _ids(2, 4), "labels": labels}], Head.CLASS).accuracy == 0
    one = _bert(num_labels=1).eval()
    batch = {"input_ids": _ids(2, 4), "labels": torch.ones(2, dtype=torch.float64)}
    assert evaluate(one, [batch], Head.CLASS).accuracy is None


def test_a_loss_that_is_not_finite_is_named():
    model = _bert(num_labels=1).eval()
    good = {"input_ids": _ids(2, 4), "labels": torch.ones(2, dtype=torch.float64)}
    bad = {**good, "labels": torch.full((2,), float("nan"), dtype=torch.float64)}
    with pytest.raises(DataError, match="the loss of batch 1 is nan"):
        evaluate(model, [good, bad], Head.CLASS)


def test_no_label_is_refused():
    with pytest.raises(DataError, match="found no label to predict"):
        evaluate(_bert(), [], Head.CLASS)


def test_metrics_leave_out_what_does_not_apply():
    assert Metrics(examples=2, loss=1.0).to_dict() == {"examples": 2, "loss": 1.0}
    assert zoo.BUILT == []
