"""A plan is what its types say, or an error: from a file and from Python, before anything moves."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.callback.resuming import Progress
from hf_gradnas.errors import PlanError
from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Budget

NEURONS = "model.layers.0.mlp:neurons"
GOOD = Plan(
    kept={"a:heads": (0, 2), "b:neurons": ()},
    sizes={"a:heads": 4, "b:neurons": 3},
    layout="per_layer",
    budgets=(Budget("params", 5.0, 10.0),),
    costs={"params": 4.0},
    loss_increase=0.5,
    search="lagrangian",
    score="fisher",
    steps={"params": 1.0},
)
NONSENSE = [
    ("kept", {"a:heads": [0.5, 2.5]}, "integers"),
    ("kept", {"a:heads": [0.0, 2.0]}, "integers"),
    ("kept", {"a:heads": [False, True]}, "integers"),
    ("kept", {"a:heads": ["0", "2"]}, "integers"),
    ("kept", {"a:heads": [[0], [2]]}, "integers"),
    ("kept", {"a:heads": [0, None]}, "integers"),
    ("kept", {"a:heads": [0, 10**30]}, "64 bits"),
    ("kept", {"a:heads": [-1, 2]}, "below 4"),
    ("kept", {"a:heads": [2, 2]}, "distinct"),
    ("kept", {"a:heads": [2, 0]}, "sorted"),
    ("kept", {"a:heads": "02"}, "integers"),
    ("kept", {"a:heads": None}, "integers"),
    ("kept", {"a:heads": {}}, "integers"),
    ("kept", {"a:heads": 2}, "integers"),
    ("kept", {"c:heads": [0]}, "an axis without a size"),
    ("kept", [["a:heads", [0]]], "not a plan"),
    ("sizes", {"a:heads": 4.0, "b:neurons": 3}, r"sizes\['a:heads'\] holds 4.0"),
    ("sizes", {"a:heads": "4", "b:neurons": 3}, "sizes"),
    ("sizes", {"a:heads": True, "b:neurons": 3}, "sizes"),
    ("sizes", {"a:heads": 4, "b:neurons": -3}, "sizes"),
    ("sizes", [4, 3], "a mapping"),
    ("sizes", None, "a mapping"),
    ("layout", "auto", "layout 'auto' of the plan"),
    ("layout", 1, "layout 1 of the plan"),
    ("layout", ["stock"], "layout"),
    ("costs", {"params": "4"}, r"costs\['params'\]"),
    ("costs", {"params": True}, "costs"),
    ("costs", {"params": -4.0}, "costs"),
    ("costs", {"params": None}, "costs"),
    ("costs", {"params": 10**400}, "costs|64 bits"),
    ("costs", ["params"], "costs"),
    ("steps", {"params": [1]}, "steps"),
    ("steps", 3, "steps"),
    ("loss_increase", "0.5", "loss_increase"),
    ("loss_increase", True, "loss_increase"),
    ("loss_increase", None, "loss_increase"),
    ("search", 3, "search"),
    ("score", None, "score"),
    ("budgets", [{"cost": "params", "limit": "5", "total": 10}], "budgets"),
    ("budgets", [{"cost": "params", "limit": -5, "total": 10}], "budgets"),
    ("budgets", [{"cost": "params", "limit": 50, "total": 10}], "budgets"),
    ("budgets", [{"cost": 1, "limit": 5, "total": 10}], "budgets"),
    ("budgets", [{"cost": "params"}], "not a plan"),
    ("budgets", [5], "not a plan"),
    ("budgets", None, "not a plan"),
    ("format_version", 3, "format_version is 3"),
    ("format_version", 0, "format_version is 0"),
    ("format_version", "1", "format_version is '1'"),
    ("format_version", True, "format_version is True"),
    ("format_version", 1.0, "format_version is 1.0"),
    ("colour", "red", "not a plan"),
]


@pytest.mark.parametrize(("key", "value", "match"), NONSENSE)
def test_nonsense_in_a_file_is_refused(key, value, match, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**GOOD.to_dict(), key: value}), encoding="utf-8")
    with pytest.raises(PlanError, match=match):
        Plan.load(file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ("[]", "no object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"layout": "stock", "layout": "stock"}', "'layout' comes twice"),
        ('{"loss_increase": NaN}', "NaN is no number"),
        ('{"costs": {"params": Infinity}}', "Infinity is no number"),
        ('{"stage": 9999999999999999999}', "more than 64 bits"),
    ],
)
def test_what_is_no_json_is_refused(text, match, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=match):
        Plan.load(file)


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x80"])
def test_another_encoding_is_refused(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_good_plan_comes_back_also_with_numpy_numbers(tmp_path):
    kept = {"a:heads": (np.int64(0), np.int32(2)), "b:neurons": ()}
    loss = np.float32(0.5)
    for plan in (GOOD, replace(GOOD, kept=kept, loss_increase=float(loss))):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == GOOD


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": {NEURONS: (0.5, 1.5)}},
        {"kept": {NEURONS: (True,)}},
        {"kept": {NEURONS: (np.float64(1.0),)}},
        {"kept": {NEURONS: ("1",)}},
        {"kept": {NEURONS: None}},
        {"kept": {1: (0,)}},
        {"kept": None},
        {"costs": {"params": float("nan")}},
        {"loss_increase": float("inf")},
        {"budgets": (("params", 1, 2),)},
        {"budgets": 3},
        {"layout": None},
        {"sizes": None},
    ],
)
def test_nonsense_from_python_is_refused_before_anything_moves(changes):
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model)
    structure = pruner.discover(inputs)
    sizes = {axis.name: axis.size for axis in structure.axes}
    plan = replace(Plan(kept={}, sizes=sizes, layout="per_layer"), **changes)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = model.config.to_dict()
    for use in (pruner.masked, pruner.apply):
        with pytest.raises(PlanError):
            use(plan)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert model.config.to_dict() == config
    if "kept" in changes and changes["kept"] is not None:
        with pytest.raises(PlanError):
            cut(model, structure.axes, plan.kept)
    if any(isinstance(unit, float) for unit in (changes.get("kept") or {}).get(NEURONS) or ()):
        with (
            pytest.raises(PlanError, match="does not exist"),
            masked(model, structure.axes, plan.kept),
        ):
            pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stage": "1"}, "stage '1'"),
        ({"stage": True}, "stage True"),
        ({"stage": -1}, "stage -1"),
        ({"run_id": None}, "run_id None"),
        ({"is_cut": 1}, "is_final and is_cut"),
        ({"scores": {"method": 3}}, "scores"),
        ({"plan": 3}, "TypeError|AttributeError"),
        ({"plan": {"kept": {"a:heads": "zz"}, "sizes": {"a:heads": 4}}}, "ValueError"),
        ({"plan": {"kept": {"a:heads": ""}, "sizes": {"a:heads": 4}}}, "0 bits for 4 units"),
        ({"plan": {"kept": {"a:heads": "0f"}, "sizes": {"a:heads": 4}}}, "8 bits for 4 units"),
        ({"plan": {"kept": {"a:heads": "a0"}, "sizes": {}}}, "KeyError"),
        ({"colour": "red"}, "TypeError"),
    ],
)
def test_damaged_progress_in_a_trainers_checkpoint_is_refused(changes, match):
    data = Progress(stage=1, plan=GOOD).to_dict()
    assert Progress.from_dict(data).plan == GOOD
    with pytest.raises(PlanError, match=match):
        Progress.from_dict({**data, **changes})
    with pytest.raises(PlanError, match="KeyError"):
        Progress.from_dict({key: value for key, value in data.items() if key != "plan"})


def test_a_plan_replaces_nothing_but_a_plan(tmp_path):
    plan = Plan(kept={"a:heads": (0,)}, sizes={"a:heads": 2}, layout="stock")
    file = tmp_path / "new" / "plan.json"
    plan.save(file)
    plan.save(file)
    assert Plan.load(file) == plan
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    for text in ("mine", "[]", '{"kept": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PlanError, match=r"config\.json cannot be written \(it holds something"):
            plan.save(tmp_path / "config.json")
        assert (tmp_path / "config.json").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "new", "other"]
