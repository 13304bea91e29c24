"""Options of a sweep: several budgets, scores and seeds in one text each."""

import pytest

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.config.recipe_files import build_options
from hf_gradnas.config.sweep import SCORES, Sweep
from hf_gradnas.errors import RecipeError


def test_texts_become_lists():
    given = {
        "targets": ["flops=80%, 60%", "params=66e6", "flops=40%"],
        "score": ["fisher,random"],
        "seeds": ["3,1", "2"],
        "save": "flops=60%",
    }
    sweep = build_options(Sweep, given)
    assert sweep.targets == {"flops": ("80%", "60%", "40%"), "params": ("66e6",)}
    assert sweep.score == ("fisher", "random")
    assert sweep.seeds == (3, 1, 2)
    assert sweep.limit_to_save() == {"flops": "60%"}
    assert build_options(Sweep, {"score": "taylor"}).score == ("taylor",)


def test_defaults():
    sweep = build_options(Sweep, {})
    assert sweep == Sweep()
    assert sweep.targets == {"flops": ("80%", "70%", "60%", "50%")}
    assert set(sweep.score) <= set(SCORES)
    assert (sweep.seeds, sweep.limit_to_save()) == ((), {})
    assert not Sweep.model_fields.keys() - {"score"} & Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"targets": ["flops"]}, r"--targets: 'flops' is not of the form NAME=VALUE,VALUE"),
        ({"targets": ["flops="]}, "is not of the form NAME=VALUE,VALUE"),
        ({"targets": ["=60%"]}, "is not of the form NAME=VALUE,VALUE"),
        ({"targets": ["flops=60%,params=60%"]}, "is not of the form NAME=VALUE,VALUE"),
        ({"targets": ["flops=60%,"]}, "nothing between two commas"),
        ({"targets": ["flops=60%", "flops=60%"]}, "'60%' is there twice"),
        (
            {"score": ["fisher,nonsense"]},
            "--score: 'nonsense' is no score; known are tempered, balanced",
        ),
        ({"score": ["fisher", "fisher"]}, "'fisher' is there twice"),
        ({"seeds": ["0,-1"]}, "'-1' is no seed"),
        ({"seeds": ["1,1"]}, "'1' is there twice"),
        ({"save": ""}, "--save: it is empty"),
        ({"nonsense": 1}, "--nonsense"),
    ],
)
def test_slips_are_named(flags, said):
    with pytest.raises(RecipeError, match=said):
        build_options(Sweep, flags)


@pytest.mark.parametrize("save", ["flops=60%", "flops", "params=80%"])
def test_only_what_is_tried_is_saved(save):
    sweep = build_options(Sweep, {"targets": ["flops=80%,70%"], "save": save})
    with pytest.raises(RecipeError, match=r"is none of the budgets .* flops=80%, flops=70%"):
        sweep.limit_to_save()
