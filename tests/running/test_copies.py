"""Copies to a device do not make the host wait, and those from it are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

from hf_gradnas.batches.batch import check_batch, to_device
from hf_gradnas.running import copies

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked for, with nothing but a CPU: pinned memory, and copies to a GPU."""
    made: list[Any] = []
    own = torch.Tensor.to

    def to(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device) and args[0].type != "cpu":
            made.append((args[0], options))
            return own(x, *args[1:])
        return own(x, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: made.append(x.dtype) or x)
    return made


def test_what_goes_to_a_gpu_is_pinned_in_its_type_first(calls: list[Any]) -> None:
    found = copies.sent(torch.ones(2, dtype=torch.float64), CUDA, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert calls == [torch.bfloat16, (CUDA, {"non_blocking": True})]


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_other_devices_have_no_pinned_memory(calls: list[Any], kind: str) -> None:
    copies.sent(torch.ones(2), torch.device(kind, 0 if kind == "mps" else None), torch.float64)
    assert all(options == {} for _, options in calls)


def test_a_batch_is_moved_as_a_whole(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.build("bert", dtype=torch.float32)
    monkeypatch.setattr("hf_gradnas.batches.batch.device_of", lambda _: CUDA)
    boxes = [{"boxes": torch.ones(1, 4, dtype=torch.float64)}]
    columns = {**batch, "inputs_embeds": torch.ones(2, 3, 4, dtype=torch.float64), "more": boxes}
    found = to_device(columns, model)
    assert found["more"][0]["boxes"].dtype is found["inputs_embeds"].dtype is torch.float32
    assert found["labels"].dtype is batch["labels"].dtype
    moved = [call for call in calls if isinstance(call, tuple)]
    assert moved == [(CUDA, {"non_blocking": True})] * (len(batch) + 2)


def test_what_is_there_already_is_no_copy() -> None:
    x = torch.ones(2)
    assert copies.sent(x, CPU) is x
    columns = {"x": x}
    assert copies.on_host(columns) is columns


def test_what_is_on_a_device_comes_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(copies, "_is_away", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: brought.append(x.numel()) or own(x))
    x = torch.arange(6).reshape(2, 3)
    columns = {
        "mask": torch.tensor([[True, False, True]]),
        "labels": x,
        "again": x,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "nested": [{"turned": torch.randn(4, 5).t()}, "text", (torch.tensor(3.0),)],
    }
    found = copies.on_host(columns)
    assert brought == [3 + 48 + 6 + 80 + 4]
    assert found["again"] is found["labels"]
    assert found["nested"][1] == "text"
    for name in ("mask", "labels", "half"):
        assert torch.equal(found[name], columns[name])
    turned, (number,) = found["nested"][0]["turned"], found["nested"][2]
    assert torch.equal(turned, columns["nested"][0]["turned"])
    assert number.shape == ()
    batch = check_batch(0, {"labels": x}, ["labels"])
    assert batch.columns["labels"] is not x
    assert check_batch(0, {"labels": x}, ["labels"], brings=False).columns["labels"] is x
