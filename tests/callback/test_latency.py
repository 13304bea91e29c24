"""Budgets in milliseconds while a model trains: where the table comes from, and when."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import BUDGET, batch_of, build, make_trainer, pruning

from hf_gradnas import GradNASCallback, GradNASPruner, examined
from hf_gradnas.errors import BudgetError, PlanError
from hf_gradnas.types import Curve, LatencyTable, Prunable, Timed, is_timed, table_fingerprint

pytestmark = pytest.mark.leaves_state  # training leaves a model in train mode
IN_MS = {"latency_ms": "60%"}
TOTAL_MS = 10.0


def table_of(prunable: Prunable, total_ms: float = TOTAL_MS, **given: Any) -> LatencyTable:
    """A table in which all sub-layers take 2 ms each, in proportion to what they keep."""
    timed = tuple(
        Timed((axis.name,), Curve((0.0, float(axis.size)), (0.0, 2.0)))
        for axis in prunable.axes
        if is_timed(axis)
    )
    machine = {"machine": "a test", "device": "cpu", "dtype": "float64"}
    sizes = {"batch_size": 1, "phase": "prefill", **given, "length": 8}
    fingerprint = table_fingerprint(prunable)
    return LatencyTable(fingerprint, **machine, **sizes, total_ms=total_ms, timed=timed)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was measured: each time the model is half a millisecond slower."""
    calls: list[dict[str, Any]] = []

    def measure(model: Any, prunable: Prunable, batch: Any, **given: Any) -> LatencyTable:
        given.pop("cut_whole", None)
        calls.append({**given, "is_training": model.training})
        return table_of(prunable, TOTAL_MS + 0.5 * (len(calls) - 1), **given)

    monkeypatch.setattr(examined, "measure_table", measure)
    return calls


def in_ms(**options: Any) -> GradNASCallback:
    return GradNASCallback(IN_MS, **{"num_examples": 4, "stages": 3, "score": "fisher", **options})


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
def test_a_table_is_measured_before_the_training(when: str, tmp_path: Path, measured) -> None:
    callback = in_ms(when=when, latency_batch_size=2)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert measured == [{"batch_size": 2, "length": None, "phase": "prefill", "is_training": False}]
    assert 0.5 < callback.plan.costs["latency_ms"] / TOTAL_MS <= 0.6 + 1e-12
    assert LatencyTable.load(tmp_path / "pruned.latency.json").total_ms == TOTAL_MS
    logged = [entry for entry in trainer.state.log_history if "gradnas/kept_latency_ms" in entry]
    assert logged
    assert trainer.model.training  # as the trainer left it
    document = json.loads((callback.directory / "gradnas.json").read_text(encoding="utf-8"))
    assert document["callback"]["latency_batch_size"] == 2


def test_a_given_table_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined, "measure_table", None)
    pruner = GradNASPruner(build())
    pruner.discover(batch_of("bert", 0))
    table_of(pruner.prunable).save(tmp_path / "table.json")
    callback = GradNASCallback(
        {"latency_ms": 6, "params": "90%"}, score="fisher", latency_table=tmp_path / "table.json"
    )
    make_trainer(tmp_path, callback, learning_rate=0.0).train()
    pruner.use_scores(callback.scores)
    pruner.use_latency(tmp_path / "table.json")
    assert callback.plan.kept == pruner.plan({"latency_ms": 6, "params": "90%"}).kept
    assert not (tmp_path / "pruned.latency.json").exists()


@pytest.mark.parametrize("when", ["end", "gradual"])
def test_a_resumed_run_takes_the_table_that_it_began_with(when, tmp_path: Path, measured) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    callback = in_ms(when=when)
    make_trainer(tmp_path, callback, **saving).train()
    resumed = in_ms(when=when)
    trainer = make_trainer(tmp_path, resumed, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(measured) == 1
    assert resumed.plan == callback.plan


@pytest.mark.usefixtures("measured")
def test_a_budget_below_what_is_constant_fails_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GradNASCallback({"latency_ms": "5%"}))
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"latency_ms: 5% .* cannot be reached"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.state_dict().items())


@pytest.mark.parametrize("is_mixed", [False, True])
def test_measuring_leaves_the_training_as_it_is(
    is_mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, clock, dtypes = examined.measure_table, count(1), []

    def measure(model: Any, prunable: Prunable, batch: Any, **given: Any) -> LatencyTable:
        ticks = {"seconds": 0.0, "clock": lambda: float(next(clock))}
        dtypes.append(own(model, prunable, batch, **given, **ticks).dtype)
        return table_of(prunable)

    monkeypatch.setattr(examined, "measure_table", measure)
    model = build("bert", dtype=torch.float32)
    options = {"bf16": is_mixed, "seed": 3}
    plain = make_trainer(tmp_path / "plain", None, model=model, **options)
    plain.train()
    callback = in_ms()
    model = build("bert", dtype=torch.float32)
    trainer = make_trainer(tmp_path / "pruned", callback, model=model, **options)
    trainer.train()
    assert dtypes == ["float32"]  # as it will be saved
    losses = [
        [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        for each in (plain, trainer)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (BUDGET, {"latency_phase": "decode"}, "latency_phase: has no effect, as no budget is in"),
        (IN_MS, {"latency_phase": "x"}, "latency_phase='x' is not known; choose one of prefill"),
        (IN_MS, {"latency_batch_size": 0}, "latency_batch_size=0: needed is 1 or more"),
        (
            IN_MS,
            {"latency_table": "t.json", "latency_batch_size": 4},
            "latency_batch_size: has no effect, as latency_table says",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(budget, options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        GradNASCallback(budget, **options)


def test_a_table_that_is_not_there_is_refused_where_the_callback_is_made(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="there is no such file"):
        in_ms(latency_table=tmp_path / "none.json")
    assert in_ms().settings.budget == IN_MS
    assert GradNASCallback({"latency_ms": 20}).settings.budget == {"latency_ms": 20}


def test_a_file_that_is_no_table_is_not_written_over(tmp_path: Path, measured) -> None:
    (tmp_path / "pruned.latency.json").write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(PlanError, match="is where the table of latencies is saved, and it holds"):
        make_trainer(tmp_path, in_ms()).train()
    assert not measured
    make_trainer(tmp_path, pruning()).train()  # no table is written there


def test_a_recipe_in_milliseconds(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ntarget:\n  latency_ms: 60%\nlatency_batch_size: 8\n", encoding="utf-8"
    )
    settings = GradNASCallback.from_recipe(recipe).settings
    assert settings.budget == {"latency_ms": "60%"}
    assert (settings.latency_batch_size, settings.latency_phase) == (8, "prefill")
