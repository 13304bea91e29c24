"""Recovery of cut models: what changes, what stays, and what is written."""

import copy
import re

import pytest
import torch
import transformers as tf
from repair_cases import EXAMPLES, arguments, collate, collate_unlabelled, cut, pair
from score_examples import examples_of

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import DataError, OrderError, RecipeError, StructureError
from hf_gradnas.repair import Recovery, recover
from hf_gradnas.repair.recovery import check_examples

ABOVE, WHOLE = "a finite number, more than 0", "a whole number, more than 0"
SEED = "a whole number, 0 or more, below 2**32"
NUMBERS = [
    *(("epochs", value, ABOVE, 1) for value in (0, -1.0, float("inf"), float("nan"), "1", True)),
    *(("learning_rate", value, ABOVE, 0.0001) for value in (0, float("inf"), float("nan"))),
    *(("batch_size", value, WHOLE, 32) for value in (0, 2.5, True)),
    *(("seed", value, SEED, 0) for value in (-1, 2**40, 1.5)),
]


@pytest.mark.parametrize(("name", "value", "needed", "default"), NUMBERS)
def test_numbers_out_of_range(name, value, needed, default):
    student, teacher, _ = pair("bert")
    message = f"recover: {name} is {value!r}, needed {needed}; omit it for {default}."
    with pytest.raises(RecipeError, match=re.escape(message)):
        recover(student, teacher, examples_of("bert", 2), **{name: value})


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from examples_of("bert", 2)


def test_data_sets_without_an_example_or_an_end(tmp_path):
    student, teacher, _ = pair("bert")
    for dataset, message in (
        ([], r"train_dataset \(list\) holds 0 examples, needed 1 or more"),
        (None, "train_dataset is None, needed examples"),
        (Endless(), r"\(Endless\) has no length.*TrainingArguments\(max_steps"),
    ):
        with pytest.raises(DataError, match=message):
            recover(student, teacher, dataset)
    check_examples(Endless(), arguments(tmp_path))


SHORT = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "data_collator": collate}


def _rows(family="bert", count=EXAMPLES):
    return examples_of(family, count)


def _states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _divergence(student, teacher, rows):
    batch = collate_unlabelled(rows)
    with torch.no_grad():
        wanted, found = (m(**batch).logits.log_softmax(-1) for m in (teacher, student))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("lora", [None, 4])
def test_a_cut_student_comes_closer_and_is_saved_as_ever(family, lora, tmp_path):
    pruner, teacher = cut(family, dtype=torch.float32)
    student, rows = pruner.model, _rows(family, 32)
    before = _divergence(student, teacher, rows)
    modules = {name: type(module) for name, module in student.named_modules()}
    record = student.config.to_dict()
    steps = []
    done = pruner.recover(
        teacher,
        rows,
        epochs=6,
        batch_size=8,
        learning_rate=3e-3 if lora is None else 2e-2,
        alpha=1.0,
        lora=lora,
        data_collator=collate,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert isinstance(done, Recovery)
    assert (done.steps, steps[-1], done.metrics) == (24, (24, 24), {})
    assert _divergence(student, teacher, rows) < 0.7 * before
    assert {name: type(module) for name, module in student.named_modules()} == modules
    assert student.config.to_dict() == record
    pruner.save_pretrained(tmp_path / "small")
    loaded = type(student).from_pretrained(tmp_path / "small")
    expected = student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("lora", [None, 2])
def test_only_weights_change(lora, tmp_path, monkeypatch):
    student, teacher, _ = pair("bert", dtype=torch.float32)
    student.config.use_cache = True
    student.bert.encoder.layer[0].train()
    frozen = student.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    flags = [module.training for module in student.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
    before = _states(student)
    attributes = set(vars(student))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recover(student, teacher, _rows(), lora=lora, **SHORT)
    assert [module.training for module in student.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()] == hooks
    assert [p for p in student.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    assert student.config.use_cache is True
    assert set(vars(student)) == attributes
    assert not list(tmp_path.iterdir())
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before[name], student.state_dict()[name])
    assert any((before[key] != value).any() for key, value in student.state_dict().items())
    student.eval()
    frozen.requires_grad_(True)


def test_sixteen_bits_are_trained_in_thirty_two():
    student, teacher, _ = pair("llama", dtype=torch.bfloat16)
    before = _states(student)
    rows = _rows("llama")
    # A single rate this small would be lost in steps of bfloat16 at every step; in sum it is not.
    options = {**SHORT, "epochs": 15, "learning_rate": 3e-5}
    recover(student, teacher, rows, **options)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    moved = [(before[name] != value).float().mean() for name, value in student.state_dict().items()]
    assert max(moved) > 0.2


def test_the_same_seed_is_the_same_student():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    twin, other = copy.deepcopy(student), copy.deepcopy(student)
    recover(student, teacher, _rows(), seed=3, **SHORT)
    recover(twin, teacher, _rows(), seed=3, **SHORT)
    recover(other, teacher, _rows(), seed=4, **SHORT)
    ours, same, different = (m.classifier.weight for m in (student, twin, other))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, different)


def test_labels_are_optional_and_evaluation_is_reported():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    options = {**SHORT, "data_collator": collate_unlabelled}
    assert recover(student, teacher, _rows(), **options).loss > 0
    done = recover(student, teacher, _rows(), eval_dataset=_rows(), **SHORT)
    assert done.metrics["eval_loss"] > 0


def test_arguments_of_the_callers_own(tmp_path):
    student, teacher, _ = pair("bert", dtype=torch.float32)
    done = recover(
        student, teacher, _rows(), args=arguments(tmp_path, max_steps=3), data_collator=collate
    )
    assert done.steps == 3
    with pytest.raises(RecipeError, match="epochs, seed stands beside args=TrainingArguments"):
        recover(student, teacher, _rows(), args=arguments(tmp_path), epochs=1, seed=0)


class Interrupt(tf.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [None, 2])
def test_an_interruption_leaves_a_model_as_it_is_used(lora):
    student, teacher, _ = pair("bert", dtype=torch.bfloat16)
    before = _states(student)
    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, _rows(), lora=lora, callbacks=[Interrupt()], **SHORT)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {
        torch.bfloat16
    }
    if lora is not None:
        assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_config_of_peft():
    from peft import LoraConfig

    student, teacher, _ = pair("bert", dtype=torch.float32)
    before = _states(student)
    config = LoraConfig(r=2, target_modules=["query"])
    recover(student, teacher, _rows(), lora=config, **SHORT)
    moved = {name for name, value in student.state_dict().items() if (before[name] != value).any()}
    assert moved == {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(3)}


def test_a_missing_peft_is_named_before_anything_is_touched(monkeypatch):
    student, teacher, _ = pair("bert")
    monkeypatch.setattr("hf_gradnas.repair.lora.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"lora=4: PEFT is not installed.*pip install peft"):
        recover(student, teacher, _rows(), lora=4)


def test_the_facade_names_the_missing_call():
    student, teacher, _ = pair("bert")
    with pytest.raises(OrderError, match=r"recover: the model is not cut yet; call apply\(plan\)"):
        GradNASPruner(student).recover(teacher, _rows())


def test_a_teacher_that_shares_weights_is_refused():
    student, _, _ = pair("bert")
    with pytest.raises(StructureError, match=r"teacher: its .* is the student's own .*deepcopy"):
        recover(student, student, _rows())


def test_a_compiled_student_is_trained_inside():
    student, teacher, _ = pair("bert", dtype=torch.float32)
    before = _states(student)
    recover(
        torch.compile(student, backend="eager"),
        torch.compile(teacher, backend="eager"),
        _rows(),
        **SHORT,
    )
    assert any((before[name] != value).any() for name, value in student.state_dict().items())


def test_a_model_of_another_library_is_refused():
    student, teacher, _ = pair("bert")
    with pytest.raises(StructureError, match=r"the student is a Linear, needed a PreTrainedModel"):
        recover(torch.nn.Linear(2, 2), teacher, _rows())
    with pytest.raises(StructureError, match=r"the teacher is a Linear, needed a PreTrainedModel"):
        recover(student, torch.nn.Linear(2, 2), _rows())
