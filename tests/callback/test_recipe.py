"""The callback with the options of a recipe, which the command refuses to train by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hf_gradnas import GradNASCallback
from hf_gradnas.callback.settings import Settings
from hf_gradnas.cli.app import main
from hf_gradnas.config.recipe import Training
from hf_gradnas.errors import RecipeError


def test_the_shipped_recipe_is_gradual() -> None:
    callback = GradNASCallback.from_recipe("trainer-gradual-50")
    expected = Settings({"flops": "50%"}, when="gradual", layout="per_layer")
    assert callback.settings == expected


def test_changes_beat_the_recipe() -> None:
    callback = GradNASCallback.from_recipe("trainer-gradual-50", stages=3, budget={"params": 1000})
    assert (callback.settings.stages, callback.settings.budget) == (3, {"params": 1000})
    assert callback.settings.when == "gradual"


def test_a_recipe_without_training_has_the_callbacks_defaults(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: m\nmin_units: 2\nscore: taylor\nmultiple: 8\nexclude: ['*.0.*']", "utf-8"
    )
    found = GradNASCallback.from_recipe(file).settings
    rules = {"*": {"min": 2}, "*:neurons": {"min": 2, "multiple": 8}, "*.0.*": None}
    assert found == replace(Settings({"flops": "60%"}, score="taylor"), rules=rules)


def test_the_recipe_has_the_callbacks_defaults() -> None:
    settings = Settings({"flops": "50%"})
    for name, value in Training().model_dump().items():
        assert getattr(settings, name) == value


def test_slips_are_named(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: m\ntraining: {wen: end}", encoding="utf-8")
    with pytest.raises(RecipeError, match="--training: Extra inputs are not permitted"):
        GradNASCallback.from_recipe(file)


def test_what_only_a_flag_switches_on_is_refused_here_too(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: m\npush_to_hub: someone/else", encoding="utf-8")
    with pytest.raises(RecipeError, match="sets push_to_hub to 'someone/else', but no file"):
        GradNASCallback.from_recipe(file)


def test_the_command_does_not_train(capsys) -> None:
    assert main(["prune", "--recipe", "trainer-gradual-50"]) == 2
    assert "give it to GradNASCallback.from_recipe" in capsys.readouterr().err
