"""Records written by hand, so that resizing and loading are tested without discovery and surgery.

Every family loses one whole attention, the first one where there is a cache, some heads in other
layers, and some or all FFN neurons. `masked` is the same model with those units multiplied by zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from torch import nn
from transformers import PreTrainedModel

HEAD = 16
FFN = range(40)


@dataclass
class Cut:
    """A cut of one model: what `resize` takes, and how the masked model differs."""

    model: PreTrainedModel
    record: dict[str, Any]
    rows: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    new_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    zeros: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def keep(self, tensor: str, dim: int, kept: Iterable[int]) -> None:
        path, _, name = tensor.rpartition(".")
        shape = list(self.model.get_parameter(tensor).shape)
        self.rows[tensor] = {dim: list(kept)}
        shape[dim] = len(self.rows[tensor][dim])
        self.record["modules"].setdefault(path, {})[name] = shape

    def linear(self, path: str, kept: Iterable[int], *, inputs: bool) -> None:
        """Narrow a Linear or Conv1D; of an out-projection (`inputs`), note what is masked."""
        module, rows = self.model.get_submodule(path), list(kept)
        dim = int(inputs) if isinstance(module, nn.Linear) else 1 - int(inputs)
        self.keep(f"{path}.weight", dim, rows)
        if inputs:
            width = module.weight.shape[dim]
            self.zeros[f"{path}.weight"] = (dim, [i for i in range(width) if i not in rows])
        elif module.bias is not None:
            self.keep(f"{path}.bias", 0, rows)

    def set(self, path: str, **attributes: Any) -> None:
        self.record["modules"].setdefault(path, {}).update(attributes)

    def remove(self, path: str, projection: str | None, outer: str = "", **spec: Any) -> None:
        out = self.model.get_submodule(outer or f"{path}.{projection}")
        dim = 1 if isinstance(out, nn.Linear) else 0
        name = f"{outer or f'{path}.{projection}'}.weight"
        self.zeros[name] = (dim, list(range(out.weight.shape[dim])))
        if projection is None:
            self.keep(name, dim, [])
        self.record["removed"][path] = {
            "projection": projection,
            "features": 0 if projection is None else out.weight.shape[1 - dim],
            "returns": spec.get("returns", ["output", None]),
            "cross": spec.get("cross", False),
        }

    def masked(self) -> PreTrainedModel:
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, (dim, rows) in self.zeros.items():
                model.get_parameter(name).index_fill_(dim, torch.tensor(rows).long(), 0.0)
        return model


def heads(*kept: int) -> list[int]:
    return [head * HEAD + i for head in kept for i in range(HEAD)]


def fused(*sections: Iterable[int], width: int) -> list[int]:
    return [i * width + row for i, rows in enumerate(sections) for row in rows]


def build(name: str, **overrides: Any) -> tuple[Cut, dict[str, torch.Tensor]]:
    """The uncut model of a family with its hand-made cut, and a batch."""
    model, inputs = zoo.build(name, **overrides)
    if name == "gemma2":  # the stock model gives NaN where a window holds padding only
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    record = {
        "format_version": 1,
        "architecture": type(model).__name__,
        "modules": {},
        "removed": {},
        "own_position_bias": {},
    }
    cut = Cut(copy.deepcopy(model), record)
    CUTS[name](cut)
    return cut, inputs


def _bert(cut: Cut) -> None:
    layer = "bert.encoder.layer"
    for name in ("query", "key", "value"):
        cut.linear(f"{layer}.0.attention.self.{name}", heads(1, 3), inputs=False)
    cut.linear(f"{layer}.0.attention.output.dense", heads(1, 3), inputs=True)
    cut.set(f"{layer}.0.attention.self", num_attention_heads=2, all_head_size=2 * HEAD)
    cut.remove(f"{layer}.1.attention.self", None, f"{layer}.1.attention.output.dense")
    cut.linear(f"{layer}.1.intermediate.dense", FFN, inputs=False)
    cut.linear(f"{layer}.1.output.dense", FFN, inputs=True)
    cut.linear(f"{layer}.2.intermediate.dense", [], inputs=False)
    cut.linear(f"{layer}.2.output.dense", [], inputs=True)


def _llama(cut: Cut) -> None:
    layer = "model.layers"
    cut.remove(f"{layer}.0.self_attn", "o_proj")
    cut.linear(f"{layer}.1.self_attn.q_proj", heads(2, 3), inputs=False)
    for name in ("k_proj", "v_proj"):
        cut.linear(f"{layer}.1.self_attn.{name}", heads(1), inputs=False)
    cut.linear(f"{layer}.1.self_attn.o_proj", heads(2, 3), inputs=True)
    cut.linear(f"{layer}.2.self_attn.q_proj", heads(0, 3), inputs=False)
    cut.linear(f"{layer}.2.self_attn.o_proj", heads(0, 3), inputs=True)
    cut.set(f"{layer}.2.self_attn", num_key_value_groups=1)
    for index, kept in ((0, FFN), (2, [])):
        for name in ("gate_proj", "up_proj"):
            cut.linear(f"{layer}.{index}.mlp.{name}", kept, inputs=False)
        cut.linear(f"{layer}.{index}.mlp.down_proj", kept, inputs=True)


def _gpt2(cut: Cut) -> None:
    layer = "transformer.h"
    cut.remove(f"{layer}.0.attn", "c_proj")
    kept = heads(0, 2)
    cut.linear(f"{layer}.1.attn.c_attn", fused(kept, kept, kept, width=64), inputs=False)
    cut.linear(f"{layer}.1.attn.c_proj", kept, inputs=True)
    cut.set(f"{layer}.1.attn", num_heads=2, split_size=2 * HEAD, embed_dim=2 * HEAD)
    cut.linear(f"{layer}.1.mlp.c_fc", FFN, inputs=False)
    cut.linear(f"{layer}.1.mlp.c_proj", FFN, inputs=True)
    cut.linear(f"{layer}.2.mlp.c_fc", [], inputs=False)
    cut.linear(f"{layer}.2.mlp.c_proj", [], inputs=True)


def _phi3(cut: Cut) -> None:
    layer = "model.layers"
    cut.remove(f"{layer}.0.self_attn", "o_proj")
    for index, q, kv in ((1, (2, 3), (1,)), (2, (0, 3), (0, 1))):
        attention = f"{layer}.{index}.self_attn"
        cut.linear(f"{attention}.qkv_proj", _phi3_rows(q, kv), inputs=False)
        cut.linear(f"{attention}.o_proj", heads(*q), inputs=True)
        cut.set(
            attention,
            num_key_value_groups=len(q) // len(kv),
            num_key_value_heads=len(kv),
            config={"num_attention_heads": len(q)},
        )
    cut.linear(f"{layer}.0.mlp.gate_up_proj", fused(FFN, FFN, width=96), inputs=False)
    cut.linear(f"{layer}.0.mlp.down_proj", FFN, inputs=True)


def _phi3_rows(q: Iterable[int], kv: Iterable[int]) -> list[int]:
    """Rows of ``[q of 4 heads | k of 2 | v of 2]``."""
    keys = [4 * HEAD + row for row in heads(*kv)]
    return [*heads(*q), *keys, *(2 * HEAD + row for row in keys)]


def _t5(cut: Cut) -> None:
    table = "relative_attention_bias"
    kept = {
        "encoder.block.0.layer.0.SelfAttention": (0, 2, 3),
        "encoder.block.1.layer.0.SelfAttention": (1,),
        "encoder.block.2.layer.0.SelfAttention": (0, 1, 2, 3),
        "decoder.block.1.layer.0.SelfAttention": (0, 3),
        "decoder.block.2.layer.0.SelfAttention": (1, 2, 3),
        "decoder.block.0.layer.1.EncDecAttention": (2, 3),
        "decoder.block.1.layer.1.EncDecAttention": (0, 1, 2),
    }
    for attention, which in kept.items():
        if len(which) < 4:
            for name in "qkv":
                cut.linear(f"{attention}.{name}", heads(*which), inputs=False)
            cut.linear(f"{attention}.o", heads(*which), inputs=True)
            cut.set(attention, n_heads=len(which), inner_dim=len(which) * HEAD)
        if "EncDec" in attention:
            cut.record["own_position_bias"][attention] = []
            continue
        donor = attention.split(".")[0] + f".block.0.layer.0.SelfAttention.{table}.weight"
        cut.record["own_position_bias"][attention] = [8, len(which)]
        if ".block.0." in attention:
            cut.keep(f"{attention}.{table}.weight", 1, which)
        else:
            values = cut.model.get_parameter(donor).detach()[:, list(which)]
            cut.new_tensors[f"{attention}.{table}.weight"] = values
    returns = ["output", None, None]
    cut.remove("decoder.block.0.layer.0.SelfAttention", "o", returns=returns)
    cut.remove("decoder.block.2.layer.1.EncDecAttention", "o", returns=returns, cross=True)
    cut.linear("encoder.block.0.layer.1.DenseReluDense.wi", FFN, inputs=False)
    cut.linear("encoder.block.0.layer.1.DenseReluDense.wo", FFN, inputs=True)


def _gemma2(cut: Cut) -> None:
    for index in (0, 1):  # the first layer with a sliding window and the first without
        cut.remove(f"model.layers.{index}.self_attn", "o_proj")


CUTS = {
    "bert": _bert,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "llama": _llama,
    "phi3": _phi3,
    "t5": _t5,
}
