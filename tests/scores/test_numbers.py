"""Numbers that a type or a device lacks: gradients that overflow, and float64 that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from score_examples import build, examples_of, in_batches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gradnas.errors import DataError, GradNASWarning
from hf_gradnas.scores import collect_scores, gradients, methods, sums
from hf_gradnas.types import Scores

aten = torch.ops.aten
MARK = zoo.VOCAB - 1
ALSO = ("taylor", "tempered", "gradnas")


def marked(count: int, bad: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Examples, of which some begin with a token that makes their gradients overflow."""
    examples = examples_of("bert", count)
    for number, example in enumerate(examples):
        example["input_ids"][:, 0] = MARK if number in bad else 3
    return examples


@contextmanager
def overflowing(model: nn.Module) -> Iterator[None]:
    """Let the gradients of examples that begin with `MARK` be infinite."""
    latest: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        latest[:] = [kwargs["input_ids"][:, :1] == MARK]

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill(latest[0], torch.inf))

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.classifier.register_forward_hook(watch),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_scores_are_those_of_the_other_examples(size: int) -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    examples = marked(12, bad=(7,))
    others = [example for number, example in enumerate(examples) if number != 7]
    with overflowing(model):
        with pytest.warns(GradNASWarning, match="gradients of 1 of 12 examples overflow"):
            found = collect_scores(model, axes, in_batches(examples, size), also=ALSO)
        expected = collect_scores(model, axes, in_batches(others, 1), also=ALSO)
    assert found.metadata["skipped_examples"] == "1"
    assert "skipped_examples" not in expected.metadata
    apart = 0.0 if size == 1 else 0.05  # float16 rounds otherwise in other batches
    for method in ("fisher", "taylor", "tempered"):
        for name, values in expected.of(method).values.items():
            largest = float(values.max())
            ours = found.of(method).values[name]
            np.testing.assert_allclose(ours / largest, values / largest, rtol=0, atol=apart)


def test_more_than_a_tenth_is_an_error() -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    with (
        overflowing(model),
        pytest.raises(DataError, match=r"2 of 12 .*, more than 10%; load the model in bfloat16"),
    ):
        collect_scores(model, axes, in_batches(marked(12, bad=(1, 7)), 4))


def test_other_types_have_room_for_all_numbers() -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    with (
        overflowing(model),
        pytest.raises(DataError, match=r"a gradient of .* though the loss is finite"),
    ):
        collect_scores(model, axes, in_batches(marked(12, bad=(7,)), 4))


def test_what_was_skipped_is_in_the_file_of_a_pass_that_broke_off(tmp_path: Any) -> None:
    model, axes, _ = build("bert", dtype=torch.float16)
    batches = in_batches(marked(12, bad=(1,)), 2)
    file = tmp_path / "scores.safetensors"

    def breaking() -> Iterator[dict[str, torch.Tensor]]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with overflowing(model):
        with pytest.warns(GradNASWarning, match="1 of 12"):
            expected = collect_scores(model, axes, batches)
        with pytest.raises(KeyboardInterrupt):
            collect_scores(model, axes, breaking(), file=file)
        assert Scores.load(file).metadata["skipped_examples"] == "1"
        with pytest.warns(GradNASWarning, match="1 of 12"):
            found = collect_scores(model, axes, batches, file=file)
    assert found.metadata == expected.metadata
    for name, values in expected.values.items():
        assert np.array_equal(found.values[name], values)


class _Float64(TorchDispatchMode):
    """Counts operations that make numbers in float64 where they are: a device may have none.

    What `Tensor.cpu` gave may be widened, and what is made of that may be anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._brought: dict[int, torch.Tensor] = {}  # held, so that no address comes again

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for `Tensor.cpu`."""
        self._brought[tensor.data_ptr()] = tensor
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        wide = [x for x in tensors if x.dtype == torch.float64]
        given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if given and all(x.data_ptr() in self._brought for x in given):
            self._brought |= {x.data_ptr(): x for x in wide}
        else:
            self.count += len(wide)
        return found


@pytest.mark.parametrize("method", ["fisher", "tempered", "taylor", "magnitude"])
def test_a_device_without_float64_is_asked_for_none(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    batches = in_batches(examples_of("bert", 4), 2)
    with _Float64() as mode:
        expected = collect_scores(model, axes, batches, method=method)
    assert mode.count
    for module in (gradients, methods, sums):
        monkeypatch.setattr(module, "wide", lambda values: values)  # as it is on MPS
    with _Float64() as mode:
        # A bound method would not be given the tensor.
        monkeypatch.setattr(torch.Tensor, "cpu", lambda x: mode.bring(x))  # noqa: PLW0108
        found = collect_scores(model, axes, batches, method=method)
    assert mode.count == 0
    for name, values in expected.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=1e-3, atol=1e-3 * values.max())
