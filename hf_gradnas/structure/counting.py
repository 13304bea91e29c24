"""Measure what the closed forms of costs need: one forward of the whole model.

Knows how to run a model and read its trace; the formulas stand in `costs.closed_form`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._compat import attention_implementation
from ..costs.closed_form import flops_cost, params_cost
from ..types import Axis, CostModel, Kind, Structure
from .discovery import evaluating, is_token_aligned
from .trace import Matmul, Trace, rows_of, trace_forward

ATTENTION_DIMS = 4


def count_costs(
    model: nn.Module, structure: Structure, inputs: Mapping[str, Any], *, layout: str
) -> dict[str, CostModel]:
    """Closed forms of parameters and FLOPs.

    Args:
        model: The model that holds the axes of `structure`.
        structure: Its proved axes.
        inputs: Batch 1 at the length that FLOPs are counted for (see `flops_inputs`).
        layout: ``"stock"`` or ``"per_layer"``; see `params_cost`.

    Returns:
        ``{"flops": …, "params": …}``; FLOPs are 2 x MACs of all matmuls and convolutions of one
        forward under eager attention, as `FlopCounterMode` counts them; look-ups are 0.
    """
    axes = structure.axes
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total_flops, trace = count_flops(model, inputs)
    rows: dict[str, int] = defaultdict(int)
    for event in trace.events:
        if isinstance(event, Matmul) and event.parameter is not None:
            rows[event.parameter] += rows_of(event, model.get_parameter(event.parameter))
    return {
        "flops": flops_cost(
            axes,
            shapes,
            rows=rows,
            macs_per_head={a.name: _macs_per_head(a, trace) for a in axes if a.kind is Kind.HEADS},
            total_flops=total_flops,
        ),
        "params": params_cost(axes, shapes, layout=layout),
    }


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, Trace]:
    """FLOPs of one forward under eager attention, and its trace."""
    with evaluating(model), attention_implementation(model, "eager"):
        counter = FlopCounterMode(display=False)
        with counter:
            trace = trace_forward(model, inputs)
    return float(counter.get_total_flops()), trace


def _macs_per_head(axis: Axis, trace: Trace) -> float:
    """MACs of queries x keys and of weights x values, per head, summed over calls."""
    assert axis.removal is not None
    macs = sum(
        event.macs
        for event in trace.events
        if isinstance(event, Matmul)
        and event.parameter is None
        and event.module == axis.removal.module
        and len(event.out_shape) == ATTENTION_DIMS
        and event.out_shape[1] == axis.size
    )
    return macs / axis.size


def flops_inputs(
    inputs: Mapping[str, Any], length: int | None, *, decoder: bool = False
) -> dict[str, Any]:
    """One example of `length` tokens without padding, made from a batch.

    Token sequences (the axis that ``input_ids`` and tensors of its length share, and decoder
    tokens) are repeated or cut to `length`; images and audio keep their size. Labels are dropped,
    so that no loss is counted.

    Args:
        inputs: A batch, as a dataloader yields it.
        length: Tokens; None keeps the batch's own length.
        decoder: The model is an encoder-decoder, so labels become ``decoder_input_ids``.
    """
    one: dict[str, Any] = {}
    tokens = inputs.get("input_ids")
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            one[name] = value
            continue
        row = value[:1]
        text = is_token_aligned(value, tokens)
        if "mask" in name and text:
            row = torch.ones_like(row)
        one[name] = _repeat(row, length) if text or name.startswith("decoder_") else row
    labels = one.pop("labels", None)
    if decoder and labels is not None and "decoder_input_ids" not in one:
        one["decoder_input_ids"] = _repeat(labels.clamp(min=0), length)
    return one


def _repeat(row: torch.Tensor, length: int | None) -> torch.Tensor:
    if length is None:
        return row
    times = -(-length // row.shape[1])
    repeats = [1, times, *[1] * (row.ndim - 2)]
    return row.repeat(repeats)[:, :length]
