"""Weights that the checkpoint does not hold, and heads of another task."""

import json

import pytest
from cli_cases import save_bert, save_t5

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.heads import check_head
from hf_gradnas.data.loading import load_model, open_source
from hf_gradnas.errors import GradNASWarning, RecipeError


def _check(folder, **values):
    recipe = Recipe(model=str(folder), device="cpu", **values)
    source = open_source(recipe, str(folder))
    model, missing = load_model(recipe, source, str(folder))
    check_head(recipe, source, model, missing)
    return missing


def _edit(folder, **values):
    file = folder / "config.json"
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(content), encoding="utf-8")


OTHER = {
    "a classifier of a base": ("BertModel", "text-classification", "classifier.bias"),
    "a classifier of a language model": ("BertForMaskedLM", "sentiment-analysis", "bert.pooler"),
    "words of a classifier": ("BertForSequenceClassification", "fill-mask", "cls.predictions"),
    "answers of a classifier": ("BertForSequenceClassification", "question-answering", "qa_out"),
    "a pooler": ("BertForMaskedLM", "feature-extraction", "pooler.dense"),
    "classes of words": ("BertForSequenceClassification", "ner", "trained for text-classification"),
    "next words of words": ("BertForMaskedLM", "causal-lm", "was trained for fill-mask"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_head_of_another_task_stops_unless_asked_for(case, tmp_path):
    cls, task, named = OTHER[case]
    save_bert(tmp_path, cls)
    with pytest.raises(RecipeError, match=rf"\({cls}\) .*{named}.*--allow-new-head"):
        _check(tmp_path, task=task)
    _check(tmp_path, task=task, allow_new_head=True)
    assert _check(tmp_path) == []


def test_the_same_task_in_other_words_is_no_new_head(tmp_path):
    save_bert(tmp_path / "bert", "BertForMaskedLM")
    assert _check(tmp_path / "bert", task="masked-lm") == []
    save_bert(tmp_path / "pooled", "BertForSequenceClassification")
    assert _check(tmp_path / "pooled", task="feature-extraction") == []
    assert _check(save_t5(tmp_path / "t5"), task="translation") == []


def test_a_checkpoint_of_two_heads_serves_the_one_that_its_config_names(tmp_path):
    save_bert(tmp_path, "BertForPreTraining")  # as bert-base-uncased on the Hub
    _edit(tmp_path, architectures=["BertForMaskedLM"])
    assert _check(tmp_path) == []


def test_a_body_without_weights_is_never_accepted(tmp_path):
    save_bert(tmp_path)
    _edit(tmp_path, num_hidden_layers=3)
    for values in ({}, {"allow_new_head": True}):
        with pytest.raises(RecipeError, match=r"for bert\.encoder\.layer\.2.*not its head"):
            _check(tmp_path, **values)


def test_weights_that_are_dropped_are_told(tmp_path):
    save_bert(tmp_path)
    _edit(tmp_path, num_hidden_layers=1)
    with pytest.warns(GradNASWarning, match=r"does not use bert\.encoder\.layer\.1.*dropped"):
        _check(tmp_path)
    with pytest.warns(GradNASWarning, match=r"BertModel: does not use .*encoder\.layer\.1"):
        _check(tmp_path, task="feature-extraction")
