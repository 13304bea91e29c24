"""Neurons that stay: chosen as elimination by least squares says, at the widths of the plan."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from score_examples import examples_of, in_batches

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.errors import DataError, OrderError, PlanError, RepairError, StructureError
from hf_gradnas.repair.memory import Memory
from hf_gradnas.repair.pieces import read_parts
from hf_gradnas.repair.repairs import Repair, mended, plan_digest
from hf_gradnas.repair.ridge import empty_gram
from hf_gradnas.repair.swaps import RIDGE, eliminated
from hf_gradnas.report import say_swap
from hf_gradnas.running.processes import Processes
from hf_gradnas.search.prediction import with_prediction
from hf_gradnas.types import Kind

BUDGET = {"flops": "60%"}


def batches_of(family: str, *, count: int = 40) -> list[dict[str, torch.Tensor]]:
    """Batches of the first of 40 examples."""
    examples = examples_of("llama" if family == "gpt2" else family, 40)
    return in_batches(examples[:count], 8)


def planned(family: str = "bert", flops: str = "60%", **options: Any) -> tuple[GradNASPruner, Plan]:
    """A pruner with scores of a tiny model in float64, and its plan."""
    pruner = GradNASPruner(zoo.build(family)[0], **{"layout": "per_layer", **options})
    pruner.score(batches_of(family))
    return pruner, pruner.plan({"flops": flops})


def neurons(pruner: GradNASPruner) -> list[Any]:
    return [axis for axis in pruner.structure.axes if axis.kind is Kind.NEURONS]


# --- the equation ---------------------------------------------------------------------------------


def by_hand(
    x: torch.Tensor, weight: torch.Tensor, count: int, first: set[int], step: int
) -> tuple[int, ...]:
    """The same elimination with every fit made from scratch, the ridge as rows of its own."""
    size = len(weight)
    ridge = RIDGE * x.square().sum(0).mean()
    rows = torch.cat([x, ridge.sqrt() * torch.eye(size, dtype=x.dtype)])
    wanted = rows @ weight
    left = list(range(size))

    def error(units: list[int]) -> float:
        found = torch.linalg.lstsq(rows[:, units], wanted).solution
        return float((rows[:, units] @ found - wanted).square().sum())

    while len(left) > count:
        errors = {unit: error([u for u in left if u != unit]) for unit in left if unit not in first}
        gone = sorted(errors, key=errors.__getitem__)[: min(step, len(left) - count)]
        left = [unit for unit in left if unit not in gone]
    return tuple(left)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [1, 3])
def test_elimination_is_that_of_fits_from_scratch(step: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(14, 14, generator=draw, dtype=torch.float64)
    x = torch.randn(60, 14, generator=draw, dtype=torch.float64) @ mixed
    weight = torch.randn(14, 5, generator=draw, dtype=torch.float64)
    gram, before = (x.t() @ x).tril(), weight.clone()
    found = eliminated(gram, weight, 6, first=[2, 9], step=step)
    assert found == by_hand(x, weight, 6, {2, 9}, step)
    assert {2, 9} <= set(found)
    assert torch.equal(weight, before)


def test_of_units_of_the_same_worth_the_first_go() -> None:
    weight = torch.ones(6, 2, dtype=torch.float64)
    assert eliminated(torch.eye(6, dtype=torch.float64), weight, 2, step=2) == (4, 5)


def test_singular_equations_choose_nothing() -> None:
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    assert eliminated(nothing, torch.ones(6, 2, dtype=torch.float64), 2) is None


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_widths_other_axes_and_the_upper_half_stay(family: str) -> None:
    pruner, plan = planned(family, score="fisher")
    told: list[tuple[int, int | None]] = []
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    swapped = pruner.swap(
        plan, batches_of(family), progress=lambda done, total: told.append((done, total))
    )
    assert swapped.counts() == plan.counts()
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1] == (told[-1][1], told[-1][1])
    others = {axis.name for axis in pruner.structure.axes} - {a.name for a in neurons(pruner)}
    assert {n: swapped.kept[n] for n in others} == {n: plan.kept[n] for n in others}
    changed = 0
    for axis in neurons(pruner):
        values, units = pruner.scores.values[axis.name], plan.kept[axis.name]
        best = sorted(units, key=lambda unit: (-values[unit], unit))[: (len(units) + 1) // 2]
        assert set(best) <= set(swapped.kept[axis.name])
        assert swapped.kept[axis.name] == tuple(sorted(set(swapped.kept[axis.name])))
        changed += swapped.kept[axis.name] != units
    assert changed
    rest = {"kept": plan.kept, "loss_increase": plan.loss_increase}
    assert replace(swapped, **rest) == plan
    assert Plan.from_dict(swapped.to_dict()) == swapped
    after = pruner.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("size", [1, 4])
def test_it_is_by_the_inputs_at_real_positions_of_every_second_batch(size: int) -> None:
    """Of the batches that a repair does not hold out."""
    pruner, plan = planned()
    batches = in_batches(examples_of("bert", 32), size)
    places = [place for place in range(len(batches)) if place % 5 != 4][::2]
    read = [row for place in places for row in range(place * size, (place + 1) * size)]
    swapped = pruner.swap(plan, batches)
    examples = examples_of("bert", 32)
    seen: dict[str, list[torch.Tensor]] = {axis.name: [] for axis in neurons(pruner)}
    hooks = [
        pruner.model.get_submodule(axis.taps[0].module).register_forward_pre_hook(
            lambda module, args, name=axis.name: seen[name].append(args[0].flatten(0, -2))
        )
        for axis in neurons(pruner)
    ]
    with torch.no_grad():
        for example in (examples[row] for row in read):  # without padding
            pruner.model(input_ids=example["input_ids"])
    for hook in hooks:
        hook.remove()
    for axis in neurons(pruner):
        x, units = torch.cat(seen[axis.name]), plan.kept[axis.name]
        weight = pruner.model.get_submodule(axis.taps[0].module).weight.detach().t()
        values = pruner.scores.values[axis.name]
        first = sorted(units, key=lambda unit: -values[unit])[: (len(units) + 1) // 2]
        assert eliminated(x.t() @ x, weight, len(units), first=first) == swapped.kept[axis.name]


@pytest.mark.parametrize("count", [8, 40], ids=["pieces", "batches"])
def test_what_the_repair_holds_out_chooses_nothing(count: int) -> None:
    """So that the held-out KL tells whether other neurons are better."""
    pruner, plan = planned()
    batches = batches_of("bert", count=count)
    parts = read_parts(pruner.model, batches, None, Processes())
    held = [part.batch.columns["input_ids"] for part in parts if part.is_held_out]
    changed = copy.deepcopy(batches)
    for batch in changed:
        for row, tokens in enumerate(batch["input_ids"]):
            if any(torch.equal(tokens, other) for rows in held for other in rows):
                batch["input_ids"][row] = tokens.flip(0)
    assert any(
        (a["input_ids"] != b["input_ids"]).any() for a, b in zip(batches, changed, strict=True)
    )
    assert pruner.swap(plan, changed) == pruner.swap(plan, batches) != plan


def test_the_predicted_loss_is_that_of_the_units_that_go() -> None:
    for score in ("fisher", "balanced"):
        pruner, plan = planned(score=score)
        swapped = pruner.swap(plan, batches_of("bert"))
        scores = pruner.scores
        total = sum(
            np.delete(scores.values[axis.name], list(swapped.kept[axis.name])).sum()
            for axis in pruner.structure.axes
        )
        expected = with_prediction(replace(swapped, loss_increase=total), scores)
        assert swapped.loss_increase == pytest.approx(expected.loss_increase, rel=1e-9)
        assert swapped.loss_increase > plan.loss_increase
        assert swapped.loss_unit == plan.loss_unit


def test_sums_of_one_layer_are_in_memory_at_a_time(monkeypatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def empty(*args: Any) -> torch.Tensor:
        assert all(ref() is None for ref in made)
        gram = empty_gram(*args)
        made.append(weakref.ref(gram))
        return gram

    monkeypatch.setattr("hf_gradnas.repair.swaps.empty_gram", empty)
    pruner, plan = planned()
    pruner.swap(plan, batches_of("bert"))
    assert len(made) == len(neurons(pruner))


def test_every_second_batch_is_run_once_and_what_waits_may_be_on_disk(monkeypatch) -> None:
    pruner, plan = planned()
    runs = []
    hook = pruner.model.register_forward_pre_hook(lambda *_: runs.append(1))
    wanted = pruner.swap(plan, batches_of("bert"))
    hook.remove()
    traced = 1
    assert len(runs) - traced == 2  # of five batches, one of them held out
    written = []
    real = Memory._write
    monkeypatch.setattr(Memory, "_write", lambda *args: (written.append(1), real(*args)))
    monkeypatch.setattr("hf_gradnas.repair.memory._MIN_BYTES", 1)
    monkeypatch.setattr("hf_gradnas.repair.swaps.default_bound", lambda model: 1.0)
    assert pruner.swap(plan, batches_of("bert")) == wanted
    assert written


def test_no_more_examples_are_read_than_asked_for() -> None:
    pruner, plan = planned()
    found = pruner.swap(plan, batches_of("bert"), num_examples=20)
    assert found == pruner.swap(plan, batches_of("bert", count=20))
    assert found != pruner.swap(plan, batches_of("bert"))


@pytest.mark.leaves_state
@pytest.mark.parametrize("layout", ["per_layer", "stock"])
def test_the_cut_model_is_the_masked_one(layout: str) -> None:
    pruner, plan = planned(flops="75%", layout=layout)
    batches = batches_of("bert")
    swapped = pruner.swap(plan, batches)
    assert swapped.kept != plan.kept
    repair = pruner.repair(swapped, batches)
    with torch.no_grad():
        with pruner.masked(swapped, repair):
            wanted = pruner.model(**batches[0]).logits
        pruner.apply(swapped, repair)
        assert (pruner.model(**batches[0]).logits - wanted).abs().max() < 1e-10


def test_where_no_axis_loses_a_part_the_plan_is_the_same() -> None:
    pruner, plan = planned()
    kept: dict[str, tuple[int, ...]] = dict(plan.kept)
    whole, *gone = neurons(pruner)
    kept |= {whole.name: tuple(range(whole.size)), **{axis.name: () for axis in gone}}
    plan = replace(plan, kept=kept)
    assert pruner.swap(plan, batches_of("bert")) is plan


def test_a_layer_that_a_repair_leaves_alone_keeps_its_neurons() -> None:
    model, batch = zoo.build("albert")  # its one layer runs several times
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.score([batch])
    plan = pruner.plan(BUDGET)
    assert any(0 < len(plan.kept[axis.name]) < axis.size for axis in neurons(pruner))
    assert pruner.swap(plan, [batch]) == plan


def test_scores_of_several_methods_are_those_of_the_plan() -> None:
    pruner = GradNASPruner(zoo.build("bert")[0], score="auto", layout="per_layer")
    pruner.score(batches_of("bert"))
    plan = pruner.plan(BUDGET)
    swapped = pruner.swap(plan, batches_of("bert"))
    pruner.use_scores(pruner.scores.of(plan.score))
    assert pruner.swap(plan, batches_of("bert")) == swapped


def test_what_is_said_of_it() -> None:
    pruner, plan = planned()
    first, *others = neurons(pruner)
    whole = {axis.name: tuple(range(axis.size)) for axis in others}
    kept = {**plan.kept, **whole, first.name: (0, 1, 2)}
    plan = replace(plan, kept=kept)
    swapped = replace(plan, kept={**kept, first.name: (0, 1, 7)})
    assert say_swap(pruner.structure, plan, swapped).startswith("Swapped 1 of 3 neurons that stay")


# --- what does not work ---------------------------------------------------------------------------


@pytest.mark.leaves_state
def test_before_the_scores_and_after_the_cut_it_says_what_to_call() -> None:
    pruner, plan = planned()
    other = GradNASPruner(copy.deepcopy(pruner.model), layout="per_layer")
    with pytest.raises(OrderError, match=r"scores: not known yet; call score\(dataloader\)"):
        other.swap(plan, batches_of("bert"))
    pruner.apply(plan)
    with pytest.raises(OrderError, match=r"^swap: .* cut already.* call swap\(plan, dataloader\)"):
        pruner.swap(plan, batches_of("bert"))


def test_bad_input_is_refused(monkeypatch) -> None:
    pruner, plan = planned()
    with pytest.raises(DataError, match="no batch"):
        pruner.swap(plan, [])
    other, _ = planned("llama")
    with pytest.raises(PlanError):
        other.swap(plan, batches_of("bert"))
    monkeypatch.setattr("hf_gradnas.repair.repairs.is_sharded", lambda _: True)
    with pytest.raises(StructureError, match=r"^swap: BertForSequenceClassification is sharded"):
        pruner.swap(plan, batches_of("bert"))


def test_activations_that_are_not_finite_name_the_layer() -> None:
    pruner, plan = planned()
    axis = neurons(pruner)[0]

    def spoil(module: Any, args: Any) -> tuple[torch.Tensor]:
        return (args[0] * float("nan"),)

    hook = pruner.model.get_submodule(axis.taps[0].module).register_forward_pre_hook(spoil)
    try:
        with pytest.raises(
            RepairError, match=f"^{axis.taps[0].module}: its inputs are not finite on b"
        ):
            pruner.swap(plan, batches_of("bert"))
    finally:
        hook.remove()


# --- with the repair ------------------------------------------------------------------------------


def plan_of(*units: int) -> Plan:
    return Plan(kept={"a:neurons": units}, sizes={"a:neurons": 9}, layout="per_layer")


@pytest.mark.parametrize(
    ("planned", "swapped", "is_swapped"),
    [
        ((3.0, 1.0), (4.0, 0.5), True),
        ((3.0, 1.0), (2.0, 1.5), False),
        ((3.0, 5.0), (4.0, 3.5), False),  # masks alone are closer than both
        ((3.0, 5.0), (4.0, 2.5), True),
        ((3.0, 1.0), (0.5, 0.7), False),  # not accepted
        ((3.0, 1.0), (math.nan, math.nan), False),
    ],
)
def test_the_closer_of_both_plans_is_kept(planned: Any, swapped: Any, is_swapped: bool) -> None:
    plan, other = plan_of(0, 1), plan_of(0, 2)

    def repair(plan: Plan, batches: Any) -> Repair:
        before, after = swapped if plan is other else planned
        tensors = {"w": torch.ones(1)} if after < before else {}
        return Repair(tensors, (), plan_digest(plan), "", kl_before=before, kl_after=after)

    found, made = mended(plan, [], lambda *_: other, repair, Processes())
    assert made is not None
    assert found is (other if is_swapped else plan)
    assert made.plan == plan_digest(found)
    assert mended(plan, [], None, repair, Processes())[0] is plan


@pytest.mark.parametrize(
    ("family", "choice", "is_swapped"),
    [
        ("bert", "auto", False),
        ("bert", "swap", True),
        ("llama", "auto", True),
        ("llama", "weights", False),
    ],
)
def test_prune_swaps_where_it_is_asked_to_or_the_loss_is_of_tokens(
    family: str, choice: str, is_swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = GradNASPruner.swap

    def note(self: GradNASPruner, *args: Any, **options: Any) -> Plan:
        asked.append(real(self, *args, **options))
        return asked[-1]

    monkeypatch.setattr(GradNASPruner, "swap", note)
    model, _ = zoo.build(family)
    pruner = GradNASPruner(model)
    plan = pruner.prune(batches_of(family), {"flops": "70%"}, repair=choice)
    assert len(asked) == is_swapped
    sizes = {name: len(units) for name, units in plan.kept.items()}
    assert all(sizes == other.counts() for other in asked)


def test_what_swaps_nothing_is_repaired_once() -> None:
    seen = []

    def repair(plan: Plan, batches: Any) -> Repair:
        seen.append(plan)
        return Repair({}, (), "", "")

    plan = plan_of(0, 1)
    assert mended(plan, [], lambda plan, _: plan, repair, Processes())[0] is plan
    assert seen == [plan]


@pytest.mark.filterwarnings("default:The model is pruned without")
def test_where_the_swap_alone_fails_the_repair_is_kept() -> None:
    def fail(plan: Plan, batches: Any) -> Plan:
        raise RepairError("a.layer: not finite.")

    plan = plan_of(0, 1)
    made = Repair({"w": torch.ones(1)}, (), plan_digest(plan), "", kl_before=3.0, kl_after=1.0)
    with pytest.warns(UserWarning, match=r"No other neurons are tried\. a\.layer: not finite"):
        assert mended(plan, [], fail, lambda *_: made, Processes()) == (plan, made)


def test_where_it_fails_the_plan_is_as_it_was() -> None:
    def fail(plan: Plan, batches: Any) -> Any:
        raise RepairError("a.layer: not finite.")

    plan = plan_of(0, 1)
    with pytest.warns(UserWarning, match=r"without a repair\. a\.layer: not finite"):
        assert mended(plan, [], fail, fail, Processes()) == (plan, None)
