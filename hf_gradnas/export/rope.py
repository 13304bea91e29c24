"""Rotary positions as llama.cpp takes them: a base, and a scaling or factors of frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import CheckpointError
from ..shards.parts import Part, Stored
from .layout import NEIGHBOURS, Layout

KNOWN = ("default", "linear", "yarn", "llama3", "dynamic")
YARN = {
    "attention_factor": None, "mscale": None, "mscale_all_dim": None,
    "truncate": True, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
"""What must be as it is by default, since llama.cpp has it built in."""
Scaling = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Rope:
    """Positions of a model.

    Attributes:
        base: Of the frequencies.
        context: So many positions are computed as in Transformers.
        scaling: ``rope.scaling.*`` by the ends of their names.
        tensors: Factors of frequencies, for llama3.
        notes: What differs from Transformers, in sentences.
    """

    base: float
    context: int
    scaling: Scaling = field(default_factory=dict)
    tensors: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_rope(layout: Layout, where: str) -> Rope:
    """How positions are rotated.

    Raises:
        CheckpointError: llama.cpp has no such scaling for the architecture.
    """
    config = layout.config
    context = int(config["max_position_embeddings"])
    settings = dict(config.get("rope_parameters") or {})
    kind = str(settings.get("rope_type", "default"))
    base = float(settings.get("rope_theta", 10000.0))
    is_odd = kind not in KNOWN or settings.get("partial_rotary_factor", 1.0) != 1.0
    if kind == "llama3":
        is_odd |= layout.name not in NEIGHBOURS
    if kind == "yarn":
        is_odd |= any(settings.get(name) not in (None, value) for name, value in YARN.items())
    if is_odd:
        raise CheckpointError(
            f"{where}: config.json has rope_parameters={settings!r:.200}, which llama.cpp's "
            f"{layout.name} does not compute; the model cannot be exported to GGUF."
        )
    notes, window = [], _window(config)
    if kind == "dynamic":
        notes.append(f"llama.cpp has no dynamic scaling of positions: use up to {context} tokens.")
    if window is not None and window < context:
        context = window
        notes.append(
            f"llama.cpp knows no window of attention here: use up to {window} tokens, for which "
            "it makes no difference."
        )
    positions = int(config["max_position_embeddings"])
    scaling, tensors = _scaling(kind, settings, positions), {}
    if kind == "llama3":
        tensors["rope_freqs.weight"] = _factors(layout, settings, base)
    return Rope(base, context, scaling, tensors, tuple(notes))


def _window(config: Mapping[str, Any]) -> int | None:
    """Positions that are seen back, where any layer has such a window."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    is_used = not kinds or "sliding_attention" in kinds
    return int(window) if window and is_used else None


def _scaling(kind: str, settings: Mapping[str, Any], context: int) -> Scaling:
    if kind == "linear":
        return {"type": "linear", "factor": float(settings["factor"])}
    if kind != "yarn":
        return {}
    original = int(settings.get("original_max_position_embeddings") or context)
    return {
        "type": "yarn", "factor": float(settings["factor"]), "original_context_length": original
    }  # fmt: skip


def _factors(layout: Layout, settings: Mapping[str, Any], base: float) -> Part:
    """Frequencies without scaling in units of those with it: llama.cpp divides by them."""
    width = layout.head_dim
    plain = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        max_position_embeddings=int(layout.config["max_position_embeddings"]),
        rope_parameters=dict(settings),
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](plain)
    unscaled = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    found = unscaled / scaled
    return Stored(lambda: found, tuple(found.shape), torch.float32)
