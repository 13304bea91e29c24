"""The recipe: one source of options, precedence, and messages that name the nearest option."""

import re

import pytest
import yaml

from hf_gradnas.config import recipe_files
from hf_gradnas.config.recipe import Recipe
from hf_gradnas.config.recipe_files import (
    build_recipe,
    read_recipe_file,
    shipped_recipes,
    to_dict,
    to_yaml,
)
from hf_gradnas.errors import RecipeError


def test_a_flag_beats_a_setting_beats_the_file_beats_the_default(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nbatch-size: 2\nseed: 2\nnum_examples: 2\n", encoding="utf-8")
    recipe = build_recipe({"seed": 4}, settings=["seed=3", "num-examples=3"], file=file)
    assert (recipe.seed, recipe.num_examples, recipe.batch_size) == (4, 3, 2)
    assert recipe.score == "tempered"
    assert recipe.target == {"flops": "60%"}


def test_a_setting_is_read_as_yaml_and_reaches_into_a_mapping(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntarget: {flops: 50%}\n", encoding="utf-8")
    recipe = build_recipe(
        {}, settings=["target.params=70%", "shuffle=true", "exclude=[a.*, b]"], file=file
    )
    assert recipe.target == {"flops": "50%", "params": "70%"}
    assert recipe.shuffle is True
    assert recipe.exclude == ("a.*", "b")


def test_targets_of_flags_replace_those_of_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ntarget: {flops: 50%}\n", encoding="utf-8")
    recipe = build_recipe({"target": ["params=66e6", "flops = 1.2G"]}, file=file)
    assert recipe.target == {"params": "66e6", "flops": "1.2G"}


DATA = """model: m
dataset: a
split: b
text_column: c
eval_split: d
batch_size: 3
"""


@pytest.mark.parametrize(
    ("flags", "settings"),
    [({"dataset": "own"}, []), ({}, ["dataset=own"]), ({}, ["dataset = own"])],
)
def test_another_data_set_leaves_split_and_columns_of_the_files(flags, settings, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(DATA, encoding="utf-8")
    recipe = build_recipe(flags, settings=settings, file=file)
    assert (recipe.dataset, recipe.batch_size) == ("own", 3)
    assert (recipe.text_column, recipe.eval_split) == (None, None)
    assert recipe.split == Recipe.model_fields["split"].default
    own = build_recipe({"dataset": "own", "split": "s", "text_column": "t"}, file=file)
    assert (own.split, own.text_column) == ("s", "t")


def test_another_data_set_to_evaluate_on_leaves_the_files_split(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(DATA, encoding="utf-8")
    recipe = build_recipe({"eval_dataset": "own"}, file=file)
    assert (recipe.split, recipe.text_column, recipe.eval_split) == ("b", "c", None)
    file.write_text(DATA + "eval_dataset: e\n", encoding="utf-8")
    assert build_recipe({"dataset": "own"}, file=file).eval_split == "d"


def test_the_recipe_survives_yaml(tmp_path):
    recipe = build_recipe({"model": "m", "target": ["flops=50%"], "exclude": ["*.0.*"]})
    file = tmp_path / "saved.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert build_recipe({}, file=file) == recipe
    assert yaml.safe_load(to_yaml(recipe))["format_version"] == 1


def test_axes_keep_all_other_kinds_whole():
    recipe = build_recipe({"model": "m", "target": ["flops=50%"], "axes": ["heads,neurons"]})
    assert recipe.axes == ("heads", "neurons")
    assert recipe.rules() == {"*:channels": None, "*:experts": None}
    only = build_recipe({"model": "m", "target": ["flops=50%"], "axes": ["experts"]})
    kept = ["*:heads", "*:kv_groups", "*:neurons", "*:channels"]
    assert only.rules() == dict.fromkeys(kept)
    with pytest.raises(RecipeError, match="axes"):
        build_recipe({"model": "m", "target": ["flops=50%"], "axes": ["blocks"]})
    layers = build_recipe({"model": "m", "target": ["flops=50%"], "axes": ["layers,heads"]})
    assert layers.rules() == dict.fromkeys(["*:neurons", "*:channels", "*:experts"])


def test_rules_come_from_min_units_and_exclude():
    recipe = Recipe(model="m", min_units=2, exclude=("*.layer.0.*",))
    assert recipe.rules() == {"*": {"min": 2}, "*.layer.0.*": None}
    assert Recipe(model="m").rules() == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["128"], {"neurons": 128}),
        (128, {"neurons": 128}),
        (["neurons=128, heads=2", "kv_groups=2"], {"neurons": 128, "heads": 2, "kv_groups": 2}),
        ({"channels": 16}, {"channels": 16}),
    ],
)
def test_multiples_are_rules_of_kinds(given, expected, tmp_path):
    recipe = build_recipe({"model": "m", "multiple": given, "min_units": 1, "exclude": ["*.0.*"]})
    assert recipe.multiple == expected
    limits = {f"*:{kind}": {"min": 1, "multiple": n} for kind, n in expected.items()}
    assert recipe.rules() == {"*": {"min": 1}, **limits, "*.0.*": None}
    file = tmp_path / "saved.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert build_recipe({}, file=file) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["0"], "greater than or equal to 1"),
        (["neurons=0"], "greater than or equal to 1"),
        (["-32"], "is not of the form NAME=NUMBER"),
        (["neuron=32"], "Input should be 'neurons', 'heads'"),
        (["neurons=32", "neurons=64"], "given twice; give each kind one number"),
        (["32", "64"], "is not of the form NAME=NUMBER, e.g. neurons=128,heads=2"),
        (2.5, "multiple"),
        (True, "it is no switch"),
    ],
)
def test_multiples_that_cannot_be_read(given, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        build_recipe({"model": "m", "multiple": given})


def test_a_label_map_has_one_form_of_flags_and_one_of_files(tmp_path):
    flags = build_recipe({"model": "m", "label_map": ["positive=1, negative=0", "a=b=2"]})
    assert flags.label_map == {"positive": 1, "negative": 0, "a=b": 2}
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(flags), encoding="utf-8")
    assert build_recipe({}, file=file) == flags
    setting = build_recipe({}, settings=["label_map.negative=2"], file=file)
    assert setting.label_map == {**flags.label_map, "negative": 2}


def test_empty_lists_of_a_file_are_the_defaults(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\naxes: []\nexclude: []\nmax_memory: []\n", encoding="utf-8")
    assert build_recipe({}, file=file).model_fields_set == {"model"}


def test_a_flag_takes_with_it_what_a_file_says_of_what_it_replaces(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: m\nrevision: r\neval_dataset: e\nrecover_epochs: 1\nrecover_alpha: 0.2\n"
        "save_scores: s\nlabels: model\nseed: 0\nsplit: train\ndtype: float32\n",
        encoding="utf-8",
    )
    whole = build_recipe({}, file=file)
    assert whole.model_fields_set == {
        *("model", "revision", "eval_dataset", "recover_epochs", "recover_alpha"),
        *("save_scores", "labels", "dtype"),
    }  # seed and split are the defaults
    flags = {"model": "n", "scores": "t", "eval": False, "recover_epochs": "0"}
    assert build_recipe(flags, file=file).model_fields_set == {*flags, "dtype"}
    kept = build_recipe({"recover_epochs": 2, "eval": True}, file=file)
    assert (kept.recover_alpha, kept.eval_dataset) == (0.2, "e")


def test_every_option_has_a_description_and_a_panel():
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        if name != "format_version":
            assert field.json_schema_extra["panel"], name


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name):
    assert build_recipe({}, file=name).model


def test_the_quickstart_is_shipped():
    assert build_recipe({}, file="quickstart").model == "quickstart"


BAD = {
    "unknown key": ({"model": "m"}, ["bach_size=3"], None, "unknown option 'bach_size'.*'batch_s"),
    "unknown key in the file": ({}, [], "modle: m", "unknown option 'modle'.*'model'"),
    "no model": ({}, [], None, "--model: is missing; give it as a flag"),
    "not a number": ({"model": "m", "batch_size": "x"}, [], None, "--batch-size: .*found 'x'"),
    "too few": ({"model": "m", "num_examples": "0"}, [], None, "--num-examples: .*found '0'"),
    "choice": ({"model": "m", "score": "fischer"}, [], None, "--score: .*fisher.*found 'fischer'"),
    "target": ({"model": "m", "target": ["0.5"]}, [], None, "--target: '0.5' is not of the form"),
    "bare target": ({"model": "m"}, ["target=0.5"], None, "--target: 0.5 is .*flops=50%"),
    "label map": ({"model": "m", "label_map": ["a"]}, [], None, "--label-map: .*NAME=NUMBER"),
    "label twice": ({"model": "m", "label_map": ["a=0,a=1"]}, [], None, "'a' is given twice"),
    "label of a word": ({"model": "m"}, ["label_map={a: b}"], None, "a=b is not of the form"),
    "yes in a file": ({}, [], "model: m\nlabel_map: {yes: 1}", "quote names such as yes"),
    "setting": ({"model": "m"}, ["seed"], None, "--set seed: is not of the form KEY=VALUE"),
    "secret": (
        {"model": "m"},
        ["hub_token=[a b"],
        None,
        r"^--set hub_token=\*\*\*: no option holds",
    ),
    "secret entry": (
        {},
        [],
        "model: m\ntraining: {api_key: abc}",
        r"Extra inputs are not permitted \(found \*\*\*\)",
    ),
    "setting not yaml": ({"model": "m"}, ["exclude=[a"], None, "is not a YAML value"),
    "file not yaml": ({}, [], "model: [", "cannot be read as YAML"),
    "file not a mapping": ({}, [], "- model", "found list, needed a mapping"),
    "newer format": (
        {},
        [],
        "modle: m\nformat_version: 2",
        "in format 2, newer than the 1",
    ),
    "key twice": ({}, [], "model: m\nseed: 1\nseed: 2", "the key 'seed' comes twice"),
    "entry twice": ({}, [], "model: m\ntarget: {flops: 60%, flops: 50%}", "'flops' comes twice"),
    "deep": ({}, [], "[" * 2000, "cannot be read as YAML .it is nested too deeply"),
    "deep setting": ({"model": "m"}, ["seed=" + "[" * 2000], None, "nested too deeply"),
    "long integer": ({}, [], "model: m\nseed: " + "9" * 5000, "cannot be read as YAML"),
    "a list as a key": ({}, [], "? [1]\n: 2", "cannot be read as YAML"),
    "a tag": ({}, [], "!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    "true as a number": ({"model": "m"}, ["seed=true"], None, "--seed: it is no switch"),
    "true as a format": ({}, [], "model: m\nformat_version: true", "it is no switch"),
    "true as a limit": ({"model": "m"}, ["target.flops=true"], None, "a limit is no switch"),
    "true in training": ({"model": "m"}, ["training.stages=true"], None, "it is no switch"),
    "no format": ({}, [], "model: m\nformat_version: x", "--format-version: .*found 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, tmp_path):
    flags, settings, text, message = BAD[case]
    file = None
    if text is not None:
        file = tmp_path / "r.yaml"
        file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=re.compile(message, re.DOTALL)):
        build_recipe(flags, settings=settings, file=file)


ASKED = {
    "trust_remote_code": ("true", "--trust-remote-code"),
    "overwrite": ("yes", "--overwrite"),
    "push_to_hub": ("someone/else", "--push-to-hub USER/NAME"),
}


@pytest.mark.parametrize("value", [None, "'yes'", "1", "[a]"])
@pytest.mark.parametrize("dash", ["_", "-"])
@pytest.mark.parametrize("name", ASKED)
def test_a_file_switches_nothing_on_that_only_a_user_may(name, dash, value, tmp_path):
    own, flag = ASKED[name]
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\n{name.replace('_', dash)}: {value or own}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"r\.yaml: sets {name} to .* give {flag} on the"):
        build_recipe({}, file=file)
    recipe = build_recipe({name: "other/one" if name == "push_to_hub" else True}, file=file)
    assert vars(recipe)[name] in (True, "other/one")
    assert build_recipe({}, settings=[f"{name}={own}"], file=file) is not None
    off = "null" if name == "push_to_hub" else "false"
    file.write_text(f"model: m\n{name}: {off}\n", encoding="utf-8")
    assert not vars(build_recipe({}, file=file))[name]


def test_what_only_a_user_may_switch_on_is_not_saved():
    flags = {"trust_remote_code": True, "overwrite": True, "push_to_hub": "a/b", "private": True}
    recipe = build_recipe({"model": "m", **flags})
    saved = yaml.safe_load(to_yaml(recipe))
    assert not flags.keys() & saved.keys()
    assert saved == to_dict(recipe)


def test_a_missing_file_names_the_nearest_shipped_recipe():
    with pytest.raises(RecipeError, match=r"no such file.*did you mean 'quickstart'"):
        read_recipe_file("quickstrat")


def test_recipes_are_found_in_the_package_too(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("model: m\n", encoding="utf-8")
    folders = (tmp_path, *recipe_files.RECIPE_FOLDERS)
    monkeypatch.setattr(recipe_files, "RECIPE_FOLDERS", folders)
    assert next(iter(shipped_recipes())) == "own"
    assert build_recipe({}, file="own").model == "m"
