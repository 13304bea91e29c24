"""The pruner's repair: found before the cut, tried under masks, cut with, and trained on after."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from repair_cases import collate
from score_examples import examples_of, in_batches
from torch import nn

from hf_gradnas import GradNASPruner, Repair
from hf_gradnas.errors import (
    DataError,
    GradNASWarning,
    OrderError,
    PlanError,
    RepairError,
    StructureError,
)
from hf_gradnas.repair.closeness import divergences

BUDGET = {"flops": "60%"}
BATCHES = in_batches(examples_of("bert", 40), 8)


def pruner_of(family: str = "bert", **options: Any) -> GradNASPruner:
    return GradNASPruner(zoo.build(family)[0], layout="per_layer", **options)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCHES[0]).logits


def test_a_repair_brings_the_predictions_closer_and_leaves_the_model() -> None:
    pruner = pruner_of()
    pruner.score(BATCHES)
    plan, seen = pruner.plan(BUDGET), []
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    repair = pruner.repair(plan, BATCHES, progress=lambda done, total: seen.append((done, total)))
    assert repair.is_accepted
    assert repair.examples == 40
    assert len(set(seen)) == seen[-1][0] == seen[-1][1]
    variants = [lambda: pruner.masked(plan), lambda: pruner.masked(plan, repair)]
    alone, mended = divergences(pruner.model, BATCHES, variants)
    assert mended < 0.8 * alone
    after = pruner.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.leaves_state
def test_prune_repairs_by_default_as_the_steps_do(caplog: pytest.LogCaptureFixture) -> None:
    steps, once = pruner_of(), pruner_of()
    steps.score(BATCHES)
    plan = steps.plan(BUDGET)
    repair = steps.repair(plan, BATCHES)
    with steps.masked(plan, repair):
        wanted = logits_of(steps.model)
    steps.apply(plan, repair)
    with caplog.at_level(logging.INFO, "hf_gradnas.pruner"):
        assert once.prune(BATCHES, BUDGET) == plan
    assert torch.equal(logits_of(once.model), logits_of(steps.model))
    assert (logits_of(once.model) - wanted).abs().max() < 1e-10
    assert "by least squares on 40 examples, without training" in caplog.text


@pytest.mark.leaves_state
def test_none_leaves_the_weights_as_they_are() -> None:
    steps, once = pruner_of(), pruner_of()
    steps.score(BATCHES)
    plan = steps.plan(BUDGET)
    steps.apply(plan)
    once.prune(BATCHES, BUDGET, repair="none")
    found, wanted = once.model.state_dict(), steps.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.leaves_state
def test_a_stream_of_batches_serves_scores_and_repair() -> None:
    listed, streamed = pruner_of(), pruner_of()
    listed.prune(BATCHES[:3], BUDGET, num_examples=20)
    streamed.discover(BATCHES[0])
    streamed.prune(iter([*BATCHES[:3], None]), BUDGET, num_examples=20)  # type: ignore[list-item]
    assert torch.equal(logits_of(streamed.model), logits_of(listed.model))
    plan, repair = streamed._plan, streamed._repair
    assert plan is not None
    assert repair is not None
    assert repair.examples == 20


@pytest.mark.leaves_state
def test_wrapped_models_are_repaired_inside() -> None:
    plain, wrapped = pruner_of(), pruner_of()
    outer = torch.compile(nn.DataParallel(wrapped.model), backend="eager")
    compiled = GradNASPruner(outer, layout="per_layer")
    plain.prune(BATCHES, BUDGET)
    compiled.prune(BATCHES, BUDGET)
    assert compiled.model is wrapped.model
    assert torch.equal(logits_of(compiled.model), logits_of(plain.model))


@pytest.mark.leaves_state
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_model_and_can_train_it(mode: Any) -> None:
    plain, steps, once = pruner_of(), pruner_of(), pruner_of()
    plain.prune(BATCHES, BUDGET)
    with mode():
        once.prune(BATCHES, BUDGET)
        steps.score(BATCHES)
        plan = steps.plan(BUDGET)
        repair = steps.repair(plan, BATCHES)
        with steps.masked(plan, repair):
            logits_of(steps.model)
        assert not any(tensor.is_inference() for tensor in repair.tensors.values())
    assert steps.model(**BATCHES[0]).loss.requires_grad
    with mode():
        steps.apply(plan, repair)
    for pruner in (once, steps):
        assert torch.equal(logits_of(pruner.model), logits_of(plain.model))
        pruner.model(**BATCHES[0]).loss.backward()
        assert all(p.grad is not None for p in pruner.model.parameters())
        pruner.model.zero_grad()


@pytest.mark.leaves_state
def test_a_repaired_model_is_recovered_as_it_is() -> None:
    model, batch = zoo.build("bert", dtype=torch.float32)
    teacher, pruner = copy.deepcopy(model), GradNASPruner(model, layout="per_layer")
    pruner.prune([batch] * 5, BUDGET)
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    rows = examples_of("bert", 8)
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "data_collator": collate}
    assert pruner.recover(teacher, rows, **options).steps == 2
    after = pruner.model.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


# --- what does not work ---------------------------------------------------------------------------


@pytest.mark.leaves_state
def test_a_repair_after_the_cut_says_to_repair_first() -> None:
    pruner = pruner_of()
    plan = pruner.prune(BATCHES[:2], BUDGET, repair="none")
    left = logits_of(pruner.model)
    with pytest.raises(OrderError, match=r"^repair: .* cut already.* before apply\(plan, repair\)"):
        pruner.repair(plan, BATCHES)
    assert torch.equal(logits_of(pruner.model), left)


def test_bad_input_is_refused() -> None:
    pruner = pruner_of()
    with pytest.raises(
        PlanError, match="repair='always' is not known; choose one of auto, weights, swap, none"
    ):
        pruner.prune(BATCHES, BUDGET, repair="always")
    pruner.score(BATCHES[:2])
    plan = pruner.plan(BUDGET)
    with pytest.raises(DataError, match="no batch"):
        pruner.repair(plan, [])
    other = pruner_of("llama")
    other.discover(zoo.build("llama")[1])
    with pytest.raises(PlanError):
        other.repair(plan, BATCHES)
    assert not pruner._applied


@pytest.mark.leaves_state
@pytest.mark.parametrize("error", [RepairError, StructureError])
def test_auto_goes_on_where_no_repair_can_be_found(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Repair:
        raise error("a.layer: is not finite; leave it out.")

    plain, pruner = pruner_of(), pruner_of()
    plain.prune(BATCHES[:2], BUDGET, repair="none")
    monkeypatch.setattr("hf_gradnas.examined.find_repair", fail)
    with pytest.warns(GradNASWarning, match=r"pruned without a repair\. a\.layer: is not finite"):
        pruner.prune(BATCHES[:2], BUDGET)
    assert torch.equal(logits_of(pruner.model), logits_of(plain.model))


def test_shards_are_refused_where_a_repair_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = pruner_of()
    pruner.score(BATCHES[:2])
    plan = pruner.plan(BUDGET)
    monkeypatch.setattr("hf_gradnas.repair.repairs.is_sharded", lambda _: True)
    with pytest.raises(StructureError, match=r"^repair: BertForSequenceClassification is sharded"):
        pruner.repair(plan, BATCHES)


@pytest.mark.leaves_state
def test_a_repair_from_a_file_is_cut_with(tmp_path: Path) -> None:
    first, second = pruner_of(), pruner_of()
    first.score(BATCHES[:2])
    plan = first.plan(BUDGET)
    first.repair(plan, BATCHES).save(tmp_path / "repair.safetensors")
    second.discover(BATCHES[0])
    repair = Repair.load(tmp_path / "repair.safetensors")
    second.apply(plan, repair)
    first.apply(plan, repair)
    assert torch.equal(logits_of(second.model), logits_of(first.model))
