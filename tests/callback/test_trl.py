"""The callback in TRL's trainers, where TRL is installed: ``pip install trl``."""

from __future__ import annotations

from pathlib import Path

import pytest
from callback_runs import numel
from cli_cases import save_llama
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradnas import GradNASCallback
from hf_gradnas.errors import DataError

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:.*pin_memory.*"),
]
TEXTS = ["a short sentence", "another one of them, longer than the first"] * 8


def make_trainer(folder: Path, callback: GradNASCallback) -> object:
    source = save_llama(folder / "llama")
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 32, "bf16": False}
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=trl.SFTConfig(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[callback],
    )


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
def test_an_instruction_tuned_model_is_cut_and_saved(when: str, tmp_path: Path) -> None:
    callback = GradNASCallback({"flops": "80%"}, when=when, num_examples=8, stages=2)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert numel(trainer.model) == callback.plan.costs["params"]
    again = AutoModelForCausalLM.from_pretrained(callback.directory)
    assert numel(again) == numel(trainer.model)


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
def test_preference_trainers_are_scored_with_labels_of_the_model(when: str, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    callback = GradNASCallback({"params": "80%"}, when=when, num_examples=8, stages=2)
    rows = {"prompt": ["a short"] * 8, "chosen": [" sentence"] * 8, "rejected": [" other"] * 8}
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=trl.DPOConfig(str(tmp_path), max_steps=2, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.scores.metadata["labels"] == "model"
    assert numel(trainer.model) == callback.plan.costs["params"]


def test_a_loss_of_its_own_cannot_be_ridden_on(tmp_path: Path) -> None:
    callback = GradNASCallback({"params": "80%"}, num_examples=8, scores_from="training")
    with pytest.raises(DataError, match="use scores_from='private'"):
        make_trainer(tmp_path, callback).train()
