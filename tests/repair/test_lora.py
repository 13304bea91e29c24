"""Adapters: what may be asked for, and that a model has its own modules afterwards."""

import pytest
import torch
import transformers as tf
from peft import IA3Config, LoraConfig, PromptTuningConfig
from repair_cases import EXAMPLES, collate, cut, pair
from score_examples import examples_of

from hf_gradnas.errors import RecipeError
from hf_gradnas.repair import recover
from hf_gradnas.repair.lora import adapted, check_lora, linear_paths

SHORT = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "data_collator": collate}
LAYERS = {"r": 2, "target_modules": ["query"]}
COPIES = {
    "saved": LoraConfig(**LAYERS, modules_to_save=["classifier"]),
    "task": LoraConfig(**LAYERS, task_type="SEQ_CLS"),
    "layer": LoraConfig(**LAYERS, modules_to_save=["encoder.layer.1"]),
}


class Interrupt(tf.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def _states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case", COPIES)
def test_copies_are_written_back_into_the_models_own_modules(case):
    dtype = torch.float32 if case == "saved" else torch.bfloat16
    student, teacher, _ = pair("bert", dtype=dtype)
    modules = dict(student.named_modules())
    parameters = dict(student.named_parameters())
    before = _states(student)
    recover(student, teacher, examples_of("bert", EXAMPLES), lora=COPIES[case], **SHORT)
    assert dict(student.named_modules()) == modules
    assert all(found is parameters[name] for name, found in student.named_parameters())
    assert {value.dtype for value in student.parameters()} == {dtype}
    assert not any(module.training for module in student.modules())
    assert all(value.requires_grad for value in student.parameters())
    moved = {name for name, value in student.state_dict().items() if (before[name] != value).any()}
    copied = "bert.encoder.layer.1." if case == "layer" else "classifier."
    assert any(name.startswith(copied) for name in moved)
    assert any("query" in name for name in moved)
    assert all(name.startswith(copied) or "query" in name for name in moved)


def test_the_trained_copy_is_what_is_written_back():
    student, _, batch = pair("bert")
    with adapted(student, COPIES["saved"]) as wrapped, torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.copy_(torch.randn_like(value))
        expected = wrapped.eval()(**batch).logits
    torch.testing.assert_close(student(**batch).logits.detach(), expected, rtol=0, atol=1e-12)
    student.requires_grad_(True)


def test_an_interruption_leaves_the_weights():
    student, teacher, _ = pair("bert", dtype=torch.bfloat16)
    modules, before = dict(student.named_modules()), _states(student)
    options = {"lora": COPIES["layer"], "callbacks": [Interrupt()], **SHORT}
    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, examples_of("bert", EXAMPLES), **options)
    assert dict(student.named_modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_copy_of_tied_weights_is_refused():
    student, teacher, _ = pair("gpt2", dtype=torch.float32)
    modules = dict(student.named_modules())
    config = LoraConfig(
        r=2, target_modules=["c_fc"], modules_to_save=["lm_head"], fan_in_fan_out=True
    )
    with pytest.raises(RecipeError, match=r"copies .*lm_head, whose weight is also .*wte.weight"):
        recover(student, teacher, examples_of("gpt2", 2), lora=config, **SHORT)
    assert dict(student.named_modules()) == modules
    assert student.lm_head.weight is student.transformer.wte.weight


def test_a_config_that_does_not_fit_leaves_the_model():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    modules, attributes = dict(student.named_modules()), set(vars(student))
    config = LoraConfig(r=2, target_modules=["query"], layers_to_transform=[0], rank_pattern={})
    config.init_lora_weights = "no such way"
    with pytest.raises(ValueError, match="no such way"):
        recover(student, teacher, examples_of("bert", 2), lora=config, **SHORT)
    assert dict(student.named_modules()) == modules
    assert set(vars(student)) == attributes


def test_other_adapters_than_lora():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    before = _states(student)
    rows = examples_of("bert", EXAMPLES)
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    recover(student, teacher, rows, lora=config, **SHORT)
    assert any((before[name] != value).any() for name, value in student.state_dict().items())


def test_adapters_leave_the_output_table_and_empty_layers_alone():
    pruner, _ = cut("llama", flops="45%", dtype=torch.float32)
    paths = linear_paths(pruner.model)
    assert "lm_head" not in paths
    assert "model.layers.2.mlp.down_proj" in paths
    empty = [name for name, p in pruner.model.named_parameters() if p.dim() == 2 and not p.numel()]
    assert not {name.removesuffix(".weight") for name in empty} & set(paths)


@pytest.mark.parametrize("lora", [0, -1, True, 4.0, "8"])
def test_a_rank_is_a_whole_number(lora):
    with pytest.raises(
        RecipeError, match=rf"lora={lora!r}: needed a rank of at least 1.*PeftConfig"
    ):
        check_lora(lora)


def test_a_config_is_one_of_peft_that_can_be_merged(monkeypatch):
    with pytest.raises(RecipeError, match=r"lora: is a dict, needed a rank of at least 1"):
        check_lora({"r": 4})
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(RecipeError, match=r"is a PromptTuningConfig, whose .* cannot be merged"):
        check_lora(prompts)
    monkeypatch.setattr("hf_gradnas.repair.lora.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"lora=4: PEFT is not installed.*pip install peft"):
        check_lora(4)
