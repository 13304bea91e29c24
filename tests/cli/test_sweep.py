"""The sweep command from end to end on tiny models: what it writes, keeps and refuses."""

import csv
import json
import subprocess
import sys

import pytest
import transformers as tf
from cli_cases import save_bert, save_llama, write_text, write_tsv
from PIL import Image

from hf_gradnas import Scores
from hf_gradnas.cli.app import main
from hf_gradnas.config.sweep import Sweep
from hf_gradnas.frontier import yardstick
from hf_gradnas.types import STATES, Frontier

TINY = ["--num-examples", "8", "--batch-size", "4"]
PRUNED = {"pruned", "pruned.repair.safetensors"}
FILES = {"sweep.json", "sweep.csv", "sweep.md", "sweep.png", "sweep.svg"}


@pytest.fixture
def bert(tmp_path):
    write_tsv(tmp_path / "train.tsv")
    write_tsv(tmp_path / "dev.tsv")
    return save_bert(tmp_path / "bert")


@pytest.fixture
def sweep(capsys):
    """Runs the command; returns its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["sweep", *map(str, arguments)])
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


DATA = ["--model", "bert", "--dataset", "train.tsv", "--eval-dataset", "dev.tsv", *TINY]


def test_budgets_scores_and_seeds_in_one_command(sweep, bert, tmp_path):
    many = ["--targets", "flops=80%,60%", "--score", "fisher,random", "--seeds", "3,4"]
    saved = ["--save", "flops=60%", "--no-report"]
    code, out, err = sweep(*DATA, *many, *saved, "--output", "found")
    assert (code, err) == (0, "")
    folder = tmp_path / "found"
    scores = {f"sweep.scores-{seed}.safetensors" for seed in (3, 4)}
    assert {path.name for path in folder.iterdir()} == {*FILES, *scores, *PRUNED}
    frontier = Frontier.load(folder / "sweep.json")
    assert [(p.seed, p.score, round(p.budget.ratio, 6)) for p in frontier.points] == [
        (seed, score, ratio)
        for seed in (3, 4)
        for score in ("fisher", "random")
        for ratio in (0.8, 0.6)
        for _ in STATES
    ]
    assert frontier.model == "bert"
    assert set(frontier.original) == {"examples", "loss", "accuracy"}
    assert frontier.document["evaluation"]["dataset"] == "dev.tsv"
    command = frontier.document["command"]
    assert command.startswith("hf-gradnas sweep --model bert --dataset train.tsv --num-examples 8 ")
    assert command.endswith("--score fisher,random --seeds 3,4 --save flops=60%")
    lines = list(csv.reader((folder / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 2 + 16
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > 1000
    assert "| flops=60% | random |" in (folder / "sweep.md").read_text(encoding="utf-8")
    for said in ("Frontier", "unpruned", "flops=60%", "±", "24 examples of dev.tsv"):
        assert said in out
    assert "--shuffle" not in out.partition("Saving the model of flops=60% by fisher")[0]
    # The model is that of the first score and seed, as prune makes it.
    first = frontier.points[3]
    assert (first.state, round(first.budget.ratio, 6)) == ("repaired", 0.6)
    document = json.loads((folder / "pruned/gradnas.json").read_text(encoding="utf-8"))
    assert document["metrics"]["after"]["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)
    assert document["plan"]["costs"] == first.costs
    assert "--scores found/sweep.scores-3.safetensors" in document["command"]
    assert tf.AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    # Subsets are different.
    one, other = (Scores.load(folder / name).metadata["data_fingerprint"] for name in scores)
    assert one != other


def test_one_subset_is_that_of_prune_and_is_kept(sweep, prune, tmp_path, monkeypatch):
    save_llama(tmp_path / "llama")
    write_text(tmp_path / "text.txt", 400)
    data = ["--model", "llama", "--dataset", "text.txt", "--max-length", "16", *TINY]
    data += ["--repair", "none"]
    code, out, err = sweep(*data, "--targets", "params=90%,80%")
    assert (code, err) == (0, "")
    assert "held out from the calibration data (text.txt)" in out
    frontier = Frontier.load(tmp_path / "llama-sweep/sweep.json")
    assert [point.score for point in frontier.points] == list(Sweep().score) * 2
    code, out, _ = prune(*data, "--target", "params=80%", "--dry-run")
    perplexity = frontier.points[1].metrics["perplexity"]
    assert f"{perplexity:.4f}" in next(line for line in out.splitlines() if "perplexity" in line)
    # The same command has nothing to measure.
    before = (tmp_path / "llama-sweep/sweep.json").read_bytes()
    monkeypatch.setattr(yardstick, "_try", _never)
    assert sweep(*data, "--targets", "params=90%,80%")[0] == 0
    assert (tmp_path / "llama-sweep/sweep.json").read_bytes() == before


def _never(*_: object, **__: object) -> None:
    raise AssertionError("called")


def test_an_interruption_keeps_what_was_measured(sweep, bert, tmp_path, monkeypatch):
    command = [*DATA, "--score", "random,magnitude", "--targets", "flops=70%", "--repair", "none"]
    own = yardstick._try

    def stop_at_second(run, rule, tries, what):
        if what.startswith("magnitude"):
            raise KeyboardInterrupt
        return own(run, rule, tries, what)

    with monkeypatch.context() as patch:
        patch.setattr(yardstick, "_try", stop_at_second)
        code, _, err = sweep(*command)
    assert code == 130
    assert "measured so far are in ./bert-sweep, and the same command goes on" in err
    kept = Frontier.load(tmp_path / "bert-sweep/sweep.json").points
    assert [point.score for point in kept] == ["random"]
    assert sweep(*command)[0] == 0
    found = Frontier.load(tmp_path / "bert-sweep/sweep.json").points
    assert [point.score for point in found] == ["random", "magnitude"]
    assert found[0] == kept[0]


BAD = {
    "no model": ([], "--model: is missing"),
    "score": (["--score", "fisher,best"], "'best' is no score"),
    "target": (["--targets", "flops"], "not of the form NAME=VALUE,VALUE"),
    "cost": (["--targets", "flop=50%"], "unknown cost 'flop'"),
    "share": (["--targets", "flops=0.5"], "for the share kept write '50%'"),
    "twice": (["--targets", "params=66e6,66M"], "--targets: params=66M is there twice"),
    "save": (["--save", "flops=1%"], "is none of the budgets that are tried"),
    "quickstart": (["--model", "quickstart"], "is trained by prune only"),
    "its own folder": (["--output", "bert"], "is the folder of the model itself"),
    "a foreign file": (["--output", "mine"], "holds sweep.csv, which no sweep wrote"),
    "a file": (
        ["--output", "train.tsv"],
        "--output train.tsv: is not a folder that this user can write to",
    ),
    "shuffle": (["--seeds", "1", "--shuffle"], "--seeds draws its subsets"),
    "swap": (["--repair", "swap"], "a sweep measures its plans as they are"),
    "no report": (["--no-report"], "--no-report: has no effect here, as no model is written"),
    "a model there": (["--output", "full", "--save", "flops=70%"], "the output folder exists"),
}


@pytest.mark.parametrize("name", BAD)
def test_slips_are_found_before_anything_is_loaded(name, sweep, bert, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sweep.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "full/pruned").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("hf_gradnas.jobs.preparation.open_source", _never)
    arguments, said = BAD[name]
    base = [] if name == "no model" or "--model" in arguments else ["--model", "bert"]
    code, out, err = sweep(*base, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_measured_or_reached_is_refused_before_scoring(sweep, bert, tmp_path):
    few = write_tsv(tmp_path / "few.tsv", 6)
    code, _, err = sweep("--model", "bert", "--dataset", few, *TINY)
    assert code == 2
    assert "--dataset: there is nothing to measure plans on: 6 examples are too few" in err
    code, _, err = sweep(*DATA[:-4], "--num-examples", "24", "--seeds", "0,1")
    assert code == 2
    assert "--seeds: there are 24 examples to draw from, needed more than the 24" in err
    code, _, err = sweep(*DATA, "--targets", "params=90%,1%")
    assert code == 2
    assert "budget params: 1% (" in err
    assert not (tmp_path / "bert-sweep").exists()


def test_help_says_what_the_options_say_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hf_gradnas.cli.app import main\n"
        "assert main(['sweep', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy.random', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = " ".join(shown.replace("│", " ").split())
    for field in Sweep.model_fields.values():
        assert " ".join(str(field.description).split()) in words


def test_the_module_runs_the_command():
    command = [sys.executable, "-m", "hf_gradnas.sweep", "--nonsense"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nonsense" in done.stderr
