"""Which columns are read: by what was asked, by common names, by type."""

import pytest
from datasets import Dataset

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.columns import Columns, choose_columns
from hf_gradnas.data.files import Rows
from hf_gradnas.data.tasks import Head
from hf_gradnas.errors import DataError


def _choose(columns, head=Head.CLASS, feeds="text", labelled=True, **recipe):
    rows = Rows(Dataset.from_dict(columns), "data")
    recipe = Recipe(model="m", **recipe)
    return choose_columns(rows, recipe, head=head, feeds=feeds, labelled=labelled)


CASES = {
    "common names": (
        {"id": [1], "Sentence": ["a"], "label": [0]},
        Columns(text=("Sentence",), label="label"),
    ),
    "types": (
        {"idx": [3], "phrase": ["a"], "polarity": [0]},
        Columns(text=("phrase",), label="polarity"),
    ),
    "a pair": (
        {"premise": ["a"], "hypothesis": ["b"], "label": [0]},
        Columns(text=("premise", "hypothesis"), label="label"),
    ),
    "words as labels": ({"text": ["a"], "label": ["pos"]}, Columns(text=("text",), label="label")),
}


@pytest.mark.parametrize("case", CASES)
def test_columns_are_found(case):
    columns, expected = CASES[case]
    assert _choose(columns) == expected


def test_what_was_asked_for_wins():
    data = {"text": ["a"], "other": ["b"], "third": ["c"], "label": [0], "stars": [1]}
    chosen = _choose(data, text_column="other, third", label_column="stars")
    assert chosen == Columns(text=("other", "third"), label="stars")
    assert str(chosen) == "text = other + third, label = stars"


def test_labels_are_not_looked_for_when_the_model_gives_them():
    assert _choose({"text": ["a"]}, labelled=False) == Columns(text=("text",))


def test_targets_of_sequence_models():
    data = {"id": ["x"], "article": ["a"], "highlights": ["b"]}
    assert _choose(data, Head.SEQ2SEQ) == Columns(text=("article",), target="highlights")


def test_tokens_with_tags():
    data = {"tokens": [["a"]], "pos_tags": [[0]], "ner_tags": [[1]]}
    assert _choose(data, Head.TOKENS) == Columns(text=("tokens",), label="ner_tags")


def test_questions_with_answers():
    data = {"question": ["a"], "context": ["b"], "answers": [{"text": ["b"], "answer_start": [0]}]}
    assert _choose(data, Head.SPAN) == Columns(text=("question", "context"), target="answers")


def test_images_and_audio_may_be_paths():
    data = {"file_name": ["a.png"], "label": [0]}
    assert _choose(data, feeds="image") == Columns(image="file_name", label="label")
    data = {"file": ["a.wav"], "sentence": ["a"]}
    chosen = _choose(data, Head.SEQ2SEQ, feeds="audio")
    assert chosen == Columns(audio="file", target="sentence")


BAD = {
    "no label": (
        {"text": ["a"], "note": ["b"]},
        {},
        "no column besides text, .* that could be the label; its columns are text, note;"
        ".*--label-column.*--labels",
    ),
    "asked label": ({"text": ["a"]}, {"label_column": "y"}, "has no column 'y'.*--label-column"),
    "asked text": ({"text": ["a"]}, {"text_column": "y"}, "has no column 'y'.*--text-column"),
    "three texts": (
        {"a": ["x"], "b": ["y"], "c": ["z"], "label": [1]},
        {"text_column": "a,b,c"},
        "--text-column a,b,c: names 3 columns, .* one column, or two of a pair",
    ),
    "two texts to go on from": (
        {"a": ["x"], "b": ["y"]},
        {"text_column": "a,b", "head": Head.CAUSAL},
        "--text-column a,b: names 2 columns, .* one column; omit",
    ),
    "a question alone": (
        {"question": ["x"], "answers": ["y"]},
        {"text_column": "question", "head": Head.SPAN},
        "--text-column question: names 1 columns, .* two; give QUESTION,CONTEXT",
    ),
    "no text": ({"label": [1]}, {}, "could be the text; its columns are label; .*--text-column"),
}


@pytest.mark.parametrize("case", BAD)
def test_missing_columns_name_those_there_are(case):
    columns, options, message = BAD[case]
    with pytest.raises(DataError, match=message):
        _choose(columns, **options)
