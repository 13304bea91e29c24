"""Numbers and data sets that cannot be trained with are refused before anything is touched."""

import re

import pytest
import torch
from repair_cases import arguments, pair
from score_examples import examples_of

from hf_gradnas.errors import DataError, RecipeError
from hf_gradnas.repair import recover
from hf_gradnas.repair.arguments import check_examples

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
