"""The command line itself: generated options, exit codes, and how little it imports."""

import importlib
import subprocess
import sys

import pytest

import hf_gradnas
from hf_gradnas.cli.app import main
from hf_gradnas.config.recipe import Recipe

FLAGS = """--model --task --dataset --split --text-column --label-column --target-column
--image-column --audio-column --eval-dataset --eval-split --target --output --score --search
--layout --num-examples --shuffle --batch-size --max-length --flops-length --labels --scores
--save-scores --axes --exclude --min-units --device --dtype --revision --trust-remote-code --recipe
--set --seed --device-map --max-memory --offload-folder --checkpointing
--dry-run --overwrite""".split()


@pytest.fixture
def help_text(capsys):
    assert main(["prune", "--help"]) == 0
    return capsys.readouterr().out


def test_every_flag_is_there(help_text):
    missing = [flag for flag in FLAGS if f"{flag} " not in help_text]
    assert not missing


def test_help_says_what_the_recipe_says(help_text):
    words = " ".join(help_text.replace("│", " ").split())
    for name, field in Recipe.model_fields.items():
        if name not in ("format_version", "training"):
            assert " ".join(field.description.split()) in words, name


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hf_gradnas.cli.app import main\n"
        "assert main(['prune', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy.random', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_module_runs_the_command():
    command = [sys.executable, "-m", "hf_gradnas.prune"]
    done = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True)
    assert "--trust-remote-code" in done.stdout
    bad = subprocess.run([*command, "--nonsense"], check=False, capture_output=True, text=True)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr


def test_an_unknown_flag_names_the_nearest(capsys):
    assert main(["prune", "--datset", "x"]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_a_flag_without_a_value_is_refused(capsys):
    assert main(["prune", "--model"]) == 2
    assert "--model" in capsys.readouterr().err


def test_no_model_is_refused(capsys):
    assert main(["prune"]) == 2
    assert "--model: is missing" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_gradnas {hf_gradnas.__version__}\n"


def test_the_package_is_the_command(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "hf_gradnas", "--version"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.startswith("hf_gradnas ")


def test_switches_take_no_value_and_name_their_default(help_text):
    assert "<bool>" not in help_text.replace("--help", "").split("Recipe")[1]
    words = " ".join(help_text.replace("│", " ").split())
    assert "latencies to report/. Default: yes." in words


@pytest.mark.parametrize("command", ["prune", "score", "inspect", "sweep"])
def test_the_model_is_an_argument_too(command, monkeypatch):
    given = []
    module = importlib.import_module(f"hf_gradnas.cli.{command}")
    monkeypatch.setattr(
        module, f"{command}_from_options", lambda flags, *rest, **more: given.append(flags) or 0
    )
    assert main([command, "some/model", "--seed", "3"]) == 0
    assert main([command, "--model", "some/model", "--seed", "3"]) == 0
    assert given == [{"model": "some/model", "seed": "3"}] * 2


@pytest.mark.parametrize("command", ["prune", "score", "inspect", "sweep"])
def test_two_models_are_refused(command, capsys):
    assert main([command, "some/model", "--model", "another"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "'some/model' is one model, and --model 'another' another; give one." in said


def test_help_has_its_short_name(capsys):
    for command in ([], ["inspect"], ["export", "gguf"]):
        assert main([*command, "-h"]) == 0
        assert "Usage: hf-gradnas" in capsys.readouterr().out
