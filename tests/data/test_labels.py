"""Labels of classification heads."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig

from hf_gradnas.data.labels import check_same_numbers, class_labels, token_labels
from hf_gradnas.errors import DataError


def _labels(values, *, features=None, label_map=None, **config):
    dataset = Dataset.from_dict({"y": values}, features=features)
    found = class_labels(dataset, "y", _config(**config), origin="data", label_map=label_map)
    return found.values, found.note


def _classes(*names):
    return Features({"y": ClassLabel(names=list(names))})


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


UNKNOWN = {
    "words": (["terrible", "good"], {}),
    "the alphabet agrees": (["no", "yes"], {}),
    "truths": ([True, False], {}),
    "truths, other names": ([True, False], {"names": ("POSITIVE", "NEGATIVE")}),
    "truths as text": (["True", "False"], {}),
    "other names": (["good", "bad"], {"names": ("NEG", "POS")}),
    "one of them known": (["neg", "bad"], {"names": ("NEG", "POS")}),
    "names that differ in case only": (["aa", "AA"], {"names": ("Aa", "aA")}),
    "numbers that are names of others": ([0, 1], {"names": ("1", "0")}),
    "classes": ([0, 1], {"features": _classes("neg", "pos"), "names": ("pos", "neu")}),
    "several at once": ([["a", "b"], ["a"]], {"problem_type": "multi_label_classification"}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_labels_that_could_be_any_output_are_refused(case):
    values, config = UNKNOWN[case]
    with pytest.raises(DataError, match=r"2 outputs, .*which is which is not known.*--label-map"):
        _labels(values, **config)


def test_a_label_map_says_which_is_which():
    given = {"positive": 1, "negative": 0}
    assert _labels(["positive", "Negative "], label_map=given) == (
        [1, 0],
        "labels by --label-map",
    )
    assert _labels([True, False], label_map={"true": 0, "false": 1})[0] == [0, 1]
    assert _labels([1, 2, 3], label_map={"1": 0, "2": 1, "3": 2}, num_labels=3)[0] == [0, 1, 2]
    assert _labels([0, 1], features=_classes("b", "a"), label_map={"a": 0, "b": 1})[0] == [1, 0]
    lists = {"num_labels": 3, "label_map": {"a": 2, "b": 0}}
    assert _labels([["a", "b"], []], **lists)[0] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_a_label_map_may_name_what_the_model_does_not():
    names = {"names": ("NEG", "POS"), "label_map": {"bad": 0}}
    assert _labels(["bad", "pos"], **names)[0] == [0, 1]


BAD_MAP = {
    "names none": (["a", "b"], {"x": 0}, {}, "--label-map names none of them"),
    "too few names": (["a", "b"], {"a": 0}, {}, "the label b, .*not known"),
    "no such output": (["a"], {"a": 2}, {}, "--label-map: names output 2, and the model has 2"),
    "regression": ([1.0], {"a": 0}, {"num_labels": 1}, "a regression, .*omit --label-map"),
    "zeros and ones": ([[0, 1, 1]], {"a": 0}, {"num_labels": 3}, "omit --label-map"),
    "ids": ([0, 1], {"good": 0}, {}, "--label-map names none of them"),
}


@pytest.mark.parametrize("case", BAD_MAP)
def test_a_label_map_that_does_not_fit_is_refused(case):
    values, label_map, config, message = BAD_MAP[case]
    with pytest.raises(DataError, match=message):
        _labels(values, label_map=label_map, **config)


def test_numbers_written_as_text_are_numbers():
    assert _labels(["1", "0"]) == ([1, 0], "labels are numbers, written as text")
    with pytest.raises(DataError, match=r"the data counts from 1, give --label-map 1=0,2=1"):
        _labels(["1", "2"])
    with pytest.raises(DataError, match=r"--label-map 1=0,2=1,3=2,4=3,5=4"):
        _labels([1, 2, 3, 4, 5], num_labels=5)
    assert "if the data counts from 1" in _labels([1, 2], num_labels=3)[1]


def test_the_models_own_numbers_as_words():
    assert _labels(["LABEL_1", "LABEL_0"])[0] == [1, 0]


def test_truths_go_by_name():
    assert _labels([True, False], names=("TRUE", "FALSE"))[0] == [0, 1]


def test_one_table_of_names_is_enough():
    config = BertConfig(num_labels=2)
    config.label2id = {"b": 0, "a": 1}
    dataset = Dataset.from_dict({"y": ["a", "b"]})
    assert class_labels(dataset, "y", config, origin="data").values == [1, 0]
    config.id2label = {0: "b", 1: "a"}
    config.label2id = None
    assert class_labels(dataset, "y", config, origin="data").values == [1, 0]
    config.label2id = {"a": 0, "b": 1}
    with pytest.raises(DataError, match=r"'[ab]' is . in id2label and . in label2id"):
        class_labels(dataset, "y", config, origin="data")


def test_classes_without_names_of_the_model_keep_their_numbers_and_say_so():
    found, note = _labels([0, 1], features=_classes("negative", "positive"))
    assert found == [0, 1]
    assert "the model's labels have no names" in note
    assert "negative = 0, positive = 1" in note
    assert _labels([0, 1], features=_classes("0", "1")) == ([0, 1], None)


def test_data_sets_that_number_one_name_differently_are_refused():
    check_same_numbers({"a": 0, "b": 1}, {"b": 1, "c": 0})
    with pytest.raises(DataError, match=r"label 'a' is number 0 .* and 1 .*--label-map a=NUMBER"):
        check_same_numbers({"a": 0}, {"a": 1})


def test_lists_are_read_in_one_way_in_all_rows():
    with pytest.raises(DataError, match=r"holds \[1, 1, 0\], needed a list of label ids"):
        _labels([[1, 1, 0], [0, 2]], num_labels=3)
    lists = Features({"y": List(ClassLabel(names=["b", "a"]))})
    found, note = _labels([[0], [0, 1]], features=lists, names=("A", "B", "C"))
    assert found == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    assert "b = 1" in note
    single = "single_label_classification"
    with pytest.raises(DataError, match=f"holds lists, but .*{single}"):
        _labels([[0]], problem_type=single)
    with pytest.raises(DataError, match="holds 1, needed a list of labels"):
        _labels([1], problem_type="multi_label_classification")


def test_classes_of_the_same_names_in_another_order_are_matched():
    features = _classes("entailment", "neutral")
    labels, note = _labels([0, 1], features=features, names=("NEUTRAL", "ENTAILMENT"))
    assert labels == [1, 0]
    assert note == ("labels by name, the data's numbers are others: entailment = 1, neutral = 0")
    assert _labels([0, 1], features=features, names=("entailment", "NEUTRAL")) == ([0, 1], None)


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
    assert token_labels(dataset, "y", config, origin="data").values == [[1, 0], [0]]
    ignored = Dataset.from_dict({"y": [[1, -100]]})
    assert token_labels(ignored, "y", config, origin="data").values == [[1, -100]]
    lists = Features({"y": List(ClassLabel(names=["O", "B"]))})
    classes = Dataset.from_dict({"y": [[0, 1]]}, features=lists)
    found = token_labels(classes, "y", config, origin="data")
    assert found.values == [[1, 0]]
    assert "O = 1" in found.note
    by_map = {"O": 0, "B": 1}
    assert token_labels(dataset, "y", _config(), origin="data", label_map=by_map).values == [
        [0, 1],
        [1],
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["O", "B"]], "which is which is not known"),
        ([[True, False]], "which is which is not known"),
        ([["O", None]], "row 0 has no label in token 1"),
        ([["O", ""]], "row 0 has no label in token 1"),
    ],
)
def test_labels_of_tokens_are_not_guessed(rows, message):
    with pytest.raises(DataError, match=message):
        token_labels(Dataset.from_dict({"y": rows}), "y", _config(), origin="data")


BAD = {
    "too high": ([0, 2], {}, "holds the label 2, but the model has 2 outputs .0 to 1."),
    "unlabelled split": ([-1, -1], {}, "holds the label -1"),
    "not whole": ([0.5, 1.0], {}, "holds the label 0.5"),
    "too many words": (["a", "b", "c"], {}, "the 3 labels a, b, c, and the model has 2 outputs"),
    "too few words": (["a", "a"], {}, "the label a, .* LABEL_0, LABEL_1, so which is which"),
    "none": ([0, None], {}, "has no label in row 1"),
    "no number": (["a", "b"], {"num_labels": 1}, "is not all numbers"),
    "not finite": ([1.0, float("nan")], {"num_labels": 1}, "holds nan in row 1"),
    "bad list": ([[5]], {"num_labels": 3}, "needed a list of label ids below 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused(case):
    values, config, message = BAD[case]
    features = Features({"y": Value("float64")}) if case == "not whole" else None
    with pytest.raises(DataError, match=message):
        _labels(values, features=features, **config)


@pytest.mark.parametrize("values", [[{"a": 1}], [[[0]], [[1]]], [[{"a": 1}]]])
def test_what_is_neither_a_label_nor_a_list_of_labels_is_refused(values):
    with pytest.raises(DataError, match="needed a label or a list of labels"):
        _labels(values, num_labels=3)


@pytest.mark.parametrize("values", [[0, 1], ["O", "B"], [[[0]], [[1]]], [{"a": 1}]])
def test_what_is_no_list_of_labels_of_words_is_refused(values):
    dataset = Dataset.from_dict({"y": values})
    with pytest.raises(DataError, match="needed a list of labels, one per word"):
        token_labels(dataset, "y", _config(), origin="data")


def test_names_in_a_config_that_are_no_numbers_are_refused():
    config = _config()
    config.label2id = {"good": "x"}
    with pytest.raises(DataError, match="id2label and label2id of the model's config"):
        class_labels(Dataset.from_dict({"y": ["good"]}), "y", config, origin="data")
