"""Without data to evaluate on, examples of the calibration data are measured and not scored."""

import json
import re

import datasets
import pytest
from cli_cases import (
    save_bert,
    save_llama,
    save_vit,
    write_images,
    write_jsonl,
    write_text,
    write_tsv,
)

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.examples import Collator, Examples
from hf_gradnas.data.feeds import FEWEST_OF_ALL, divide, span, wanted, without
from hf_gradnas.pruner import GradNASPruner
from hf_gradnas.types import Scores

TINY = ["--num-examples", "8", "--batch-size", "4", "--target", "flops=80%", "--no-report"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "bert")


def _document(folder):
    return json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))


# -- how many --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "scored", "expected"),
    [
        (10**6, 512, (512, 128)),  # in addition to those that are scored
        (640, 512, (512, 128)),
        (600, 512, (480, 120)),  # a fifth, which is more than the 88 that are left
        (512, 512, (410, 102)),
        (24, 8, (8, 16)),
        (20, 8, (8, 12)),
        (40, 512, (32, 8)),
        (39, 512, (39, 0)),  # too few to say anything
        (1, 512, (1, 0)),
        (10**6, 10**5, (10**5, 256)),
    ],
)
def test_as_many_as_asked_for_are_scored_where_the_data_has_more(found, scored, expected):
    most = wanted(Recipe(model="m", num_examples=scored))
    assert divide(min(found, scored + most), scored, most) == expected
    assert sum(expected) <= found
    assert expected[1] == 0 or expected[1] >= FEWEST_OF_ALL


@pytest.mark.parametrize(
    "options", [{"eval": False}, {"eval_dataset": "dev.tsv"}, {"eval_split": "test"}]
)
def test_nothing_is_held_out_where_it_is_not_needed(options):
    most = wanted(Recipe(model="m", num_examples=512, **options))
    assert most == 0
    assert divide(512, 512, most) == (512, 0)
    assert divide(30, 512, most) == (30, 0)


def test_the_number_can_be_asked_for():
    assert wanted(Recipe(model="m", num_examples=512, eval_num_examples=3)) == 3
    assert divide(515, 512, 3) == (512, 3)


def test_parts_of_examples():
    examples = Examples(10, lambda index: {"index": index}, "note")
    assert [row["index"] for row in span(examples, 3, 4)] == [3, 4, 5, 6]
    assert span(examples, 3, 4).note == "note"
    for first, count in ((3, 4), (0, 2), (8, 2), (8, 5), (0, 0)):
        left = [row["index"] for row in without(examples, first, count)]
        assert left == [i for i in range(10) if not first <= i < first + count]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """The token ids of every example that was scored, measured and trained on, as text."""
    rows = {"scored": [], "measured": [], "trained": []}
    state = ["measured"]
    plain = Collator.__call__

    def collate(self, examples):
        batch = plain(self, examples)
        key = "input_ids" if "input_ids" in batch else "pixel_values"
        rows[state[0]] += [str(row.tolist()) for row in batch[key]]
        return batch

    def during(name, call):
        def run(*args, **kwargs):
            state[0] = name
            try:
                return call(*args, **kwargs)
            finally:
                state[0] = "measured"

        return run

    import hf_gradnas.repair

    monkeypatch.setattr(Collator, "__call__", collate)
    monkeypatch.setattr(GradNASPruner, "score", during("scored", GradNASPruner.score))
    monkeypatch.setattr("hf_gradnas.repair.recover", during("trained", hf_gradnas.repair.recover))
    return rows


def _numbered(file, count):
    """Sentences that all differ, with labels."""
    words = "a book film cast plot story long old".split()
    lines = []
    for index in range(count):
        text = " ".join(words[(index >> 3 * place) % 8] for place in range(3))
        lines.append(f"{text}\t{index % 2}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_held_out_examples_are_neither_scored_nor_trained_on(prune, bert, tmp_path, seen):
    data = _numbered(tmp_path / "train.tsv", 60)
    recover = ["--recover-epochs", "1", "--recover-batch-size", "8"]
    code, out, _ = prune("--model", bert, "--dataset", data, *recover, *TINY)
    assert code == 0
    scored, trained = set(seen["scored"]), set(seen["trained"])
    measured = set(seen["measured"]) - scored  # discovery looks at the first batch too
    assert (len(scored), len(measured)) == (8, 16)
    assert len(trained) == 44
    assert not measured & (scored | trained)
    assert scored < trained
    assert "Measured on 16 examples held out from the calibration data (train.tsv)" in out
    assert re.search(r"--eval-dataset +16 examples held out from --dataset", out)
    assert re.search(r"--num-examples +8 ", out)
    document = _document(tmp_path / "bert-gradnas")
    assert document["evaluation"] == {
        "dataset": "./train.tsv",  # no path names a user
        "examples": 16,
        "held_out": True,
        "scored_too": False,
        "scores_given": False,
        "labels": "data",
    }
    assert set(document["metrics"]) == {"before", "after", "recovered"}
    assert document["metrics"]["after"]["examples"] == 16
    assert document["calibration"]["examples"] == 8
    assert Scores.load("bert-gradnas.scores.safetensors").metadata["examples"] == "8"
    card = (tmp_path / "bert-gradnas" / "README.md").read_text(encoding="utf-8")
    assert "16 examples held out from the calibration data (train)" in card
    assert "eval_results" not in card
    assert "model-index" not in card  # no claim about a data set's own split


def test_a_limit_of_recovery_counts_what_is_trained_on(prune, bert, tmp_path, seen):
    data = _numbered(tmp_path / "train.tsv", 60)
    recover = ["--recover-epochs", "1", "--recover-num-examples", "12"]
    code, out, _ = prune("--model", bert, "--dataset", data, "--shuffle", *recover, *TINY)
    assert code == 0
    assert "recovered on 12 examples" in out
    trained, scored = set(seen["trained"]), set(seen["scored"])
    assert len(trained) == 12
    assert scored < trained
    assert not (set(seen["measured"]) - scored) & trained


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]])
def test_running_text_is_held_out_in_whole_sequences(shuffle, prune, tmp_path, seen):
    text = write_text(tmp_path / "text.txt", 200)
    llama = save_llama(tmp_path / "llama")
    code, out, _ = prune(
        *("--model", llama, "--dataset", text, "--max-length", "16", "--dry-run"), *shuffle, *TINY
    )
    assert code == 0
    scored, measured = set(seen["scored"]), set(seen["measured"]) - set(seen["scored"])
    assert (len(scored), len(measured)) == (8, 16)
    assert re.search(r"perplexity +\d+\.\d+ +\d+\.\d+", out)
    assert "after (masked)" in out
    assert "Measured on 16 examples held out from the calibration data (text.txt)" in out


def test_no_eval_measures_nothing_and_scores_all(prune, bert, tmp_path):
    data = write_tsv(tmp_path / "train.tsv", 24)
    many = ["--num-examples", "24", *TINY[2:], "--no-eval"]
    code, out, _ = prune("--model", bert, "--dataset", data, *many)
    assert code == 0
    assert "Measured" not in out
    assert "nothing is measured" not in out
    assert re.search(r"--eval +no +given", out)
    document = _document(tmp_path / "bert-gradnas")
    assert "metrics" not in document
    assert "evaluation" not in document
    assert document["calibration"]["examples"] == 24
    assert document["recipe"]["eval"] is False
    code, out, _ = prune("--recipe", "bert-gradnas/recipe.yaml", "--output", "again")
    assert code == 0
    assert "Measured" not in out


def test_too_few_examples_are_all_scored_and_it_is_said(prune, bert, tmp_path):
    data = write_tsv(tmp_path / "train.tsv", 12)
    code, out, _ = prune("--model", bert, "--dataset", data, *TINY)
    assert code == 0
    assert "Note: nothing is measured: 12 examples are too few to hold some out" in out
    card = (tmp_path / "bert-gradnas" / "README.md").read_text(encoding="utf-8")
    assert "Nothing was measured" in card


def test_where_the_data_ends_a_fifth_of_it_is_held_out(prune, bert, tmp_path):
    data = write_tsv(tmp_path / "train.tsv", 50)
    many = ["--num-examples", "50", *TINY[2:], "--dry-run"]
    code, out, _ = prune("--model", bert, "--dataset", data, *many)
    assert code == 0
    assert "40 (10 more are held out; at most 50)" in out
    assert "Measured on 10 examples" in out


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_without_labels_the_pruned_model_is_compared_with_the_whole_one(cls, prune, tmp_path):
    bert = save_bert(tmp_path / "bert", cls)
    text = write_text(tmp_path / "text.txt", 120)
    data = ["--dataset", text, "--labels", "model", "--max-length", "12"]
    code, out, _ = prune("--model", bert, *data, *TINY)
    assert code == 0
    assert re.search(r"agreement +1\.0000 +\d\.\d+", out)
    assert "those that the whole model predicts take their place" in out
    document = _document(tmp_path / "bert-gradnas")
    assert document["evaluation"]["labels"] == "whole model"
    assert document["metrics"]["before"]["agreement"] == 1.0
    assert "accuracy" not in document["metrics"]["after"]
    card = (tmp_path / "bert-gradnas" / "README.md").read_text(encoding="utf-8")
    assert "labelled by the whole model's own predictions" in card


def test_several_labels_at_once_are_compared_too(prune, tmp_path):
    options = {"problem_type": "multi_label_classification", "num_labels": 3}
    bert = save_bert(tmp_path / "bert", **options)
    text = write_text(tmp_path / "text.txt", 120)
    data = ["--dataset", text, "--labels", "model", "--max-length", "12", "--dry-run"]
    code, out, _ = prune("--model", bert, *data, *TINY)
    assert code == 0
    assert re.search(r"agreement +1\.0000 +\d\.\d+", out)


def test_what_cannot_be_measured_says_why(prune, tmp_path):
    text = write_text(tmp_path / "text.txt", 120)
    rows = [{"question": "a film", "context": f"the book {i} is old"} for i in range(40)]
    cases = {
        "base": ("BertModel", {}, "BertModel has no head whose loss could be measured"),
        "span": ("BertForQuestionAnswering", {}, "there are none to measure against"),
        "number": (
            "BertForSequenceClassification",
            {"num_labels": 1},
            "there are none to measure against",
        ),
    }
    for name, (cls, config, reason) in cases.items():
        model = save_bert(tmp_path / name, cls, **config)
        file = write_jsonl(tmp_path / "rows.jsonl", rows) if name == "span" else text
        data = ["--dataset", file, "--labels", "model", "--max-length", "12", "--dry-run"]
        code, out, err = prune("--model", model, *data, *TINY)
        assert code == 0, err
        assert re.search(f"Note: nothing is measured: .*{reason}", out), name


def test_scores_of_an_earlier_run_may_know_the_examples(prune, bert, tmp_path):
    data = _numbered(tmp_path / "train.tsv", 60)
    assert prune("--model", bert, "--dataset", data, "--dry-run", *TINY)[0] == 0
    scores = ["--scores", "bert-gradnas.scores.safetensors"]
    code, out, _ = prune("--model", bert, "--dataset", data, *scores, *TINY)
    assert code == 0
    assert "whether the given scores were made with them is not known" in out
    assert _document(tmp_path / "bert-gradnas")["evaluation"]["scores_given"] is True


# -- data that makes a result worse, or flatters it ------------------------------------------------


def test_the_bundled_text_is_a_warning_only_where_it_is_used_by_default(prune, tmp_path):
    llama = save_llama(tmp_path / "llama")
    small = ["--model", llama, "--max-length", "16", "--dry-run", "--no-eval", *TINY]
    code, _, err = prune(*small)
    assert code == 0
    assert err.startswith("Warning: no --dataset was given")
    assert "give --dataset." in err
    scores = ["--scores", "llama-gradnas.scores.safetensors"]
    for options in (scores, ["--score", "magnitude"]):
        assert "the model is repaired on the bundled text" in prune(*small, *options)[2]
        unread = prune(*small, *options, "--repair", "none")[2]
        assert "no --dataset was given" not in unread
    text = write_text(tmp_path / "text.txt")
    assert "no --dataset was given" not in prune(*small, "--dataset", text)[2]


def test_the_card_says_that_prose_was_scored_on(prune, tmp_path):
    bert = save_bert(tmp_path / "bert", "BertForMaskedLM")
    assert prune("--model", bert, "--max-length", "16", *TINY)[0] == 0
    card = (tmp_path / "bert-gradnas" / "README.md").read_text(encoding="utf-8")
    assert "data: bundled text" in card
    assert "no text of the model's own kind" in card
    assert "held out from the calibration data (bundled text)" in card


def test_metrics_of_the_data_that_is_scored_flatter(prune, bert, tmp_path):
    data = write_tsv(tmp_path / "train.tsv")
    other = write_tsv(tmp_path / "dev.tsv")
    flags = ["--model", bert, "--dataset", data, *TINY]
    said = "is the data that is scored on too"
    code, out, err = prune(*flags, "--eval-dataset", data)
    assert code == 0
    assert said in err
    assert "of train.tsv, which was scored on too" in out
    card = (tmp_path / "bert-gradnas" / "README.md").read_text(encoding="utf-8")
    assert "which was scored on too" in card
    again = ["--overwrite", "--recover-epochs", "1", "--eval-dataset", "./train.tsv"]
    assert "is the data that is scored and trained on too" in prune(*flags, *again)[2]
    assert said not in prune(*flags, "--overwrite", "--eval-dataset", other)[2]


def test_splits_of_one_data_set_are_other_data(prune, bert, tmp_path):
    rows = {"text": ["a film", "the book"] * 12, "label": [0, 1] * 12}
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(rows) for name in ("train", "validation")}
    )
    splits.save_to_disk(str(tmp_path / "both"))
    flags = ["--model", bert, "--dataset", "both", "--dry-run", *TINY]
    said = "is the data that is scored on too"
    assert said not in prune(*flags, "--eval-split", "validation")[2]
    assert said in prune(*flags, "--eval-split", "train")[2]


def test_images_are_held_out_too(prune, tmp_path, seen):
    vit = save_vit(tmp_path / "vit")
    images = write_images(tmp_path / "animals", 20)
    options = ["--shuffle", "--dry-run", "--label-map", "cat=0,dog=1", *TINY]
    code, out, _ = prune("--model", vit, "--dataset", images, *options)
    assert code == 0
    assert not (set(seen["measured"]) - set(seen["scored"])) & set(seen["scored"])
    assert "held out from the calibration data (animals)" in out
