"""Examples whose gradients overflow, as they do in float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import zoo
from score_examples import examples_of
from torch import nn

MARK = zoo.VOCAB - 1


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
