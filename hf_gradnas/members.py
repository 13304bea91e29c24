"""Modules of a list that are units, or hold the units of one: masks on them, and hooks that watch.

Knows lists and taps; knows neither routers nor scores.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from .running.hooks import When, add_hook, add_pre_hook, only_when
from .types import Tap

Read = Callable[[int, Tensor], Tensor]
"""Gets the place of a module in its list, and what is there; returns what is put in its place."""


def members_in(holder: nn.Module) -> dict[str, nn.Module]:
    """The modules of a list that have parameters, by their names in it, in order."""
    return {
        name: member
        for name, member in holder.named_children()
        if next(member.parameters(), None) is not None
    }


class AtMembers:
    """Hooks of all modules of a list that change what is at a tap.

    Args:
        tap: What they put out, or what a module in each of them reads.
        read: What is done with it.
    """

    def __init__(self, tap: Tap, read: Read) -> None:
        self._tap, self._read = tap, read

    def attach(self, stack: ExitStack, holder: nn.Module, when: When | None = None) -> None:
        """Hook into the modules of a list until `stack` closes."""
        for number, member in enumerate(members_in(holder).values()):
            if self._tap.side == "outputs":
                add_hook(stack, member, only_when(partial(self._on_output, number), when))
            else:
                inner = member.get_submodule(self._tap.inner)
                add_pre_hook(stack, inner, only_when(partial(self._on_input, number), when))

    def _on_output(
        self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        return self._read(number, output)

    def _on_input(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._read(number, args[0]), *args[1:])


def times_mask(tap: Tap, mask: Tensor, holder: nn.Module) -> AtMembers:
    """Hooks that multiply the units of every module of a list by their part of a mask.

    Args:
        tap: Where they are.
        mask: Of the units of all modules ``(size,)``, one after another.
        holder: The list.
    """
    each = len(mask) // len(members_in(holder))

    def multiply(number: int, x: Tensor) -> Tensor:
        own = mask[number * each : (number + 1) * each].to(device=x.device, dtype=x.dtype)
        return x * own.repeat_interleave(x.shape[-1] // each)

    return AtMembers(tap, multiply)
