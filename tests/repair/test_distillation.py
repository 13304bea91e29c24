"""The distillation loss of whole models, and what the Trainer makes of it."""

import copy

import pytest
import torch
import transformers as tf
import zoo
from repair_cases import (
    EXAMPLES,
    NO_DROPOUT,
    arguments,
    collate,
    collate_unlabelled,
    loss_of,
    pair,
)
from score_examples import examples_of, in_batches
from torch.nn import functional

from hf_gradnas.errors import DataError, RecipeError, StructureError
from hf_gradnas.repair import Distillation, DistillationTrainer

TEMPERATURE, ALPHA = 3.0, 0.7


def _divergence(student, teacher, temperature=TEMPERATURE):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def _outputs(student, teacher, batch, **options):
    with torch.no_grad():
        return student(**batch, **options), teacher(**batch, **options)


def test_a_classifier_is_the_mean_over_examples(tmp_path):
    student, teacher, batch = pair("bert", **NO_DROPOUT)
    found, wanted = _outputs(student, teacher, batch)
    divergence = _divergence(found.logits, wanted.logits).mean()
    expected = ALPHA * divergence + (1 - ALPHA) * functional.cross_entropy(
        found.logits, batch["labels"]
    )
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=ALPHA)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_language_model_counts_the_tokens_that_it_is_asked_for(labelled, tmp_path):
    student, teacher, batch = pair("llama")
    batch["labels"][:, 3] = -100
    found, wanted = _outputs(student, teacher, batch)
    counted = batch["attention_mask"] != 0
    expected = torch.zeros(())
    if labelled:
        counted = functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        expected = (1 - ALPHA) * found.loss
    else:
        del batch["labels"]
    alpha = ALPHA if labelled else 1
    expected = expected + alpha * _divergence(found.logits, wanted.logits)[counted].mean()
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=ALPHA)
    # Llama computes its loss and its norms in float32.
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_an_encoder_decoder_counts_its_labels(tmp_path):
    student, teacher, batch = pair("t5", dropout_rate=0.0)
    found, wanted = _outputs(student, teacher, batch)
    divergence = _divergence(found.logits, wanted.logits)[batch["labels"] != -100].mean()
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=1.0)
    torch.testing.assert_close(loss, divergence, rtol=1e-6, atol=0)


def _bert(cls, seed, **config):
    torch.manual_seed(seed)
    values = {**zoo.ENCODER, **NO_DROPOUT, **config}
    return getattr(tf, cls)(tf.BertConfig(**values)).double().eval()


def test_a_tagger_counts_labelled_tokens(tmp_path):
    student, teacher = (_bert("BertForTokenClassification", seed) for seed in (0, 1))
    _, batch = zoo.build("bert")
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    found, wanted = _outputs(student, teacher, batch)
    divergence = _divergence(found.logits, wanted.logits)[batch["labels"] != -100].mean()
    expected = ALPHA * divergence + (1 - ALPHA) * found.loss
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=ALPHA)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_a_span_is_two_choices_outside_the_padding(tmp_path):
    student, teacher = (_bert("BertForQuestionAnswering", seed, num_labels=2) for seed in (0, 1))
    _, batch = zoo.build("bert")
    del batch["labels"]
    found, wanted = _outputs(student, teacher, batch)
    choices = [
        _divergence(*(out[side][row, :length] for out in (found, wanted)))
        for side in ("start_logits", "end_logits")
        for row, length in enumerate(zoo.LENGTHS)
    ]
    expected = torch.stack(choices).mean()
    ends = {"start_positions": torch.tensor([1, 2, 1, 0]), "end_positions": torch.tensor([2] * 4)}
    options = {"temperature": TEMPERATURE, "alpha": 1.0}
    for columns in (batch, {**batch, **ends}):
        loss = loss_of(student, teacher, [columns], tmp_path, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_a_regression_matches_numbers(tmp_path):
    student, teacher, batch = pair("bert", num_labels=1, problem_type="regression", **NO_DROPOUT)
    batch["labels"] = torch.randn(zoo.BATCH, dtype=torch.float64)
    found, wanted = _outputs(student, teacher, batch)
    expected = ALPHA * functional.mse_loss(found.logits, wanted.logits) + (1 - ALPHA) * found.loss
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=ALPHA)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_several_labels_are_several_questions(tmp_path):
    kind = "multi_label_classification"
    student, teacher, batch = pair("bert", problem_type=kind, **NO_DROPOUT)
    batch["labels"] = (torch.rand(zoo.BATCH, zoo.LABELS) > 0.5).double()
    found, wanted = _outputs(student, teacher, batch)
    pairs = [torch.stack((out.logits, torch.zeros_like(out.logits)), -1) for out in (found, wanted)]
    expected = ALPHA * _divergence(*pairs).mean() + (1 - ALPHA) * found.loss
    loss = loss_of(student, teacher, [batch], tmp_path, temperature=TEMPERATURE, alpha=ALPHA)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_hidden_states_are_a_mean_over_layers_and_tokens(tmp_path):
    student, teacher, batch = pair("bert", **NO_DROPOUT)
    found, wanted = _outputs(student, teacher, batch, output_hidden_states=True)
    real = batch["attention_mask"] != 0
    errors = [
        ((s - t).norm(dim=-1) ** 2 / t.norm(dim=-1) ** 2)[real].mean()
        for s, t in zip(found.hidden_states, wanted.hidden_states, strict=True)
    ]
    expected = found.loss + 0.4 * torch.stack(errors).mean()
    loss = loss_of(student, teacher, [batch], tmp_path, alpha=0.0, hidden_weight=0.4)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


FAMILIES = [
    *("bert", "gpt2", "llama", "t5", "bart", "vit", "whisper", "resnet", "segformer"),
    *("wav2vec2", "wav2vec2_layer"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_like_its_teacher_has_nothing_to_learn(family, tmp_path):
    dropout = {"t5": {"dropout_rate": 0.0}, "wav2vec2": {"layerdrop": 0.0}}.get(family[:8], {})
    model, batch = zoo.build(family, **dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    _fix_batch_norms(model)
    student, teacher = model, copy.deepcopy(model)
    other, _ = zoo.build(family, seed=1, **dropout)
    weights = {"alpha": 1.0, "hidden_weight": 1.0}
    assert abs(loss_of(student, teacher, [batch], tmp_path, **weights)) < 1e-6
    _fix_batch_norms(other)
    assert loss_of(other, teacher, [batch], tmp_path, **weights) > 1e-4


def _fix_batch_norms(model):
    """Batch norms that stay in eval mode, since a student in training has statistics of its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module


def _train(student, teacher, folder, *, trainer=DistillationTrainer, **changes):
    family = "llama" if "Llama" in type(student).__name__ else "bert"
    extra = {"teacher": teacher, "distillation": changes.pop("weights", Distillation())}
    run = trainer(
        model=student,
        args=arguments(folder, **changes),
        train_dataset=examples_of(family, EXAMPLES),
        data_collator=collate,
        **(extra if trainer is DistillationTrainer else {}),
    )
    run.train()
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


@pytest.mark.leaves_state
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_accumulation_is_one_large_batch(family, hidden, tmp_path):
    options = NO_DROPOUT if family == "bert" else {}
    weights = Distillation(alpha=0.6, hidden_weight=hidden)
    student, teacher, _ = pair(family, **options)
    twin = copy.deepcopy(student)
    with zoo.float64_throughout():
        whole = _train(student, teacher, tmp_path, weights=weights)
        parts = _train(
            twin,
            teacher,
            tmp_path,
            weights=weights,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
    original, _ = zoo.build(family, seed=1, **options)
    moved = max((whole[name] - value).abs().max() for name, value in original.state_dict().items())
    assert moved > 1e-4
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-10)


def test_the_loss_of_uneven_batches_adds_up(tmp_path):
    student, teacher, _ = pair("bert", **NO_DROPOUT)
    rows = examples_of("bert", 7)
    together = loss_of(student, teacher, in_batches(rows, 7), tmp_path)
    apart = loss_of(student, teacher, in_batches(rows, 3), tmp_path)
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=0)


@pytest.mark.leaves_state
def test_alpha_0_is_the_plain_trainer(tmp_path):
    student, teacher, _ = pair("bert")
    twin = copy.deepcopy(student)
    steps = {"max_steps": 3, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    plain = _train(twin, None, tmp_path, trainer=tf.Trainer, **steps)
    ours = _train(student, teacher, tmp_path, weights=Distillation(alpha=0.0), **steps)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-12)


@pytest.mark.leaves_state
def test_labels_are_smoothed_as_in_the_plain_trainer(tmp_path):
    student, teacher, _ = pair("bert", **NO_DROPOUT)
    twin = copy.deepcopy(student)
    plain = _train(twin, None, tmp_path, trainer=tf.Trainer, label_smoothing_factor=0.2)
    weights = Distillation(alpha=0.0)
    ours = _train(student, teacher, tmp_path, weights=weights, label_smoothing_factor=0.2)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-12)


def test_alpha_1_ignores_labels(tmp_path):
    student, teacher, batch = pair("bert", **NO_DROPOUT)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    found = [
        loss_of(student, teacher, [columns], tmp_path, alpha=alpha)
        for columns, alpha in ((batch, 1.0), (unlabelled, 1.0), (unlabelled, 0.2))
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.leaves_state
def test_the_teacher_is_put_back_as_it_was(tmp_path):
    student, teacher, _ = pair("bert")
    teacher.train()
    first = next(teacher.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen = []
    hook = teacher.register_forward_hook(lambda model, *_: seen.append(model.training))
    _train(student, teacher, tmp_path)
    hook.remove()
    assert not any(seen)
    assert all(module.training for module in teacher.modules())
    assert [p for p in teacher.parameters() if not p.requires_grad] == [first]
    assert all(p.grad is None for p in teacher.parameters())
    assert all((before[name] == value).all() for name, value in teacher.state_dict().items())


@pytest.mark.leaves_state
def test_evaluation_is_the_plain_trainers(tmp_path):
    student, teacher, _ = pair("bert")
    rows = examples_of("bert", EXAMPLES)
    common = {
        "model": student,
        "args": arguments(tmp_path),
        "eval_dataset": rows,
        "data_collator": collate,
    }
    plain = tf.Trainer(**common).evaluate()["eval_loss"]
    ours = DistillationTrainer(teacher=teacher, **common)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    ours.data_collator = collate_unlabelled
    assert ours.predict(rows).predictions.shape == (EXAMPLES, zoo.LABELS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, needed a number above 0"),
        ({"alpha": 1.5}, "alpha is 1.5, needed a number from 0 to 1"),
        ({"temperature": float("nan")}, "temperature is nan, needed a number above 0"),
        ({"alpha": "0.5"}, "alpha is '0.5', needed a number from 0 to 1"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0, needed 0 or more"),
        ({"attention_weight": float("inf")}, "attention_weight is inf, needed 0 or more"),
    ],
)
def test_weights_out_of_range(weights, message):
    with pytest.raises(RecipeError, match=message):
        Distillation(**weights)


def test_a_teacher_of_other_labels_is_refused(tmp_path):
    student, _, batch = pair("bert")
    teacher, _ = zoo.build("bert", num_labels=5)
    del batch["labels"]
    with pytest.raises(StructureError, match=r"predicts \(4, 1, 5\), the student \(4, 1, 3\)"):
        loss_of(student, teacher, [batch], tmp_path)
    student.eval()


def test_an_encoder_decoder_needs_something_to_decode(tmp_path):
    student, teacher, batch = pair("t5", dropout_rate=0.0)
    labels = batch.pop("labels")
    message = r"T5ForConditionalGeneration .* only \['attention_mask', 'input_ids'\], needed labels"
    with pytest.raises(DataError, match=message):
        loss_of(student, teacher, [batch], tmp_path)
    student.eval()
    batch["decoder_input_ids"] = labels.clamp(min=0)
    assert loss_of(student, teacher, [batch], tmp_path) > 0
    del batch["input_ids"]
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        loss_of(student, teacher, [batch], tmp_path)
    student.eval()


def test_hidden_states_of_other_widths_are_refused(tmp_path):
    student, _, batch = pair("bert")
    teacher, _ = zoo.build("bert", hidden_size=32)
    with pytest.raises(StructureError, match=r"hidden_states: the student has .* hidden_weight=0"):
        loss_of(student, teacher, [batch], tmp_path, hidden_weight=1.0)
    student.eval()
    shallow, _ = zoo.build("bert", num_hidden_layers=2)
    with pytest.raises(StructureError, match="their widths must match"):
        loss_of(student, shallow, [batch], tmp_path, hidden_weight=1.0)
    student.eval()
