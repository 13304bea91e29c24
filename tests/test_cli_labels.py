"""Labels of classification heads."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig

from hf_gradnas.cli.labels import class_labels, token_labels
from hf_gradnas.errors import DataError


def _labels(values, *, features=None, **config):
    dataset = Dataset.from_dict({"y": values}, features=features)
    return class_labels(dataset, "y", _config(**config), origin="data")


def _config(*, names=None, **values):
    if names is not None:
        values["id2label"] = dict(enumerate(names))
        values["label2id"] = {name: index for index, name in enumerate(names)}
    return BertConfig(**values)


def test_ids_stay():
    assert _labels([0, 1, 1])[0] == [0, 1, 1]
    assert _labels([0.0, 1.0])[0] == [0, 1]


def test_words_go_by_the_names_of_the_model():
    assert _labels(["bad", "good"], names=("GOOD", "BAD"))[0] == [1, 0]


def test_unknown_words_go_in_sorted_order():
    labels, note = _labels(["yes", "no", "yes"])
    assert labels == [1, 0, 1]
    assert note == "labels in sorted order: no = 0, yes = 1"


def test_classes_of_the_same_names_in_another_order_are_matched():
    features = Features({"y": ClassLabel(names=["entailment", "neutral"])})
    assert _labels([0, 1], features=features, names=("NEUTRAL", "ENTAILMENT"))[0] == [1, 0]


def test_some_of_the_models_own_names_are_enough():
    assert _labels(["bad", "bad"], names=("GOOD", "BAD"))[0] == [1, 1]


def test_one_output_is_a_regression():
    assert _labels([1, 2.5, 3], num_labels=1)[0] == [1.0, 2.5, 3.0]


def test_several_labels_at_once():
    assert _labels([[0, 2], []], num_labels=3)[0] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    multi = {"num_labels": 2, "problem_type": "multi_label_classification"}
    assert _labels([[0.0, 1.0]], **multi)[0] == [[0.0, 1.0]]


def test_labels_of_tokens():
    dataset = Dataset.from_dict({"y": [["O", "B"], ["B"]]})
    config = _config(names=("B", "O"))
    assert token_labels(dataset, "y", config, origin="data") == [[1, 0], [0]]
    ignored = Dataset.from_dict({"y": [[1, -100]]})
    assert token_labels(ignored, "y", config, origin="data") == [[1, -100]]


BAD = {
    "too high": ([0, 2], {}, "holds the label 2, but the model has 2 outputs .0 to 1."),
    "unlabelled split": ([-1, -1], {}, "holds the label -1"),
    "not whole": ([0.5, 1.0], {}, "holds the label 0.5"),
    "too many words": (["a", "b", "c"], {}, "the 3 labels a, b, c, and the model has 2 outputs"),
    "too few words": (["a", "a"], {}, "the 1 labels a, .* LABEL_0, LABEL_1, so which is which"),
    "none": ([0, None], {}, "has no label in row 1"),
    "no number": (["a", "b"], {"num_labels": 1}, "is not all numbers"),
    "bad list": ([[5]], {"num_labels": 3}, "needed a list of label ids below 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused(case):
    values, config, message = BAD[case]
    features = Features({"y": Value("float64")}) if case == "not whole" else None
    with pytest.raises(DataError, match=message):
        _labels(values, features=features, **config)
