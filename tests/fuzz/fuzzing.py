"""What every fuzzed input must show: the right result or one of our errors, and nothing changed.

An area is a function that draws one `Case` at a time. Its `act` is called once; whatever it raises
that is no `GradNASError` is a fault, and so is nonsense that passes without a word.
"""

from __future__ import annotations

import csv
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hf_gradnas
from hf_gradnas.errors import GradNASError

PACKAGE = Path(hf_gradnas.__file__).parent
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        what: The input in words, for the list of faults.
        act: Uses it.
        is_nonsense: Whether passing is a fault: it can mean nothing.
        model: Model that must be as before, whatever happens.
        folder: Folder whose files must be as before.
    """

    what: str
    act: Callable[[], Any]
    is_nonsense: bool = False
    model: torch.nn.Module | None = None
    folder: Path | None = None


Area = Callable[[random.Random], Case]


@dataclass
class Outcome:
    """How many inputs of an area passed, were refused, and what was wrong with the others."""

    passed: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)


def run(area: Area, *, seed: int, count: int) -> Outcome:
    """Draw and use `count` inputs; input ``i`` depends on `seed` and ``i`` only."""
    outcome = Outcome()
    for index in range(count):
        case = area(random.Random(f"{seed}:{area.__name__}:{index}"))
        before = _state(case)
        fault = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.act()
        except GradNASError as error:
            outcome.refused += 1
            fault = _unclear(str(error))
        except Exception as error:  # the very thing that is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            fault = f"{type(error).__name__} at {place}: {str(error)[:160]}"
        else:
            outcome.passed += 1
            fault = "taken without a word" if case.is_nonsense else ""
        changed = [name for name, value in _state(case).items() if value != before[name]]
        if changed:
            fault = f"{fault}; changed: {', '.join(changed)}".removeprefix("; ")
        if fault:
            outcome.faults.append(f"{area.__name__} {seed}:{index} {case.what[:200]}\n    {fault}")
    return outcome


def check(area: Area, *, seed: int, count: int) -> None:
    """Fail with the list of all faults that `run` finds."""
    outcome = run(area, seed=seed, count=count)
    assert not outcome.faults, f"{len(outcome.faults)} of {count}:\n" + "\n".join(outcome.faults)


def _unclear(message: str) -> str:
    if len(message) < 20:
        return f"a message that says nothing: {message!r}"
    return ""


def _state(case: Case) -> dict[str, Any]:
    """Everything that an input must not change."""
    state: dict[str, Any] = {
        "gradients on": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "random numbers of numpy": np.random.get_state()[2],
        "random numbers of Python": hash(random.getstate()),
        "csv.field_size_limit": csv.field_size_limit(),
    }
    if case.folder is not None:
        files = sorted(p for p in case.folder.rglob("*") if p.is_file())
        state["files"] = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if case.model is not None:
        state |= _of_model(case.model)
        state["random numbers of torch"] = torch.random.get_rng_state().tolist()
    return state


def _of_model(model: torch.nn.Module) -> dict[str, Any]:
    modules = list(model.named_modules())
    parameters = list(model.named_parameters())
    return {
        "training flags": [name for name, module in modules if module.training],
        "hooks": [(n, len(getattr(m, kind))) for n, m in modules for kind in HOOKS],
        "requires_grad": [name for name, p in parameters if p.requires_grad],
        "gradients": [name for name, p in parameters if p.grad is not None],
        "weights": [(name, p.shape, p.dtype, _sum(p)) for name, p in parameters],
        "config": str(model.config.to_dict()),
        "attributes": sorted(vars(model)),
    }


def _sum(parameter: torch.Tensor) -> str:
    if parameter.is_meta:
        return "meta"
    return str(parameter.detach().double().sum().item())


# --- drawing --------------------------------------------------------------------------------------

ODD_NUMBERS: tuple[Any, ...] = (
    None, True, False, -1, 0.5, 1.7, "", "1", "x", [], [1], {}, {"a": 1}, float("nan"),
    float("inf"), float("-inf"), 10**30, -(2**63), 1e300, "١", "1_0", b"1",
)  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes with a piece cut, changed, doubled or put in, and what was done."""
    at = draw.randrange(len(content) + 1)
    kind = draw.choice(("cut", "flip", "insert", "double", "empty", "drop", "swap"))
    if kind == "cut":
        return content[:at], f"cut at {at}"
    if kind == "flip" and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :], (
            f"a bit flipped at {at}"
        )
    if kind == "insert":
        piece = draw.choice(
            (
                b"\x00",
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"\x1b[31m",
                b'"',
                b"{",
                b"NaN",
                b"\xed\xa0\x80",
                "é".encode("latin-1"),
                b"9" * 30,
                b"[" * 20_000,
            )
        )
        return content[:at] + piece + content[at:], f"{piece[:12]!r} put in at {at}"
    if kind == "double":
        return content + content, "twice"
    if kind == "drop":
        end = min(len(content), at + draw.randrange(1, 40))
        return content[:at] + content[end:], f"{at} to {end} dropped"
    if kind == "swap":
        return content[at:] + content[:at], f"turned at {at}"
    return b"", "empty"


def spoilt(document: Any, draw: random.Random) -> tuple[Any, str]:
    """A JSON document with one value replaced by another, removed or renamed, and what was done."""
    places = list(_places(document, ()))
    path = draw.choice(places)
    copy = _copied(document)
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    shown = ".".join(map(str, path))[:80]
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename"))
    if kind == "remove":
        del parent[last]
        return copy, f"{shown} removed"
    if kind == "rename" and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
        return copy, f"{shown} renamed"
    value = draw.choice(ODD_NUMBERS[:-1])
    parent[last] = value
    return copy, f"{shown} = {value!r}"


def _places(document: Any, path: tuple[Any, ...]) -> Any:
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = list(enumerate(document))[:4]
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _copied(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _copied(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_copied(value) for value in document]
    return document
