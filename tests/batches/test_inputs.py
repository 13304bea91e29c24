"""What no model can be scored with is refused by name, and the model is left as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from torch.utils.data import DataLoader

from hf_gradnas import GradNASPruner, Scores
from hf_gradnas.batches.longest import check_inputs
from hf_gradnas.errors import DataError, PlanError, ScoresError, StructureError
from hf_gradnas.scores import check_scores
from hf_gradnas.structure.trace import trace_forward


@pytest.fixture(scope="module")
def bert():
    """A pruner that knows its model's structure, and a batch."""
    model, inputs = zoo.build("bert")
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    return pruner, inputs


def _put(value):
    def change(column):
        column = column.clone()
        column.view(-1)[-1] = value
        return column

    return change


COLUMNS = {
    "a list": ("input_ids", lambda c: c.tolist(), "input_ids as a list"),
    "an array": ("input_ids", lambda c: c.numpy(), "input_ids as a ndarray"),
    "a text": ("input_ids", lambda c: "text", "input_ids as a str"),
    "a mask of lists": ("attention_mask", lambda c: [c], "attention_mask as a list"),
    "a number": ("labels", lambda c: c[0], r"labels of shape \(\), needed one row per"),
    "labels of an array": ("labels", lambda c: c.numpy(), "labels as a ndarray"),
    "one dimension": ("input_ids", torch.flatten, r"input_ids of shape \(48,\)"),
    "no dimension": ("input_ids", lambda c: c[0, 0], r"input_ids of shape \(\)"),
    "no tokens": ("input_ids", lambda c: c[:, :0], r"input_ids of shape \(4, 0\)"),
    "sparse": ("input_ids", lambda c: c.to_sparse(), "sparse_coo"),
    "meta": ("labels", lambda c: c.to("meta"), "on meta"),
    "complex": ("labels", lambda c: c.to(torch.complex64), "complex64"),
    "bool ids": ("input_ids", lambda c: c.bool(), "input_ids of torch.bool"),
    "real ids": ("input_ids", lambda c: c + 0.5, "input_ids of torch.float32"),
    "negative ids": ("input_ids", _put(-1), "input_ids with the id -1, needed 0 to 159"),
    "ids beyond the vocabulary": ("input_ids", _put(160), "the id 160, needed 0 to 159"),
    "labels out of range": ("labels", _put(3), "labels with the id 3, needed 0 to 2"),
    "negative labels": ("labels", _put(-1), "labels with the id -1, needed 0 to 2, or -100"),
    "labels of one row less": ("labels", lambda c: c[:-1], "different numbers of rows"),
    "another length": ("attention_mask", lambda c: c[:, :-1], "fails on columns|cannot run"),
    "real labels": ("labels", lambda c: c + 0.5, "fails on columns"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_no_model_takes_is_refused(case, bert):
    name, change, match = COLUMNS[case]
    pruner, inputs = bert
    odd = {**inputs, name: change(inputs[name])}
    before = copy.deepcopy(pruner.model.state_dict())
    config = pruner.model.config.to_dict()
    with pytest.raises(DataError, match=match):
        pruner.score([inputs, odd])
    assert pruner.model.config.to_dict() == config
    after = pruner.model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    if case != "real labels":  # structure is found without labels
        with pytest.raises(DataError):
            GradNASPruner(pruner.model).score([odd])


def test_tokens_of_language_models_are_compared_with_their_vocabulary():
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    for value, match in ((160, "needed 0 to 159, or -100"), (-5, "labels with the id -5")):
        odd = {**inputs, "labels": _put(value)(inputs["labels"])}
        with pytest.raises(DataError, match=match):
            pruner.score([inputs, odd])
    odd = {**inputs, "labels": inputs["labels"][:, 0]}
    with pytest.raises(DataError, match=r"labels of shape \(4,\).*needed one id per token"):
        pruner.score([inputs, odd])


LOADERS = {
    "nothing": (None, "found a NoneType, which cannot be iterated over"),
    "a number": (3, "found a int"),
    "a function": (lambda: None, "found a function"),
    "one batch": ({"input_ids": torch.ones(2, 3)}, r"found one mapping, .* \[batch\]"),
    "a text": ("text", "[bB]atch 0 is a str"),
    "ragged": (
        DataLoader([{"input_ids": torch.ones(n, dtype=torch.long)} for n in (2, 3)], batch_size=2),
        "batch 0 cannot be made .*give it a collate_fn",
    ),
    "anything": (DataLoader([1, "a"], batch_size=2), "batch 0 cannot be made"),
    "a name that is no text": ([{3: torch.ones(2, 2)}], "needed names of the model's inputs"),
}


@pytest.mark.parametrize("case", LOADERS)
def test_what_is_no_loader_is_refused(case, bert):
    loader, match = LOADERS[case]
    for pruner in (bert[0], GradNASPruner(bert[0].model)):
        with pytest.raises(DataError, match=match):
            pruner.score(loader)


SETTINGS = {
    "num_examples": ("8", 1.5, True, -1, [1]),
    "seed": (-1, 0.5, "0", None, True),
    "file": ("", 3, [1], True),
    "progress": (3, "x"),
    "labels": (None, [], 1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_another_kind_is_refused(name, bert):
    pruner, inputs = bert
    for value in SETTINGS[name]:
        with pytest.raises((DataError, ScoresError), match=f"^{name}="):
            pruner.score([inputs], **{name: value})


@pytest.mark.parametrize("length", [0, -1, True, 1.5, "8"])
def test_a_length_that_is_none_is_refused(length):
    model, inputs = zoo.build("bert")
    with pytest.raises(DataError, match="flops_length="):
        GradNASPruner(model).discover(inputs, flops_length=length)


def test_a_length_of_flops_beyond_the_positions_is_refused():
    model, inputs = zoo.build("bert")
    limit = model.config.max_position_embeddings
    with pytest.raises(DataError, match=rf"^flops_length={limit + 1}: the model has {limit} pos"):
        GradNASPruner(model).discover(inputs, flops_length=limit + 1)


def test_packed_sequences_may_be_longer_than_the_positions():
    model, inputs = zoo.build("llama")
    long = {name: value[:1].repeat(1, 6) for name, value in inputs.items()}
    with pytest.raises(DataError, match="max_position_embeddings"):
        check_inputs(long, model, None)
    places = torch.arange(long["input_ids"].shape[1])[None]
    check_inputs({**long, "position_ids": places % 12}, model, None)
    with pytest.raises(DataError, match="max_position_embeddings"):
        check_inputs({**long, "position_ids": places}, model, None)


def test_a_limit_of_minus_one_is_none():
    model, inputs = zoo.build("bert")
    model.config.max_position_embeddings = -1  # XLNet
    check_inputs(inputs, model, 99)


def test_what_is_no_model_or_choice_is_refused():
    model, _ = zoo.build("bert")
    for odd in (3, "bert", None, type(model), model.config):
        with pytest.raises(StructureError, match="needed a Transformers PreTrainedModel"):
            GradNASPruner(odd)
    for name in ("score", "search", "layout"):
        for odd in (None, [], {}, 1):
            with pytest.raises(PlanError, match=f"{name}="):
                GradNASPruner(model, **{name: odd})
    with pytest.raises(ScoresError, match="accelerator: found a str"):
        GradNASPruner(model, accelerator="cuda")


def test_whatever_the_models_own_code_raises_is_named():
    model, inputs = zoo.build("bert")

    def fail(*_):
        raise KeyError("on purpose")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(DataError, match=r"BertForSequenceClassification cannot run .*on purpose"):
        trace_forward(model, inputs)
    handle.remove()


def test_a_loader_that_was_made_in_inference_mode_is_scored():
    model, inputs = zoo.build("vit")
    with torch.inference_mode():
        made = {name: value.clone() for name, value in inputs.items()}
    found = GradNASPruner(model).score([made])
    expected = GradNASPruner(model).score([inputs])
    for name, values in expected.values.items():
        np.testing.assert_array_equal(found.values[name], values)


def test_what_transformers_guesses_from_the_labels_is_forgotten():
    model, inputs = zoo.build("bert", problem_type=None)
    GradNASPruner(model).score([inputs])
    assert model.config.problem_type is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v * np.nan, "numbers that are not finite"),
        (lambda v: v + np.inf, "numbers that are not finite"),
        (lambda v: v.astype(np.int64), "the scores hold int64"),
        (lambda v: v > 0, "the scores hold bool"),
        (lambda v: v.astype(str), "the scores hold <U"),
        (list, "the scores hold list"),
        (lambda v: v[:-1], r"the scores hold \(3,\)"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(change, match, bert):
    pruner, inputs = bert
    model = pruner.model
    scores = pruner.score([inputs])
    axis = pruner.structure.axes[0]
    odd = Scores({**scores.values, axis.name: change(scores.values[axis.name])}, scores.metadata)
    with pytest.raises(ScoresError, match=match):
        check_scores(odd, model, pruner.structure.axes)
    with pytest.raises(ScoresError, match="their method is 'magic'"):
        check_scores(
            Scores(scores.values, {**scores.metadata, "method": "magic"}),
            model,
            pruner.structure.axes,
        )
    assert pruner.scores is scores


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("settings", text) for text in ("[" * 50_000, "null", "3", "", "{'a': 1}")),
        *(
            (key, text)
            for key in ("examples", "batches", "steps")
            for text in ("", "-1", "1.5", "x")
        ),
        ("loss_sum", "x"),
        ("labels_scored", "1e3"),
        ("complete", "maybe"),
        ("normaliser", "x"),
        ("data_fingerprint", "x"),
        ("examples", None),
        ("data_fingerprint", None),
    ],
)
def test_a_damaged_resume_file_is_named_and_kept(key, value, tmp_path, bert):
    (pruner, inputs), file = bert, tmp_path / "scores.safetensors"
    scores = pruner.score([inputs], file=file)
    metadata = {name: text for name, text in scores.metadata.items() if name != key}
    damaged = metadata if value is None else {**metadata, key: value}
    replace(scores, metadata=damaged).save(file)
    before = file.read_bytes()
    with pytest.raises(ScoresError, match=rf"scores.safetensors is damaged \({key}"):
        pruner.score([inputs], file=file)
    assert file.read_bytes() == before
