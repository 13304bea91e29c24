"""The callback's repair: before the cut at the end, and before a training of the smaller model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from callback_runs import Rows, build, logits_of, make_trainer, pruning
from repair_cases import collate
from transformers import PreTrainedModel

from hf_gradnas import GradNASCallback, GradNASPruner, Plan, Repair
from hf_gradnas.errors import GradNASWarning, PlanError, RepairError

SHORT = {"max_steps": 2, "logging_steps": 1}
pytestmark = pytest.mark.leaves_state


def record(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "pruned" / "gradnas.json").read_text()).get("repair")


def distance(model: PreTrainedModel, original: PreTrainedModel) -> float:
    """Mean KL divergence from the original's predictions."""
    wanted, found = (logits_of(m).log_softmax(-1) for m in (original, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("scores_from", ["private", "training"])
def test_at_the_end_the_cut_model_is_closer_to_the_trained_one(
    scores_from: str, tmp_path: Path
) -> None:
    data = Rows("bert", 32)
    whole = make_trainer(tmp_path / "whole", None, data=data, **SHORT)
    whole.train()
    models = {}
    for repair in ("auto", "none"):
        callback = pruning(num_examples=32, repair=repair, scores_from=scores_from)
        trainer = make_trainer(tmp_path / repair, callback, data=data, **SHORT)
        trainer.train()
        models[repair] = trainer.model
    repaired, plain = (distance(models[repair], whole.model) for repair in ("auto", "none"))
    assert repaired < 0.5 * plain
    found = record(tmp_path / "auto")
    assert found is not None
    assert found["is_accepted"]
    assert found["examples"] == 32
    assert record(tmp_path / "none") is None
    card = (tmp_path / "auto" / "pruned" / "README.md").read_text(encoding="utf-8")
    assert "by least squares on 32 examples, without training" in card


@pytest.mark.parametrize("score", ["tempered", "gradnas"])
def test_examples_come_in_order_of_length(score: str, tmp_path: Path, monkeypatch) -> None:
    real, widths, limits = GradNASPruner.repair, [], []

    def note(self: GradNASPruner, plan: Plan, batches: Any, *, num_examples: int) -> Repair:
        widths.extend(batch["input_ids"].shape[1] for batch in batches)
        limits.append(num_examples)
        return real(self, plan, batches, num_examples=num_examples)

    monkeypatch.setattr(GradNASPruner, "repair", note)
    data = Rows("bert", 16)
    for number, row in enumerate(data.rows):
        ids = row["input_ids"][: 3 + number % 4]
        data.rows[number] = {"input_ids": ids, "labels": row["labels"]}
    callback = pruning(score=score, num_examples=12)
    trainer = make_trainer(tmp_path, callback, data=data, **SHORT)
    trainer.data_collator = lambda rows: collate([{k: v[None] for k, v in r.items()} for r in rows])
    trainer.train()
    assert limits == [12]
    assert len(widths) == 6
    assert len(set(widths)) > 1
    assert widths == sorted(widths, reverse=True)
    assert record(tmp_path)["examples"] == 12


def test_what_is_masked_from_the_beginning_is_repaired_as_what_is_cut_then(tmp_path: Path) -> None:
    masked = make_trainer(tmp_path / "masked", pruning(when="begin"), **SHORT)
    masked.train()
    callback = pruning(when="begin")
    cut = make_trainer(tmp_path / "cut", None, **SHORT)
    callback.attach(cut)
    cut.train()
    assert (logits_of(masked.model) - logits_of(cut.model)).abs().max() < 1e-9
    found = record(tmp_path / "masked")
    assert found is not None
    assert found["is_accepted"]
    assert found == record(tmp_path / "cut")


def test_a_training_that_goes_on_keeps_its_repair(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(tmp_path / "straight", pruning(when="begin"), **options)
    straight.train()
    first = make_trainer(tmp_path / "halted", pruning(when="begin"), **options)
    first.train()
    wanted = record(tmp_path / "halted")
    second = make_trainer(tmp_path / "halted", pruning(when="begin"), model=build(), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "halted" / "checkpoint-2"))
    assert (logits_of(second.model) - logits_of(straight.model)).abs().max() < 1e-9
    assert wanted is not None
    assert record(tmp_path / "halted") == wanted


def test_what_is_pruned_while_it_trains_is_not_repaired(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, pruning(when="gradual", stages=1), max_steps=4)
    trainer.train()
    assert record(tmp_path) is None


def test_a_repair_that_fails_does_not_cost_the_training(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> Repair:
        raise RepairError("a.layer: is not finite; leave it out.")

    monkeypatch.setattr("hf_gradnas.examined.find_repair", fail)
    trainer = make_trainer(tmp_path, pruning(), **SHORT)
    with pytest.warns(GradNASWarning, match="pruned without a repair"):
        trainer.train()
    assert record(tmp_path) is None


def test_the_option_is_checked_and_comes_from_recipes(tmp_path: Path) -> None:
    known = "auto, weights, swap, none"
    with pytest.raises(PlanError, match=f"repair='always' is not known; choose one of {known}"):
        pruning(repair="always")
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: x\nrepair: none\ntarget: {flops: 50%}\n", encoding="utf-8")
    assert GradNASCallback.from_recipe(recipe).settings.repair == "none"
