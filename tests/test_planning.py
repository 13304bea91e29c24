"""A plan from scores alone is that of the pruner which made them, to the last bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from operator import getitem
from random import Random

import pytest
import zoo
from families import spread

from hf_gradnas import GradNASPruner, Plan, Scores
from hf_gradnas.errors import (
    BudgetError,
    GradNASError,
    GradNASWarning,
    PlanError,
    ScoresError,
    StructureError,
)
from hf_gradnas.planning import make_plan, make_plans, stock_instead
from hf_gradnas.report import say_stock
from hf_gradnas.types import Basis

FAMILIES = ["bert", "llama", "mixtral", "resnet", "whisper"]
TARGET = {"flops": "85%"}


def scored(name, file=None, *, every_layout=True, **options):
    model, inputs = zoo.build(name)
    pruner = GradNASPruner(model, **{"score": "fisher", **options})
    pruner.discover(inputs, every_layout=every_layout, checkpoint={"model": name})
    pruner.score([inputs], file=file)
    return model, inputs, pruner


@pytest.mark.parametrize("name", spread(FAMILIES))
def test_plans_of_a_file_are_those_of_a_pruner_in_every_layout(name, tmp_path):
    model, inputs, first = scored(name, tmp_path / "scores.safetensors")
    scores = Scores.load(tmp_path / "scores.safetensors")
    assert scores.basis == first.basis
    layouts = ["auto", *scores.basis.prunables]
    assert "per_layer" in layouts
    for layout in layouts:
        pruner = GradNASPruner(model, score="fisher", layout=layout)
        pruner.discover(inputs)
        pruner.use_scores(scores)
        for search in ("lagrangian", "binary"):
            pruner.search = search
            planned = make_plan(scores, TARGET, layout=layout, search=search)
            wanted = pruner.plan(TARGET)
            assert planned == wanted
            assert repr(planned) == repr(wanted)
            assert planned.basis.prunables.keys() == {wanted.layout}
            found = planned.basis.prunables[wanted.layout]
            assert found == replace(pruner.prunable, sample={})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    file = tmp_path_factory.mktemp("llama") / "scores.safetensors"
    model, inputs, _ = scored("llama", file)
    return model, inputs, Scores.load(file)


def test_rules_decide_as_the_pruner_s_do(llama):
    model, inputs, scores = llama
    rules = {"*": {"min": 2}, "*layers.1.mlp*": None, "*:heads": {"min": 2}}
    pruner = GradNASPruner(model, score="fisher", rules=rules)
    pruner.discover(inputs)
    pruner.use_scores(scores)
    budget = {"flops": "75%", "params": "80%"}
    assert make_plan(scores, budget, rules=rules) == pruner.plan(budget)
    # Rules that keep all that the class cannot express bring auto to stock.
    assert make_plan(scores, {"params": "95%"}, rules={"*:heads": None, "*:kv_groups": None})


def test_several_budgets_are_several_plans(llama):
    scores = llama[2]
    budgets = [{"flops": "90%"}, {"flops": "70%"}, {"params": "80%"}]
    assert make_plans(scores, budgets) == [make_plan(scores, budget) for budget in budgets]


def test_layers_that_were_looked_for_may_go_or_stay(tmp_path):
    file = tmp_path / "scores.safetensors"
    model, inputs, pruner = scored("llama", file, layers=True)
    scores = Scores.load(file)
    assert make_plan(scores, {"flops": "50%"}) == pruner.plan({"flops": "50%"})
    without = GradNASPruner(model, score="fisher")
    without.discover(inputs)
    without.use_scores(scores)
    planned = make_plan(scores, TARGET, rules={"*:layers": None})
    wanted = without.plan(TARGET)
    assert {name: planned.kept[name] for name in wanted.kept} == wanted.kept


def test_a_plan_says_in_its_file_what_it_was_made_from(llama, tmp_path):
    plan = make_plan(llama[2], TARGET)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.basis == plan.basis
    assert again.basis.checkpoint == {"model": "llama"}
    assert "basis" not in replace(plan, basis=None).to_dict()


def test_a_method_can_be_chosen(tmp_path):
    file = tmp_path / "scores.safetensors"
    model, inputs = zoo.build("llama")
    batches = [inputs] * 10
    pruner = GradNASPruner(model, score="auto")
    pruner.score(batches, file=file)
    scores = Scores.load(file)
    for method in scores.methods:
        one = GradNASPruner(model, score=method)
        one.discover(inputs)
        one.use_scores(scores)
        assert make_plan(scores, TARGET, score=method) == one.plan(TARGET)
    assert make_plan(scores, TARGET).score == scores.methods[0]
    with pytest.raises(ScoresError, match="but 'taylor' was asked for"):
        make_plan(scores, TARGET, score="taylor")


def test_what_stock_would_take_comes_from_the_same_scores(llama):
    scores = llama[2]
    options = {"search": "lagrangian", "rules": {}}
    plan = make_plan(scores, {"params": "80%"}, layout="per_layer")
    prunable = plan.basis.prunables["per_layer"]
    found = stock_instead(prunable, scores, plan, **options)
    other = make_plan(scores, {"params": "80%"}, layout="stock")
    assert found == {
        "params": other.costs["params"] / prunable.totals["params"],
        "scores": other.loss_increase / plan.loss_increase,
    }
    assert found["scores"] >= 1
    assert f"{found['scores']:.2f} times as much" in say_stock(found)
    assert stock_instead(prunable, scores, other, **options) == {}
    lowest = replace(plan, budgets=(replace(plan.budgets[0], limit=plan.budgets[0].total / 99),))
    found = stock_instead(prunable, scores, lowest, **options)
    assert found == {"unreachable": 1.0}
    assert "cannot reach" in say_stock(found)
    cache = make_plan(scores, {"kv_cache": "80%"}, layout="per_layer")
    assert stock_instead(prunable, scores, cache, **options) == {}
    assert say_stock({}) == ""


BAD = [
    ({"budget": {"flops": "150%"}}, BudgetError, "at most 100"),
    ({"budget": {"flop": "50%"}}, BudgetError, "did you mean 'flops'"),
    ({"budget": {}}, BudgetError, "empty"),
    ({"budget": {"params": "1%"}}, BudgetError, "the lowest is"),
    ({"layout": "both"}, PlanError, "layout='both' is not known"),
    ({"search": "guess"}, PlanError, "search='guess' is not known"),
    ({"rules": {"*none*": None}}, StructureError, "matches no axis"),
    ({"rules": {"*": {"most": 2}}}, PlanError, "rules"),
    ({"rules": {"*:neurons": {"multiple": 512}}}, PlanError, "no width is a multiple of 512"),
    ({"rules": {"*:channels": {"multiple": 8}}}, PlanError, "it has kv_groups, heads, neurons"),
]


@pytest.mark.parametrize(("options", "error", "said"), BAD)
def test_what_cannot_be_planned_is_refused(llama, options, error, said):
    options = {"budget": TARGET, **options}
    with pytest.raises(error, match=said):
        make_plan(llama[2], **options)


def test_a_budget_near_the_lowest_is_a_warning(llama):
    lowest = 0.0
    try:
        make_plan(llama[2], {"flops": "0.01%"})
    except BudgetError as error:
        lowest = float(str(error).partition("the lowest is ")[2].partition("%")[0])
    with pytest.warns(GradNASWarning, match="near the lowest"):
        make_plan(llama[2], {"flops": f"{lowest + 1}%"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(llama[2], {"flops": "90%"})


def test_scores_that_are_of_no_use_are_refused(llama):
    scores = llama[2]
    with pytest.raises(ScoresError, match="score again with hf-gradnas score"):
        make_plan(replace(scores, basis=None), TARGET)
    unfinished = {**scores.metadata, "complete": "false"}
    with pytest.raises(ScoresError, match="broke off after 4 examples"):
        make_plan(replace(scores, metadata=unfinished), TARGET)
    short = {name: values[:-1] for name, values in scores.values.items()}
    with pytest.raises(ScoresError, match="scores have the shape"):
        make_plan(replace(scores, values=short), TARGET)
    lost = dict(scores.values)
    lost.popitem()
    with pytest.raises(ScoresError, match="hold no such axis"):
        make_plan(replace(scores, values=lost), TARGET)


def test_a_layout_that_was_not_examined_is_refused(llama):
    scores = llama[2]
    only = replace(scores, basis=Basis.of([scores.basis.prunables["stock"]], {}))
    assert make_plan(only, TARGET, layout="stock") == make_plan(scores, TARGET, layout="stock")
    with pytest.raises(PlanError, match="made for stock alone; give --layout stock"):
        make_plan(only, TARGET, layout="per_layer")


def test_a_damaged_basis_is_refused_when_the_file_is_read(llama, tmp_path):
    file = tmp_path / "scores.safetensors"
    found = llama[2].basis.prunables["per_layer"]
    wrong = replace(found, structure=replace(found.structure, axes=found.axes[:1]))
    replace(llama[2], basis=Basis({"per_layer": wrong})).save(file)
    with pytest.raises(ScoresError, match="does not say what plans are made from"):
        Scores.load(file)
    replace(llama[2], basis=Basis({"stock": found})).save(file)
    with pytest.raises(ScoresError, match=r"prunables\.stock is of the layout 'per_layer'"):
        Scores.load(file)
    replace(llama[2], basis=Basis({})).save(file)
    with pytest.raises(ScoresError, match="holds no layout"):
        Scores.load(file)


VALUES = [
    None,
    0,
    1,
    -1,
    7,
    10**9,
    2**62,
    1.5,
    1e308,
    "",
    "x",
    "heads",
    [],
    {},
    [0],
    {"a": 1},
    True,
]


def places(data, path=()):
    """Paths to everything in a JSON document."""
    items = enumerate(data) if isinstance(data, list) else data.items()
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.mark.filterwarnings("ignore::hf_gradnas.GradNASWarning")
def test_a_basis_that_was_changed_at_random_is_used_or_refused(llama):
    scores, random = llama[2], Random(0)
    data = json.loads(json.dumps(scores.basis.to_dict()))
    paths, used = list(places(data)), 0
    for _ in range(150):
        changed, path = copy.deepcopy(data), random.choice(paths)
        place = reduce(getitem, path[:-1], changed)
        if random.random() < 0.2:
            del place[path[-1]]
        else:
            place[path[-1]] = random.choice(VALUES)
        with suppress(GradNASError):  # anything else is a fault
            make_plan(replace(scores, basis=Basis.from_dict(changed)), TARGET)
            used += 1
    assert 0 < used < 150


def test_no_model_library_is_imported_for_a_plan(llama, tmp_path):
    llama[2].save(tmp_path / "scores.safetensors")
    code = (
        "import sys\n"
        "from hf_gradnas import Scores\n"
        "from hf_gradnas.planning import make_plan\n"
        f"scores = Scores.load({str(tmp_path / 'scores.safetensors')!r})\n"
        "make_plan(scores, {'flops': '70%'})\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
