"""No entry point makes float64 on a device that has none, and its results are the same ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from devices import lose_float64, without_float64
from score_examples import examples_of, in_batches

from hf_gradnas import nas
from hf_gradnas.callback import riding
from hf_gradnas.nas import scoring, searcher
from hf_gradnas.repair import recover
from hf_gradnas.repair.ridge import empty_gram
from hf_gradnas.running import precision, processes
from hf_gradnas.running.processes import Processes
from hf_gradnas.verification import find_structure

CPU = torch.device("cpu")


def test_the_widest_type_is_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"fp64": True}
    found = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(has_fp64=has["fp64"]))
    monkeypatch.setattr(torch, "xpu", found)
    assert [precision.widest(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xpu")] == [
        torch.float64,
        torch.float64,
        torch.float32,
        torch.float64,
    ]
    has["fp64"] = False
    assert precision.widest(torch.device("xpu", 0)) is torch.float32
    values = torch.ones(2, dtype=torch.bfloat16)
    assert precision.wide(values).dtype is torch.float64


@pytest.mark.leaves_state  # training leaves a model in train mode
def test_riding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.build("llama", dtype=torch.float32)  # without dropout
    batches = in_batches(examples_of("llama", 8), 4)
    axes = find_structure(model, batches[0]).axes

    def sums() -> Any:
        model.eval()
        found = riding.TrainingScores(model, axes, method="fisher", batch=batches[0], window=None)
        model.train()
        for batch in batches:
            found.arm()
            model(**batch).loss.backward()
            found.collect()
            model.zero_grad()
        return found.sums()

    expected = sums()
    assert expected.totals.dtype is torch.float64
    with without_float64(monkeypatch) as mode:
        found = sums()
    assert mode.count == 0
    assert found.totals.dtype is torch.float32
    assert torch.allclose(found.totals.double(), expected.totals, rtol=1e-3)


@pytest.mark.leaves_state
def test_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    student, batch = zoo.build("bert", dtype=torch.float32)
    teacher, _ = zoo.build("bert", dtype=torch.float32)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(zoo.BATCH)]
    with without_float64(monkeypatch) as mode:
        found = recover(student, teacher, rows, epochs=1, batch_size=2)
    assert np.isfinite(found.loss)
    assert mode.count == 0


def test_scores_of_the_references_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.build("bert", dtype=torch.float32)
    dummy = ({name: values[:1] for name, values in batch.items() if name != "labels"},)
    nas.convert(model, [("gradnas", {"nn.Linear": {"feature_divisor": 8}})])
    settings = {
        "data_loader": [batch],
        "collect_func": lambda batch: (batch,),
        "loss_func": lambda output, batch: output.loss,
        "verbose": False,
        "score_convergence_tol": 0.1,
        "score_convergence_min_updates": 1,
    }
    counts = []

    def measured(*args: Any, **options: Any) -> Any:
        with without_float64(monkeypatch) as mode:
            found = scoring.measure_scores(*args, **options)
        counts.append(mode.count)
        return found

    monkeypatch.setattr(searcher, "measure_scores", measured)
    nas.search(model, {"flops": "60%"}, dummy, settings)
    assert counts == [0]


def test_sums_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(device=torch.device("mps"))
    two = Processes()
    two.count, two.accelerator = 2, accelerator  # type: ignore[assignment]
    monkeypatch.setattr(processes, "gather_object", lambda items: [*items, items[0] * 2])
    assert two.gather([2.0**53 - 1, 3]).tolist() == [[2.0**53 - 1, 3], [2.0**54 - 2, 6]]
    assert two.sum(np.array([2.0**-40, 1.0])).tolist() == [3 * 2.0**-40, 3.0]


def test_sums_of_a_repair_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(0, device="meta")
    assert empty_gram(3, like).device.type == "meta"
    lose_float64(monkeypatch)
    gram = empty_gram(3, like)
    assert (gram.device, gram.dtype) == (CPU, torch.float64)
