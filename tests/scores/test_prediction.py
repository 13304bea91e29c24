"""A predicted loss increase has the unit that it names: nats per token, per example, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
import zoo
from score_examples import build, examples_of, in_batches
from torch.nn.functional import kl_div

from hf_gradnas import GradNASPruner, Plan, Scores
from hf_gradnas.masks import mask_leaves
from hf_gradnas.report import say_prediction
from hf_gradnas.scores import METHODS, collect_scores
from hf_gradnas.search.prediction import with_prediction

TOKENS = {"bert": 1, "llama": 12}  # predictions per example


def _plan(axis, unit: int, scores: Scores) -> Plan:
    """The plan that prunes one unit, as the search states it."""
    plan = Plan(
        {axis.name: tuple(i for i in range(axis.size) if i != unit)},
        {axis.name: axis.size},
        "per_layer",
        loss_increase=float(scores.values[axis.name][unit]),
        score=scores.metadata["method"],
    )
    return with_prediction(plan, scores)


@pytest.mark.parametrize(("family", "unit"), [("bert", "example"), ("llama", "token")])
def test_the_prediction_for_one_unit_is_the_measured_loss_change(family: str, unit: str) -> None:
    # With labels that the model itself draws, the loss change is the divergence of the masked
    # model's prediction from the whole one's, and its second order is half the Fisher information.
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        ids = torch.randint(3, zoo.VOCAB, (600, TOKENS[family]))
        batches = [{"input_ids": part} for part in ids.split(100)]
        scores = collect_scores(model, axes, batches, labels="model")
        axis = max(axes, key=lambda a: scores.values[a.name].max())
        index = int(scores.values[axis.name].argmax())
        predicted = _plan(axis, index, scores)
        step = 1e-2
        with torch.no_grad(), mask_leaves(model, axes) as leaves:
            before = model(input_ids=ids).logits.log_softmax(-1)
            leaves[axis.name][index] -= step
            after = model(input_ids=ids).logits.log_softmax(-1)
        divergence = kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
        measured = float(divergence) / step**2
    labels = {"bert": 600, "llama": 600 * TOKENS["llama"]}[family]
    assert scores.metadata["labels_scored"] == str(labels)
    assert predicted.loss_unit in (f"nats per {unit}", "nats per label")
    assert predicted.loss_increase == pytest.approx(measured, rel=0.15)  # 600 draws of labels


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_loss_beside_it_is_the_mean_over_labels(family: str, size: int) -> None:
    with zoo.float64_throughout():
        model, axes, _ = build(family)
        examples = examples_of(family, 12)
        scores = collect_scores(model, axes, in_batches(examples, size))
        shift = 1 if family == "llama" else 0
        losses, counts = [], []
        with torch.no_grad():
            for example in examples:
                counts.append(max(1, example["labels"].numel() - shift))
                losses.append(float(model(**example).loss) * counts[-1])
    assert scores.metadata["labels_scored"] == str(sum(counts))
    axis = axes[0]
    found = _plan(axis, 0, scores)
    assert found.loss_before == pytest.approx(sum(losses) / sum(counts), rel=1e-9)
    assert found.loss_unit == f"nats per {'example' if family == 'bert' else 'token'}"
    half = 0.5 * scores.values[axis.name][0] / sum(counts)
    assert found.loss_increase == pytest.approx(half, rel=1e-12)


def test_a_loss_that_is_a_sum_counts_examples() -> None:
    model, axes, inputs = build("llama")
    plain = model.loss_function
    model.loss_function = lambda *args, **kwargs: plain(
        *args, num_items_in_batch=torch.tensor(1), **kwargs
    )
    scores = collect_scores(model, axes, [inputs, inputs])
    assert scores.metadata["normaliser"] == "sum"
    assert scores.metadata["labels_scored"] == scores.metadata["examples"]
    assert _plan(axes[0], 0, scores).loss_unit == "nats per example"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_sums_that_are_a_loss_are_called_one(method: str) -> None:
    model, _, inputs = build("llama")
    pruner = GradNASPruner(model, score=method)
    pruner.score([inputs])
    plan = pruner.plan({"flops": "80%"})
    said = say_prediction(plan.loss_increase, plan.loss_unit, plan.loss_before, score=plan.score)
    if method in ("fisher", "taylor"):
        assert plan.loss_unit == "nats per token"
        assert plan.loss_before == pytest.approx(float(model(**inputs).loss.detach()), rel=1e-6)
        assert "loss increase: " in repr(plan)
        assert "nats per token" in said
        assert "forecast" in said
        assert ("first order" in said) == (method == "taylor")
    else:
        assert (plan.loss_unit, plan.loss_before) == ("", None)
        assert "are no loss" in said
        assert "nats" not in said
        assert plan.loss_increase > 0


def test_labels_that_are_numbers_or_several_make_no_nats() -> None:
    config = {**zoo.ENCODER, "num_labels": 1, "problem_type": "regression"}
    ids = torch.randint(3, zoo.VOCAB, (3, 5))
    heads = {
        "BertForSequenceClassification": {"labels": torch.rand(3)},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([0, 1, 2]),
            "end_positions": torch.tensor([1, 3, 4]),
        },
    }
    for head, labels in heads.items():
        if "Question" in head:
            config["num_labels"] = 2
        model = getattr(transformers, head)(transformers.BertConfig(**config)).eval()
        pruner = GradNASPruner(model)
        scores = pruner.score([{"input_ids": ids, **labels}])
        assert "loss_sum" not in scores.metadata
        assert pruner.plan({"flops": "80%"}).loss_unit == ""


def test_older_scores_and_plans_load_and_say_less(tmp_path) -> None:
    model, _, inputs = build("bert")
    pruner = GradNASPruner(model)
    scores = pruner.score([inputs])
    new = pruner.plan({"flops": "80%"})
    old = {k: v for k, v in scores.metadata.items() if k not in ("loss_sum", "labels_scored")}
    Scores(scores.values, old).save(tmp_path / "old.safetensors")
    pruner.use_scores(Scores.load(tmp_path / "old.safetensors"))
    plan = pruner.plan({"flops": "80%"})
    assert (plan.kept, plan.loss_unit, plan.loss_before) == (new.kept, "", None)
    data = new.to_dict()
    del data["loss_unit"], data["loss_before"]
    assert Plan.from_dict(data) == replace(new, loss_unit="", loss_before=None)
    assert Plan.from_dict(new.to_dict()) == new


def test_an_older_unfinished_file_goes_on_without_the_loss(tmp_path) -> None:
    model, axes, _ = build("bert")
    batches = in_batches(examples_of("bert", 8), 4)
    file = tmp_path / "scores.safetensors"
    whole = collect_scores(model, axes, batches)
    half = collect_scores(model, axes, batches[:1], file=file)
    old = {k: v for k, v in half.metadata.items() if k not in ("loss_sum", "labels_scored")}
    Scores(half.values, {**old, "complete": "false"}).save(file)
    found = collect_scores(model, axes, batches, file=file)
    assert "loss_sum" in whole.metadata
    assert "loss_sum" not in found.metadata
    assert _plan(axes[0], 0, found).loss_unit == ""
