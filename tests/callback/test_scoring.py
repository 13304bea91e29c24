"""Private passes read as the training does, and disturb nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from callback_runs import Rows, build, logits_of, make_trainer, numel, pruning, train_arguments
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_gradnas.callback.scoring import private_batches, undisturbed
from hf_gradnas.callback.weights import is_masked

pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One of three words."""
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def drawn(collator: Any, count: int = 1) -> list:
    """What a collate function draws for so many batches."""
    rows = [{"input_ids": [2] * 50, "attention_mask": [1] * 50}] * 2
    return [torch.as_tensor(collator(rows)["labels"]).tolist() for _ in range(count)]


@pytest.mark.parametrize("tensors", ["pt", "np"])
@pytest.mark.parametrize("used", [0, 1])
def test_the_generator_of_a_collate_function_is_not_disturbed(tensors: str, used: int) -> None:
    def make() -> Any:
        return DataCollatorForLanguageModeling(tokenizer(), seed=3, return_tensors=tensors)

    expected = drawn(make(), 3)
    collator = make()
    found = drawn(collator, used)
    private = []
    for _ in range(2):
        loader = DataLoader([1, 2], collate_fn=collator)
        with undisturbed(torch.nn.Linear(1, 1), 5, loader):
            private.append(drawn(collator, 2))
    assert private[0] == private[1]
    assert found + drawn(collator, 3 - used) == expected


@pytest.mark.parametrize("prepared", [False, True])
def test_private_batches_are_as_large_as_the_loaders(prepared: bool) -> None:
    loader: Any = DataLoader(Rows("bert"), batch_size=3)
    if prepared:
        loader = Accelerator(cpu=True).prepare(loader)
    batches = private_batches(loader, num_examples=8, batch_size=16, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 2]


def test_batches_of_no_fixed_size_are_replaced() -> None:
    loader = DataLoader(Rows("bert"), batch_sampler=[[0, 1, 2], [3]])
    batches = private_batches(loader, num_examples=8, batch_size=4, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [4, 4]


class Small(torch.nn.Linear):
    """Has no memory for more than two examples with gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2 and torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x)


def test_a_batch_size_that_was_found_automatically_is_used(tmp_path: Path) -> None:
    model, callback = build(), pruning(num_examples=8)
    model.classifier.__class__ = Small
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 1}
    trainer = make_trainer(tmp_path, callback, model=model, **options)
    trainer.train()
    assert trainer.state.train_batch_size == 2
    assert callback.scores.metadata["batches"] == "4"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tokenizer_that_only_the_collate_function_has_is_saved(
    wrapped: bool, tmp_path: Path
) -> None:
    rows = [{"input_ids": [2, 1], "label": n % 3, "text": "x"} for n in range(8)]
    if not wrapped:
        rows = [{key: row[key] for key in ("input_ids", "label")} for row in rows]
    callback = pruning()
    Trainer(
        build(),
        train_arguments(tmp_path, max_steps=1, remove_unused_columns=wrapped),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer()),
        callbacks=[callback],
    ).train()
    assert json.loads((callback.directory / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("when", ["end", "gradual"])
def test_a_masked_checkpoint_can_begin_a_new_run(when: str, tmp_path: Path) -> None:
    first = pruning(when="begin")
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, first, **options).train()
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-2", dtype=torch.float64
    )
    assert is_masked(model)
    before, callback = logits_of(model), pruning(when=when)
    trainer = make_trainer(tmp_path / "new", callback, model=model, learning_rate=0.0, max_steps=2)
    trainer.train()
    assert numel(model) == callback.plan.costs["params"]
    assert callback.plan.kept == first.plan.kept
    assert np.abs((logits_of(model) - before).numpy()).max() < 1e-9


def test_a_model_as_it_comes_is_not_masked() -> None:
    model = build()
    model.bert.embeddings.word_embeddings.weight.data[0] = 0  # padding
    model.classifier.bias.data.zero_()
    assert not is_masked(model)
