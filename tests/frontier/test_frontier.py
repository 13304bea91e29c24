"""A sweep measures what masks do, scores once, keeps what it measured, and peeks at nothing."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo
from score_examples import examples_of, in_batches
from torch.utils.data import DataLoader

from hf_gradnas import GradNASPruner, Scores
from hf_gradnas.errors import (
    BudgetError,
    DataError,
    GradNASWarning,
    OrderError,
    PlanError,
    RepairError,
)
from hf_gradnas.frontier import measure as sweeping
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.repair.repairs import Repair, plan_digest
from hf_gradnas.types import Frontier

SCORES = ("fisher", "taylor", "magnitude", "random")
BUDGETS = {"params": ["85%", "70%"]}


def swept(pruner, *arguments, repair: str = "none", **options) -> Frontier:
    """The frontier, measured with masks only unless asked otherwise."""
    return pruner.sweep(*arguments, repair=repair, **options)


def collate(examples) -> dict[str, torch.Tensor]:
    """One padded batch of examples without a batch dimension."""
    return in_batches([{k: v[None] for k, v in e.items()} for e in examples], len(examples))[0]


def loss_of(model) -> dict[str, float]:
    """The loss on one fixed batch."""
    ids = torch.arange(12).reshape(2, 6) + 1
    with torch.no_grad():
        return {"loss": model(input_ids=ids, labels=ids).loss.item()}


@pytest.fixture
def llama():
    """A pruner, what it is scored on, and what it is measured on."""
    model, inputs = zoo.build("llama")
    other = zoo.build("llama", seed=1)[1]
    return GradNASPruner(model, layout="per_layer"), inputs, other


@pytest.fixture
def passes(monkeypatch):
    """The methods of every pass of scoring."""
    found = []

    def collect(*args, **options):
        found.append((options["method"], *options.get("also", ())))
        return own(*args, **options)

    own = sweeping.collect_scores
    monkeypatch.setattr(sweeping, "collect_scores", collect)
    return found


def test_points_are_what_masks_do(llama, passes):
    pruner, inputs, other = llama
    frontier = swept(pruner, [inputs], BUDGETS, batches=[other], evaluate=loss_of, score=SCORES)
    assert passes == [("fisher", "taylor"), ("magnitude",), ("random",)]
    assert pruner.plan({"params": "85%"}).score == "fisher"  # it goes on with the first
    assert frontier.original == loss_of(pruner.model)
    assert frontier.totals == pruner.totals
    assert [(p.score, p.budget.ratio) for p in frontier.points] == [
        (score, pytest.approx(ratio)) for score in SCORES for ratio in (0.85, 0.7)
    ]
    for point in frontier.points:
        pruner.score_method = point.score
        pruner.score([inputs])
        plan = pruner.plan({"params": f"{100 * point.budget.ratio}%"})
        assert point.costs == plan.costs
        assert point.loss_increase == plan.loss_increase
        with pruner.masked(plan):
            assert point.metrics == loss_of(pruner.model)
        (kl,) = divergences(pruner.model, [other], [partial(pruner.masked, plan)])
        assert point.kl == pytest.approx(kl, rel=1e-12)
        assert point.kl > 0


def test_costs_are_budgets_of_their_own_and_mild_ones_come_first(llama):
    pruner, inputs, other = llama
    budgets = {"flops": "80%", "params": ["70%", 0.9 * 1e5, "90%"]}
    pruner.discover(inputs)
    budgets["params"][1] = 0.8 * pruner.totals["params"]
    frontier = swept(pruner, [inputs], budgets, batches=[other], score="magnitude")
    assert [(p.budget.cost, round(p.budget.ratio, 6)) for p in frontier.points] == [
        ("flops", 0.8),
        ("params", 0.9),
        ("params", 0.8),
        ("params", 0.7),
    ]
    assert all(p.costs[p.budget.cost] <= p.budget.limit for p in frontier.points)
    assert all(p.metrics == {} for p in frontier.points)


def test_every_seed_has_its_own_subset_and_draws(llama):
    pruner, inputs, other = llama
    loaders = {0: [inputs], 1: [other]}
    options = {"batches": [other], "labels": "model", "score": ("fisher", "random")}
    frontier = swept(pruner, loaders, {"params": "70%"}, **options)
    assert [(p.seed, p.score) for p in frontier.points] == [
        (0, "fisher"),
        (0, "random"),
        (1, "fisher"),
        (1, "random"),
    ]
    assert len({p.key for p in frontier.points}) == 4
    assert pruner.scores.metadata["seed"] == "0"


BAD = {
    "out of reach": ({"params": ["70%", "1%"]}, {}, BudgetError, "cannot be reached"),
    "twice": ({"params": ["70%", "70.0%"]}, {}, BudgetError, "params=70.0% is there twice"),
    "no limit": ({"params": []}, {}, BudgetError, "needed a mapping from a cost to one limit"),
    "no mapping": (["70%"], {}, BudgetError, r"budgets: found \['70%'\]"),
    "unknown score": (BUDGETS, {"score": "auto"}, PlanError, "score: 'auto' is not known"),
    "no score": (BUDGETS, {"score": ()}, PlanError, r"score: found \[\]; needed one or more"),
    "a score twice": (BUDGETS, {"score": ("fisher",) * 2}, PlanError, "each once"),
    "nothing to measure on": (BUDGETS, {"batches": []}, DataError, "yields no batch"),
    "a batch that is none": (BUDGETS, {"batches": [1]}, DataError, "Batch 0 is a int"),
    "not finite": (
        BUDGETS,
        {"evaluate": lambda model: {"f1": float("nan")}},
        DataError,
        "evaluate: f1 of the whole model is nan",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_slips_are_found_before_scoring(name, llama, passes, tmp_path):
    pruner, inputs, other = llama
    budgets, options, error, said = BAD[name]
    with pytest.raises(error, match=said):
        swept(pruner, [inputs], budgets, **{"batches": [other], "evaluate": loss_of, **options})
    assert passes == []


def test_there_must_be_a_seed(llama):
    pruner, inputs, other = llama
    pruner.discover(inputs)
    with pytest.raises(PlanError, match="loaders: found no seed"):
        swept(pruner, {}, BUDGETS, batches=[other])


@pytest.mark.leaves_state
def test_a_cut_model_is_not_swept(llama):
    pruner, inputs, other = llama
    pruner.prune([inputs], {"params": "80%"})
    with pytest.raises((OrderError, PlanError), match="sweep"):
        swept(pruner, [inputs], BUDGETS, batches=[other])


# --- the file -------------------------------------------------------------------------------------


class Counting:
    """An evaluation that counts its calls, and may fail at one."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, model) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return loss_of(model)


def test_what_was_measured_is_not_measured_again(llama, tmp_path, passes):
    pruner, inputs, other = llama
    file = tmp_path / "sweep.json"
    options = {"batches": [other], "score": ("fisher", "taylor"), "file": file}
    # The original, two plans of fisher, and one of taylor before the interruption.
    with pytest.raises(KeyboardInterrupt):
        swept(pruner, [inputs], BUDGETS, evaluate=Counting(fails_at=4), **options)
    kept = Frontier.load(file).points
    assert [point.score for point in kept] == ["fisher", "fisher"]
    count = Counting()
    whole = swept(pruner, [inputs], BUDGETS, evaluate=count, document={"a": 1}, **options)
    assert count.calls == 1 + 2
    assert whole.points[:2] == kept
    assert Frontier.load(file) == whole
    assert whole.document == {"a": 1}
    again = Counting()
    assert swept(pruner, [inputs], BUDGETS, evaluate=again, **options).points == whole.points
    assert again.calls == 1
    assert Scores.load(tmp_path / "sweep.scores-0.safetensors").methods == ("fisher", "taylor")
    # A later interruption loses nothing of what is in the file.
    more = {**options, "score": ("random", *options["score"])}
    with pytest.raises(KeyboardInterrupt):
        swept(pruner, [inputs], BUDGETS, evaluate=Counting(fails_at=2), **more)
    kept = {point.key: point for point in Frontier.load(file).points}
    assert kept == {point.key: point for point in whole.points}


def test_other_data_or_metrics_are_measured_anew(llama, tmp_path):
    pruner, inputs, other = llama
    options = {"score": "magnitude", "file": tmp_path / "sweep.json"}
    first = swept(pruner, [inputs], BUDGETS, batches=[other], evaluate=loss_of, **options)
    second = swept(pruner, [inputs], BUDGETS, batches=[inputs], evaluate=loss_of, **options)
    assert all(a.kl != b.kl for a, b in zip(first.points, second.points, strict=True))
    twice = swept(
        pruner, [inputs], BUDGETS, batches=[inputs], evaluate=lambda m: {"double": 2}, **options
    )
    assert [point.metrics for point in twice.points] == [{"double": 2.0}] * 2


def test_a_file_of_something_else_stops_it_before_scoring(llama, tmp_path, passes):
    pruner, inputs, other = llama
    file = tmp_path / "sweep.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(PlanError, match="needed 'frontier' of 1"):
        swept(pruner, [inputs], BUDGETS, batches=[other], file=file)
    with pytest.raises(PlanError, match="cannot be written"):
        swept(pruner, [inputs], BUDGETS, batches=[other], file=tmp_path / "sweep.json" / "a.json")
    assert passes == []


def test_what_is_measured_on_reaches_neither_scores_nor_plans(llama, tmp_path):
    pruner, inputs, other = llama
    plans = []
    for name, batch in (("a", other), ("b", inputs)):
        file = tmp_path / name / "sweep.json"
        found = swept(pruner, [inputs], BUDGETS, batches=[batch], evaluate=loss_of, file=file)
        plans.append([point.costs for point in found.points])
    assert plans[0] == plans[1]
    files = [Scores.load(tmp_path / name / "sweep.scores-0.safetensors") for name in "ab"]
    assert files[0].metadata == files[1].metadata
    for name, values in files[0].values.items():
        assert (values == files[1].values[name]).all()


# --- repair ---------------------------------------------------------------------------------------


@pytest.fixture
def repairs(monkeypatch):
    """The plans that were repaired."""
    found = []

    def repair(pruner, plan, *arguments, **options) -> Repair:
        found.append(plan)
        return own(pruner, plan, *arguments, **options)

    own = GradNASPruner.repair
    monkeypatch.setattr(GradNASPruner, "repair", repair)
    return found


def test_repaired_plans_are_measured_beside_the_masked():
    pruner = GradNASPruner(zoo.build("bert")[0], layout="per_layer")
    data = in_batches(examples_of("bert", 40), 8)

    def measured(model) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": model(**data[0]).loss.item()}

    options = {"batches": data[:2], "evaluate": measured}
    budgets = {"flops": ["70%", "50%"]}
    found = swept(pruner, data, budgets, repair="auto", **options)
    assert [point.state for point in found.points] == ["masked", "repaired"] * 2
    assert found.points[::2] == swept(pruner, data, budgets, **options).points
    for point in found.points[1::2]:
        plan = pruner.plan({"flops": f"{100 * point.budget.ratio}%"})
        repair = pruner.repair(plan, data)
        assert repair.is_accepted
        with pruner.masked(plan, repair):
            assert point.metrics == pytest.approx(measured(pruner.model), rel=1e-9)
    assert all(b.kl < a.kl for a, b in zip(found.points[::2], found.points[1::2], strict=True))


def test_a_repair_is_in_order_of_length_and_its_digest_in_that_of_the_file(monkeypatch):
    pruner = GradNASPruner(zoo.build("bert")[0], layout="per_layer")
    rows = [{k: v[0] for k, v in e.items()} for e in examples_of("bert", 12, longest=30)]
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    given = []

    def note(pruner, plan, batches, *, num_examples, **options) -> Repair:
        given.extend(batches)
        return own(pruner, plan, batches, num_examples=num_examples, **options)

    own = GradNASPruner.repair
    monkeypatch.setattr(GradNASPruner, "repair", note)
    options = {"batches": [collate(rows)], "repair": "auto", "num_examples": 10}
    found = swept(pruner, loader, {"flops": "70%"}, **options)
    widths = [batch["input_ids"].shape[1] for batch in given]
    lengths = [len(row["input_ids"]) for row in rows[:10]]
    assert widths == sorted(lengths, reverse=True)[::2]
    assert lengths != sorted(lengths, reverse=True)
    plain = swept(pruner, list(loader), {"flops": "70%"}, **options)  # nothing can be sorted
    assert [point.key for point in plain.points] == [point.key for point in found.points]


def test_a_repair_is_found_once(llama, tmp_path, repairs):
    pruner, inputs, other = llama
    data, file = [inputs, other, inputs], tmp_path / "sweep.json"
    options = {"batches": [other], "file": file, "repair": "auto", "score": "magnitude"}
    first = swept(pruner, data, {"params": "70%"}, **options)
    assert swept(pruner, data, {"params": "70%"}, **options).points == first.points
    assert len(repairs) == 1
    # Other calibration data repairs otherwise, and is measured anew.
    other_points = swept(pruner, data[:2], {"params": "70%"}, **options).points
    assert other_points[0] == first.points[0]
    assert other_points[1].key != first.points[1].key
    assert len(repairs) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_without_a_repair_the_masked_values_stay(llama, monkeypatch, fails):
    pruner, inputs, other = llama

    def none(self, plan, *_, **__) -> Repair:
        if fails:
            raise RepairError("no room; make some.")
        return Repair({}, (), plan_digest(plan), "")

    monkeypatch.setattr(GradNASPruner, "repair", none)
    count = Counting()
    options = {"batches": [other], "evaluate": count, "repair": "auto"}
    said = pytest.warns(GradNASWarning, match="no room") if fails else nullcontext()
    with said:
        found = swept(pruner, [inputs], BUDGETS, **options)
    for masked, repaired in zip(found.points[::2], found.points[1::2], strict=True):
        assert replace(repaired, state="masked", key=masked.key) == masked
    assert count.calls == 1 + 2


def test_an_unknown_repair_is_refused(llama):
    pruner, inputs, other = llama
    with pytest.raises(PlanError, match="repair='yes' is not known"):
        swept(pruner, [inputs], BUDGETS, batches=[other], repair="yes")


# --- progress -------------------------------------------------------------------------------------


def test_progress_says_what_is_done(llama):
    pruner, inputs, other = llama
    said = []

    @contextmanager
    def bar(what):
        yield lambda done, total: said.append((what, done, total))

    swept(pruner, [inputs], BUDGETS, batches=[other], progress=bar)
    rows = len(inputs["input_ids"])
    assert said == [
        ("Measuring the original", 0, None),
        ("Scoring (seed 0)", rows, None),
        ("Measuring (tempered, seed 0)", 0, 2),
        ("Measuring (tempered, seed 0)", 1, 2),
        ("Measuring (tempered, seed 0)", 2, 2),
    ]
