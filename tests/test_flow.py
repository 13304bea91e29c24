"""One prune as a function of a recipe, and batches of a data set for a model in memory."""

from contextlib import contextmanager

import pytest
import torch
from cli_cases import save_bert, save_llama, write_tsv
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_gradnas import GradNASPruner
from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data import calibration_batches
from hf_gradnas.errors import BudgetError, DataError, RecipeError
from hf_gradnas.flow import run
from hf_gradnas.jobs.report import Report


class Told(Report):
    """Keeps the names of what it was told, in order."""

    def __init__(self):
        self.names = []

    @contextmanager
    def progress(self, what):
        self.names.append(what)
        yield lambda done, total: None

    def settings(self, rows):
        self.names.append("settings")

    def structure(self, structure, layout, reason):
        self.names.append("structure")

    def plan(self, plan, structure):
        self.names.append("plan")

    def metrics(self, columns, measured_on):
        self.names.append("metrics: " + ", ".join(columns))

    def outcome(self, summary, folder):
        self.names.append(f"outcome: {folder}")


def recipe(tmp_path, **more):
    model = save_bert(tmp_path / "bert")
    data = write_tsv(tmp_path / "train.tsv")
    return Recipe(
        model=str(model),
        dataset=str(data),
        eval_dataset=str(data),
        target={"params": "90%"},
        num_examples=8,
        batch_size=4,
        report=False,
        device="cpu",
        output=str(tmp_path / "small"),
        **more,
    )


def test_a_run_tells_its_steps_in_order_and_returns_the_folder(tmp_path, capsys):
    told = Told()
    folder = run(recipe(tmp_path), told)
    assert told.names == [
        "Reading the data",
        "settings",
        "Loading the model",
        "Finding what can be pruned",
        "structure",
        "Evaluating the original",
        "Scoring",
        "Planning",
        "plan",
        "Repairing",
        "Cutting",
        "Evaluating the pruned model",
        "Saving and loading back",
        "metrics: before, after",
        f"outcome: {folder}",
    ]
    small = AutoModelForSequenceClassification.from_pretrained(folder)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    assert small.num_parameters() < whole.num_parameters()
    assert "Saved" not in capsys.readouterr().out


def test_a_dry_run_returns_no_folder(tmp_path):
    assert run(recipe(tmp_path, dry_run=True, repair="none")) is None
    assert not (tmp_path / "small").exists()


def test_a_run_raises_what_the_command_prints(tmp_path):
    with pytest.raises(BudgetError):
        run(recipe(tmp_path).model_copy(update={"target": {"params": "1%"}}))


def test_batches_of_a_classifier_are_its_tokens_and_labels(tmp_path):
    folder, data = save_bert(tmp_path / "bert"), write_tsv(tmp_path / "train.tsv")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader = calibration_batches(model, tokenizer, str(data), num_examples=8, batch_size=4)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [4, 4]
    assert batches[0]["input_ids"].shape[0] == 4
    assert model(**batches[0]).loss.isfinite()
    plan = GradNASPruner(model).prune(loader, {"params": "90%"}, repair="none")
    assert plan.costs["params"] <= plan.budgets[0].limit


def test_a_language_model_needs_no_data_set(tmp_path):
    folder = save_llama(tmp_path / "llama", pad="[PAD]")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (batch, *_) = calibration_batches(model, tokenizer, num_examples=4, max_length=16)
    torch.testing.assert_close(batch["labels"], batch["input_ids"])


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    folder = save_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(DataError, match="there is no such file"):
        calibration_batches(model, AutoTokenizer.from_pretrained(folder), "./no.tsv")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_example": 8}, "did you mean 'num_examples'"),
        ({"batch_size": 0}, "--batch-size: .* greater than or equal to 1"),
        ({"score": "fisher"}, "score is no option about data"),
        ({"eval_dataset": "x.tsv"}, "eval_dataset is no option about data"),
    ],
)
def test_an_option_that_batches_do_not_take_is_refused(options, said, tmp_path):
    folder = save_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(RecipeError, match=said):
        calibration_batches(model, tokenizer, str(write_tsv(tmp_path / "t.tsv")), **options)
