"""Tensors in files without a name: the same numbers, and no memory that is their own."""

from __future__ import annotations

import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gradnas.repair import mapped as module
from hf_gradnas.repair.mapped import mapped, replace_weights

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def is_in_file(tensor: torch.Tensor) -> bool:
    """Whether its address is in a file that was mapped."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return "gradnas-repair-" in line
    return False


@on_linux
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_the_numbers_are_the_same_and_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensor = (100 * torch.randn(400, 300, generator=draw)).to(dtype)
    for given in (tensor, tensor.t(), tensor[::2, 50:], torch.nn.Parameter(tensor.double())):
        found = mapped(given, tmp_path)
        assert torch.equal(found, given)
        assert (found.shape, found.dtype) == (given.shape, given.dtype)
        assert not found.requires_grad
        assert is_in_file(found)
        assert not is_in_file(given)
        assert not list(tmp_path.iterdir())


@on_linux
def test_what_is_written_to_one_is_its_own() -> None:
    tensor = torch.zeros(300, 300)
    first, second = mapped(tensor), mapped(tensor)
    first.add_(1)
    assert (float(first.mean()), float(second.sum()), float(tensor.sum())) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_what_cannot_be_in_a_file_is_as_it_was(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    small, large = torch.zeros(100), torch.zeros(300, 300)
    for tensor in (small, large.to("meta")):
        assert mapped(tensor, tmp_path) is tensor
    assert mapped(large, tmp_path / "absent") is large
    assert (mapped(large, tmp_path) is large) == (system == "win32")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", full)
    assert mapped(large, tmp_path) is large


@on_linux
def test_old_weights_wait_in_files_for_parameters_that_are_still_there() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(200, 100) for name in ("stays", "goes")})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = {name: torch.ones_like(value) for name, value in before.items()}
    with ExitStack() as undo:
        replace_weights(model, new, undo)
        assert all(torch.equal(value, new[name]) for name, value in model.state_dict().items())
        assert not is_in_file(model["stays"].weight)
        replaced = weakref.ref(model["goes"].weight)
        model["goes"].weight = torch.nn.Parameter(torch.zeros(50, 200))
        assert replaced() is None
    assert torch.equal(model["stays"].weight, before["stays.weight"])
    assert torch.equal(model["stays"].bias, before["stays.bias"])
    assert model["goes"].weight.shape == (50, 200)
    assert all(float(value.mean()) == 1.0 for value in new.values())
