"""What torch keeps for a thread, of which every waiting forward needs its own.

Knows torch's settings, and nothing of forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)


def seed() -> None:
    """Let a forward that draws numbers draw the same in both runs, on devices in `Modes` alone."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(0)


@dataclass(frozen=True, slots=True, eq=False)
class Modes:
    """What torch keeps for a thread, which a forward may change while it waits within a block.

    Attributes:
        random: States of the random number generators of the CPU and the current accelerator.
        has_gradients: Whether gradients are recorded.
        autocast: Whether autocast is on, and its type, per kind of device.
        functions: Modes that see the functions of torch, such as masks of a router.
    """

    random: tuple[Tensor, ...]
    has_gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    functions: tuple[TorchFunctionMode, ...]

    @classmethod
    def now(cls) -> Modes:
        """As they are."""
        random = [torch.get_rng_state()]
        if torch.cuda.is_available():
            random.append(torch.cuda.get_rng_state())
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        )
        functions = tuple(_get_current_function_mode_stack())
        return cls(tuple(random), torch.is_grad_enabled(), autocast, functions)

    def set(self) -> None:
        """Have them again."""
        torch.set_rng_state(self.random[0])
        for state in self.random[1:]:
            torch.cuda.set_rng_state(state)
        torch.set_grad_enabled(self.has_gradients)
        for kind, is_on, dtype in self.autocast:
            torch.set_autocast_enabled(kind, is_on)
            torch.set_autocast_dtype(kind, dtype)
        for _ in _get_current_function_mode_stack():
            _pop_mode()
        for mode in self.functions:
            _push_mode(mode)
