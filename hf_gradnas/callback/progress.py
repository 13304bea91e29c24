"""How far a pruning run has come, in the form that a trainer's checkpoint keeps.

Which units are kept is small and stands in ``trainer_state.json``, so that it is there whole or not
at all; sums of scores stand beside the weights in ``gradnas.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ScoresError
from ..structure.sizes import Kept
from ..types import Plan

FILE = "gradnas.safetensors"


@dataclass(slots=True)
class Progress:
    """State of a run.

    Attributes:
        stage: Number of stages that are done.
        plan: What is pruned now: reached by the last stage that is done; None: nothing.
        coming: What the stage that is under way will reach; None: not planned yet.
        is_final: Whether `plan` meets the budget.
    """

    stage: int = 0
    plan: Plan | None = None
    coming: Plan | None = None
    is_final: bool = False

    @property
    def kept(self) -> Kept:
        """Units kept now; axes that lost none may be missing."""
        return {} if self.plan is None else self.plan.kept

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "stage": self.stage,
            "is_final": self.is_final,
            "plan": _packed(self.plan),
            "coming": _packed(self.coming),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """Inverse of `to_dict`."""
        return cls(
            data["stage"], _unpacked(data["plan"]), _unpacked(data["coming"]), data["is_final"]
        )


def _packed(plan: Plan | None) -> dict[str, Any] | None:
    """The plan with one hexadecimal digit per four units."""
    if plan is None:
        return None
    flags = {name: np.isin(np.arange(size), plan.kept[name]) for name, size in plan.sizes.items()}
    bits = {name: np.packbits(flag).tobytes().hex() for name, flag in flags.items()}
    return {**plan.to_dict(), "kept": bits}


def _unpacked(data: Mapping[str, Any] | None) -> Plan | None:
    if data is None:
        return None
    kept = {}
    for name, text in data["kept"].items():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
        kept[name] = np.flatnonzero(bits[: data["sizes"][name]]).tolist()
    return Plan.from_dict({**data, "kept": kept})


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors beside a checkpoint; the file is there whole or not."""
    sibling = folder / f"{FILE}.tmp"
    save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, sibling)
    sibling.replace(folder / FILE)


def load_tensors(folder: Path) -> dict[str, torch.Tensor] | None:
    """Tensors that `save_tensors` wrote; None where there is no such file.

    Raises:
        ScoresError: The file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ScoresError(
            f"{file}: cannot be read ({error}); remove it, and scores are summed up anew."
        ) from error
