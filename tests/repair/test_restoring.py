"""What a recovery leaves of a model and of the process besides the weights."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import transformers as tf
import zoo
from accelerate import Accelerator
from repair_cases import EXAMPLES, arguments, collate, pair
from score_examples import examples_of

from hf_gradnas.repair import recover
from hf_gradnas.repair.restoring import accelerate_state_kept, random_state_kept

SHORT = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "data_collator": collate}
FIELDS = {field.name for field in dataclasses.fields(tf.TrainingArguments)}
CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"} & FIELDS
SET = ("gradient_checkpointing", "_gradient_checkpointing_func")


def _rows(family="bert"):
    return examples_of(family, EXAMPLES)


def _hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("lora", [None, 2])
def test_activation_checkpointing_ends_with_the_recovery(lora, tmp_path):
    student, teacher, _ = pair("bert", dtype=torch.float32)
    kept = {module: dict(vars(module)) for module in student.modules()}
    before = _hooks(student)
    args = arguments(tmp_path, **{min(CHECKPOINTING): True})
    recover(student, teacher, _rows(), lora=lora, args=args, data_collator=collate)
    assert _hooks(student) == before
    for module, values in kept.items():
        assert vars(module).keys() == values.keys()
        assert {name: vars(module).get(name) for name in SET} == {n: values.get(n) for n in SET}


def test_checkpointing_and_hooks_of_the_callers_own_stay(tmp_path):
    student, teacher, _ = pair("llama", dtype=torch.float32)
    student.enable_input_require_grads()
    student.model.gradient_checkpointing = True
    before = _hooks(student)
    recover(student, teacher, _rows("llama"), **SHORT)
    assert _hooks(student) == before
    assert student.model.gradient_checkpointing
    student.disable_input_require_grads()
    student.model.gradient_checkpointing = False


def test_batch_norms_of_sixteen_bits_are_trained():
    dtype = torch.float16
    student, batch = zoo.build("resnet", dtype=dtype)
    teacher, _ = zoo.build("resnet", dtype=dtype, seed=1)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(zoo.BATCH)]
    dtypes = {name: value.dtype for name, value in student.state_dict().items()}
    norms = {name: value.clone() for name, value in student.named_buffers() if "mean" in name}
    recover(student, teacher, rows, epochs=1, batch_size=4)
    assert {name: value.dtype for name, value in student.state_dict().items()} == dtypes
    assert any((norms[name] != student.get_buffer(name)).any() for name in norms)


@pytest.fixture
def accelerator():
    with accelerate_state_kept():
        yield Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)


def _settings(accelerator):
    return (
        accelerator.mixed_precision,
        accelerator.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.device,
        accelerator.sync_gradients,
    )


def test_an_accelerator_keeps_its_settings(accelerator):
    student, teacher, _ = pair("bert", dtype=torch.float32)
    before = _settings(accelerator)
    assert before[:2] == ("bf16", 4)
    recover(student, teacher, _rows(), **SHORT)
    assert _settings(accelerator) == before

    class Stop(tf.TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, _rows(), callbacks=[Stop()], **SHORT)
    assert _settings(accelerator) == before
    # What it prepares afterwards is prepared as it says.
    prepared = accelerator.prepare(student)
    assert "forward" in vars(prepared)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)


def _draw():
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_random_states_are_the_callers_own():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    with random_state_kept():
        expected = _draw()
    recover(student, teacher, _rows(), lora=2, **SHORT)
    assert _draw() == expected


def test_the_seed_alone_decides_where_adapters_start():
    found = []
    for drawn in (0, 3):
        student, teacher, _ = pair("bert", dtype=torch.float32)
        torch.rand(drawn)
        recover(student, teacher, _rows(), seed=3, lora=2, **SHORT)
        found.append(student.bert.encoder.layer[0].intermediate.dense.weight)
    assert torch.equal(*found)
