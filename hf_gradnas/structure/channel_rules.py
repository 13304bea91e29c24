"""What each operation of a forward does to the labels of channels.

Every rule takes the labels of an autograd function's operands and gives those of its results, by
the dimensions and sizes that autograd saved. Knows autograd functions; knows no module types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .channel_labels import (
    ATTRIBUTE,
    NOBODY,
    Labels,
    Made,
    Rows,
    compact,
    core,
    is_nobody,
    kept,
    nobody,
    spread,
    varying,
)

MEETS_NOBODY = (
    "they meet values that no layer makes (an input or a constant), which keep their size"
)
MEETS_OTHERS = "they meet other channels along another dimension"
COMPUTED = "the weight that makes or reads them is computed (a parametrization), no tensor to slice"
UNSIGNED = 2**64

Function = Any  # torch.autograd.graph.Node; its saved values are attributes that no stub knows
Edge = tuple[Function | None, int]
Shape = tuple[int, ...]
Parameter = tuple[str, tuple[int, ...]]


def is_leaf(function: Function) -> bool:
    """Whether an autograd function is a parameter or an input."""
    return str(function.name()).endswith("AccumulateGrad")


def kind_of(function: Function) -> str:
    """Name of an operation: ``Addmm`` of ``AddmmBackward0``."""
    return str(function.name()).rpartition("::")[2].partition("Backward")[0]


def _signed(dim: int) -> int:
    return dim - UNSIGNED if dim >= UNSIGNED // 2 else dim


@dataclass(frozen=True)
class Step:
    """One autograd function, with the labels of its operands and the shapes of its results.

    `names` holds the name of every parameter by ``id``.
    """

    labels: Labels
    names: Mapping[int, str]
    function: Function
    kind: str
    edges: Sequence[Edge]
    operands: Sequence[Tensor | None]
    shapes: Sequence[Shape]

    @property
    def x(self) -> Tensor:
        """Labels of the first operand."""
        first = self.operands[0]
        return nobody(self.shapes[0]) if first is None else first

    def saved(self, name: str) -> Any:
        """A value that the function saved for its backward."""
        return getattr(self.function, f"_saved_{name}")

    def dims(self) -> list[int]:
        """The dimensions that the function works on, none of them negative; all if it has none."""
        saved = getattr(self.function, "_saved_dim", None)  # a full reduction saves none
        if saved is None or saved == ():
            return list(range(self.x.ndim))
        return [_signed(d) % self.x.ndim for d in ([saved] if isinstance(saved, int) else saved)]

    def refuse_all(self) -> None:
        """Refuse the channels of all operands."""
        for labels in self.operands:
            if labels is not None:
                self.labels.refuse(core(labels, varying(labels)), self.why)

    @property
    def why(self) -> str:
        """Reason why channels that enter here cannot be followed."""
        return f"they go into {self.kind}, where no slice can follow them"

    def parameter(self, edge: Edge) -> Parameter | None:
        """Name of a parameter, and its dimensions in the order in which the value has them."""
        function = edge[0]
        if function is None:
            return None
        if is_leaf(function):
            name = self.names.get(id(function.variable))
            return None if name is None else (name, tuple(range(function.variable.ndim)))
        behind = {"T": True, "ToCopy": False}.get(kind_of(function))
        found = None if behind is None else self.parameter(function.next_functions[0])
        return (found[0], found[1][::-1]) if found and behind else found


def unknown(step: Step) -> list[Tensor]:
    """Operations that mix or move values in ways that are not known: the channels are refused."""
    step.refuse_all()
    return [nobody(shape) for shape in step.shapes]


def _reshape(step: Step) -> list[Tensor]:
    return [step.x.reshape(step.shapes[0])]


def _split(step: Step) -> list[Tensor]:
    (dim,) = step.dims()
    return list(step.x.split([shape[dim] for shape in step.shapes], dim))


def _slice(step: Step) -> list[Tensor]:
    (dim,) = step.dims()
    size = step.x.shape[dim]
    start, end = (
        size if value is None else min(size, _signed(value) + size * (_signed(value) < 0))
        for value in (step.saved("start") or 0, step.saved("end"))
    )
    index = [slice(None)] * step.x.ndim
    index[dim] = slice(start, end, step.saved("step"))
    return [step.x[tuple(index)]]


def _transpose(step: Step) -> list[Tensor]:
    return [step.x.transpose(_signed(step.saved("dim0")), _signed(step.saved("dim1")))]


def _permute(step: Step) -> list[Tensor]:
    return [step.x.permute([_signed(d) for d in step.saved("dims")])]


def _select(step: Step) -> list[Tensor]:
    return [step.x.select(step.dims()[0], _signed(step.saved("index")))]


def _repeat(step: Step) -> list[Tensor]:
    return [step.x.repeat(tuple(step.saved("repeats")))]


def _reduce(step: Step) -> list[Tensor]:
    """Sum, mean, norm …: labels that are summed together with others of the tensor go together."""
    x, dims = step.x, step.dims()
    left = [dim for dim in range(x.ndim) if dim not in dims]
    rest = [dim for dim in varying(x) if dim in left]
    if rest == list(varying(x)):
        x = core(x, left)
    elif rest:
        flat = x.movedim(left, list(range(len(left)))).flatten(len(left))
        for number in range(1, flat.shape[-1]):
            step.labels.tie(flat[..., 0], flat[..., number], step.why)
        x = flat[..., 0]
    else:  # over all channels: the result is no channel
        x = nobody([x.shape[dim] for dim in left])
    return [x.reshape(shape) for shape in step.shapes]


def _glu(step: Step) -> list[Tensor]:
    first, second = step.x.chunk(2, step.dims()[0])
    step.labels.tie(first, second, step.why)
    return [first]


def _join(step: Step) -> list[Tensor]:
    """Concatenation and stack; along another dimension than the channels', channels are tied."""
    stacked, shape = step.kind == "Stack", step.shapes[0]
    dim = _signed(step.saved("dim")) % len(shape)
    parts = [None if x is None else x.unsqueeze(dim) if stacked else x for x in step.operands]
    known = [x for x in parts if x is not None]
    if len(known) < len(parts):  # what needs no gradient has no shape in the graph
        left = shape[dim] - sum(x.shape[dim] for x in known)
        if left % (len(parts) - len(known)) or (len(parts) - len(known) > 1 and not stacked):
            return unknown(step)
        size = left // (len(parts) - len(known))
        lost = nobody([size if d == dim else n for d, n in enumerate(shape)])
        parts = [lost if x is None else x for x in parts]
    known = [x for x in parts if x is not None and x.numel()]
    dims = {d for x in known for d in varying(x)}
    if not dims or dim in dims:
        return [torch.cat(known, dim)]
    base = max(known, key=lambda x: len(varying(x)))
    for part in known:
        step.labels.tie(core(base, dims), core(part, dims), step.why)
    return [core(base, dims).reshape(kept(shape, dims)).expand(shape)]


def elementwise(step: Step) -> list[Tensor]:
    """Sums, products, activations; also pooling, padding, resizing outside of the channels."""
    shape, found = step.shapes[0], [x for x in step.operands if x is not None]
    if len(found) == 1 and found[0].ndim == len(shape) and tuple(found[0].shape) != shape:
        dims = varying(found[0])
        if all(found[0].shape[dim] == shape[dim] for dim in dims):
            part = core(found[0], dims).reshape(kept(shape, dims))
            return [part.expand(shape)] * len(step.shapes)
    if any(not _fits(tuple(x.shape), shape) for x in found):
        return unknown(step)
    return [_meet(step, shape)] * len(step.shapes)


def _fits(small: Shape, large: Shape) -> bool:
    """Whether a tensor can be broadcast to a shape."""
    tail = large[len(large) - len(small) :] if len(small) <= len(large) else ()
    return len(tail) == len(small) and all(a in (1, b) for a, b in zip(small, tail, strict=True))


def _meet(step: Step, shape: Shape) -> Tensor:
    """Labels of the result of operands that are broadcast to `shape` and meet there."""
    operands = [
        (edge, x, compact(x.expand(shape)))
        for edge, x in zip(step.edges, step.operands, strict=True)
        if x is not None
    ]
    if not operands:
        return nobody(shape)
    # What layers made comes first, then parameters, which follow it.
    operands.sort(key=lambda o: bool(varying(o[2])) and not is_leaf(o[0][0]), reverse=True)
    base = operands[0][2]
    for edge, x, whole in operands[1:]:
        if varying(base):
            _join_operand(step, base, edge, x, whole)
        elif varying(whole):
            base = _joined_constant(step, base, operands[0][1], whole)
    return base


def _joined_constant(step: Step, base: Tensor, small: Tensor, whole: Tensor) -> Tensor:
    """Labels of a labelled operand that meets one without labels, whose size may be its own."""
    shift = whole.ndim - small.ndim
    dims = varying(whole)
    if is_nobody(base) and any(d >= shift and small.shape[d - shift] > 1 for d in dims):
        step.labels.refuse(core(whole, dims), MEETS_NOBODY)
    return whole


def _join_operand(step: Step, base: Tensor, edge: Edge, x: Tensor, whole: Tensor) -> None:
    """Tie the labels of one more operand, `whole` once broadcast, to those of `base`."""
    labels, shift = step.labels, base.ndim - x.ndim
    dims, present = varying(base), varying(whole)
    parameter = step.parameter(edge) if is_leaf(edge[0]) else None
    real = [dim for dim in dims if dim >= shift and x.shape[dim - shift] > 1]
    if present == dims:
        labels.tie(core(base, dims), core(whole, dims), MEETS_NOBODY)
    elif parameter is not None:
        for dim in () if present else real:
            vector = step.labels.along(base, dim, step.why)
            labels.bind(Rows(parameter[0], dim - shift), vector)
    elif present:
        labels.refuse(core(base, dims), MEETS_OTHERS)
        labels.refuse(core(whole, present), MEETS_OTHERS)
    elif real and is_nobody(whole):
        labels.refuse(core(base, dims), MEETS_NOBODY)


def _batch_norm(step: Step) -> list[Tensor]:
    if step.x.ndim > 1:
        vector = step.labels.along(step.x, 1, step.why)
        groups = step.saved("group") if step.kind == "NativeGroupNorm" else 1
        if 1 < groups < len(vector):
            _tie_groups(step, vector, groups)
        for weight in step.operands[1:3]:
            if weight is not None:
                step.labels.tie(weight.flatten(), vector, MEETS_NOBODY)
    return [step.x]


def _tie_groups(step: Step, vector: Tensor, groups: int) -> None:
    """Tie the channels that stand at the same position of every group."""
    by_group = vector.view(groups, -1)
    for other in by_group[1:]:
        step.labels.tie(by_group[0], other, MEETS_NOBODY)


def _layer_norm(step: Step) -> list[Tensor]:
    return [_meet(step, step.shapes[0])]


def _make(step: Step, size: int, weight: Parameter | None, read: Tensor) -> Tensor:
    """Labels of new channels; nothing can be cut where the weight is no parameter itself."""
    made = step.labels.fresh(size)
    if weight is None:
        for labels in (made, read):
            step.labels.refuse(labels, COMPUTED)
    else:
        step.labels.made.append(Made(weight[0], made))
    return made


def _convolution(step: Step) -> list[Tensor]:
    labels, shape = step.labels, step.shapes[0]
    groups, transposed = int(step.saved("groups")), bool(step.saved("transposed"))
    lin = step.labels.along(step.x, 1, step.why)
    weight = step.parameter(step.edges[1])
    made = _make(step, shape[1], weight, lin)
    if weight is not None:
        row, column = Rows(weight[0], int(transposed)), Rows(weight[0], int(not transposed))
        if groups > 1 and groups == len(lin) and bool((lin != NOBODY).any()):
            labels.tie(lin.repeat_interleave(shape[1] // groups), made, MEETS_NOBODY)
            labels.bind(Rows(weight[0], 0), lin if transposed else made)
            labels.bind(Rows(weight[0].rpartition(".")[0], ATTRIBUTE), lin)
        else:
            if groups > 1:
                _tie_groups(step, lin, groups)
                _tie_groups(step, made, groups)
            # Of the two, the one that a grouped weight holds once for all groups is dimension 1.
            labels.bind(column, lin if transposed else lin[: len(lin) // groups], column=True)
            labels.bind(row, made[: shape[1] // groups] if transposed else made)
    _add_bias(step, step.operands[2], made)
    return [spread(made, 1, shape)]


def _add_bias(step: Step, bias: Tensor | None, made: Tensor) -> None:
    if bias is not None and bias.numel() == len(made) > 1:
        step.labels.tie(bias.flatten(), made, MEETS_NOBODY)


def _product(step: Step) -> list[Tensor]:
    """``x @ weight`` (Mm), ``bias + x @ weight`` (Addmm), ``x @ weight.T + bias`` (Linear)."""
    first = 1 if step.kind == "Addmm" else 0
    (x, w), shape = (first, first + 1), step.shapes[0]
    weight, read = step.parameter(step.edges[w]), step.operands[x]
    if weight is None and step.parameter(step.edges[x]) is not None:
        return unknown(step)
    lin = nobody((1,)) if read is None else step.labels.along(read, -1, step.why)
    made = _make(step, shape[-1], weight, lin)
    if weight is not None:
        order = weight[1][::-1] if step.kind == "Linear" else weight[1]
        step.labels.bind(Rows(weight[0], order[0]), lin, column=True)
        step.labels.bind(Rows(weight[0], order[1]), made)
    if step.kind != "Mm":
        _add_bias(step, step.operands[2 if step.kind == "Linear" else 0], made)
    return [spread(made, -1, shape)]


def _embedding(step: Step) -> list[Tensor]:
    made = step.labels.fresh(step.shapes[0][-1])
    step.labels.refuse(made, "an embedding table makes them")
    return [spread(made, -1, step.shapes[0])]


Rule = Callable[[Step], list[Tensor]]
RULES: dict[str, Rule] = {
    **dict.fromkeys("View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias".split(), _reshape),
    **dict.fromkeys("Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes".split(), _split),
    **dict.fromkeys("Cat Stack".split(), _join),
    **dict.fromkeys("Mm Addmm Linear".split(), _product),
    **dict.fromkeys(
        "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeGroupNorm".split(), _batch_norm
    ),
    **dict.fromkeys(
        "Mean Sum Prod Amax Amin Max Min Var Std VarMean StdMean LinalgVectorNorm Norm "
        "Logsumexp".split(),
        _reduce,
    ),
    "Unbind": lambda step: list(step.x.unbind(step.dims()[0])),
    "Slice": _slice,
    "Select": _select,
    "Transpose": _transpose,
    "Permute": _permute,
    "T": lambda step: [step.x.t()],
    "Expand": lambda step: [step.x.expand(step.shapes[0])],
    "Repeat": _repeat,
    "PixelShuffle": lambda step: [
        torch.pixel_shuffle(step.x.contiguous(), step.saved("upscale_factor"))
    ],
    "PixelUnshuffle": lambda step: [
        torch.pixel_unshuffle(step.x.contiguous(), step.saved("downscale_factor"))
    ],
    "ChannelShuffle": lambda step: [
        torch.channel_shuffle(step.x.contiguous(), step.saved("groups"))
    ],
    "Glu": _glu,
    "NativeLayerNorm": _layer_norm,
    "Convolution": _convolution,
    "Embedding": _embedding,
}
UNKNOWN = tuple(
    "Bmm Baddbmm ScaledDotProduct Cumsum Cumprod Flip Roll Index Gather Sort Topk Scatter Take "
    "CopySlices AsStrided Fft Im2Col Col2Im Unfold Thnn Mkldnn Cudnn Kthvalue Median".split()
)
"""Operations that move values in ways that shapes do not tell."""
