"""What each operation of a forward does to the labels of entries.

Every rule takes the labels of an autograd function's operands and gives those of its results, by
the dimensions and sizes that autograd saved. What has no rule is measured. Knows autograd
functions; knows no module types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .labels import Choice, Meeting, core, is_nobody, kept, nobody, strided, varying
from .products import batched, convolution, fused_attention, lookup, product, stacked, tie_groups
from .steps import MEETS_NOBODY, Shape, Step, fits, signed, unknown

HEADED = 3
"""Dimensions of weights of heads: (heads, queries, keys)."""
MEETS_OTHERS = "they meet other channels along another dimension"


def _reshape(step: Step) -> list[Tensor]:
    return [step.x.reshape(step.shapes[0])]


def _split(step: Step) -> list[Tensor]:
    (dim,) = step.dims()
    return list(step.x.split([shape[dim] for shape in step.shapes], dim))


def _slice(step: Step) -> list[Tensor]:
    (dim,) = step.dims()
    size = step.x.shape[dim]
    start, end = (
        size if value is None else min(size, signed(value) + size * (signed(value) < 0))
        for value in (step.saved("start") or 0, step.saved("end"))
    )
    index = [slice(None)] * step.x.ndim
    index[dim] = slice(start, end, step.saved("step"))
    return [step.x[tuple(index)]]


def _transpose(step: Step) -> list[Tensor]:
    return [step.x.transpose(signed(step.saved("dim0")), signed(step.saved("dim1")))]


def _permute(step: Step) -> list[Tensor]:
    return [step.x.permute([signed(d) for d in step.saved("dims")])]


def _select(step: Step) -> list[Tensor]:
    return [step.x.select(step.dims()[0], signed(step.saved("index")))]


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
        step.labels.merge(flat.reshape(-1, flat.shape[-1]), step.why)
        x = flat[..., 0]
    else:  # over all channels: the result is no channel
        if step.kind == "Sum" and varying(x) == tuple(dims) and step.picks(dims[0]):
            step.labels.choices.append(Choice(core(x, dims), 1, step.time, is_one_of_several=True))
        x = nobody([x.shape[dim] for dim in left])
    return [x.reshape(shape) for shape in step.shapes]


def _glu(step: Step) -> list[Tensor]:
    first, second = step.x.chunk(2, step.dims()[0])
    step.labels.tie(first, second, step.why)
    return [first]


def _join(step: Step) -> list[Tensor]:
    """Concatenation and stack; along another dimension than the channels', channels are tied."""
    stacked, shape = step.kind == "Stack", step.shapes[0]
    dim = signed(step.saved("dim")) % len(shape)
    parts = [None if x is None else x.unsqueeze(dim) if stacked else x for x in step.operands]
    known = [x for x in parts if x is not None]
    if len(known) < len(parts):  # what needs no gradient has no shape in the graph
        left = shape[dim] - sum(x.shape[dim] for x in known)
        if left % (len(parts) - len(known)) or (len(parts) - len(known) > 1 and not stacked):
            return unknown(step)
        size = left // (len(parts) - len(known))
        lost = nobody([size if d == dim else n for d, n in enumerate(shape)])
        parts = [lost if x is None else x for x in parts]
    _tie_tables(step, parts, dim)
    known = [step.labels.settled(x) for x in parts if x is not None and x.numel()]
    dims = {d for x in known for d in varying(x)}
    if not dims or dim in dims:
        return [torch.cat(known, dim)]
    base = max(known, key=lambda x: len(varying(x)))
    layers = [x for x, given in zip(parts, step.operands, strict=True) if given is not None]
    for part in [step.labels.settled(x) for x in layers if x is not None and x.numel()]:
        step.labels.tie(core(base, dims), core(part, dims), step.why)
    return [core(base, dims).reshape(kept(shape, dims)).expand(shape)]


def _tie_tables(step: Step, parts: Sequence[Tensor | None], dim: int) -> None:
    """Tie learned entries of a sequence (queries, tokens) to the channels of others in it."""
    given = [(plain, x) for plain, x in zip(step.plain, parts, strict=True) if x is not None]
    streams = [x for plain, x in given if not plain and x.numel() and varying(x)]
    dims = {d for x in streams for d in varying(x)}
    if not streams or dim in dims:
        return
    base = max(streams, key=lambda x: len(varying(x)))
    for table in [x for plain, x in given if plain and dim in varying(x)]:
        shape = [table.shape[d] if d == dim else size for d, size in enumerate(base.shape)]
        along = {dim, *varying(table), *varying(base)}
        whole = core(base, dims).reshape(kept(shape, dims)).expand(shape)
        step.labels.tie(core(whole, along), core(table, along), step.why)


def elementwise(step: Step) -> list[Tensor]:
    """Sums, products, activations; also pooling, padding, resizing outside of the channels."""
    shape, found = step.shapes[0], [x for x in step.operands if x is not None]
    if len(found) == 1 and found[0].ndim == len(shape) and tuple(found[0].shape) != shape:
        dims = varying(found[0])
        if all(found[0].shape[dim] == shape[dim] for dim in dims):
            part = core(found[0], dims).reshape(kept(shape, dims))
            return [part.expand(shape)] * len(step.shapes)
    if any(not fits(tuple(x.shape), shape) for x in found):
        return unknown(step)
    return [_meet(step, shape)] * len(step.shapes)


def _meet(step: Step, shape: Shape) -> Tensor:
    """Labels of the result of operands that are broadcast to `shape` and meet there."""
    operands = [
        (plain, x, x.expand(shape))
        for plain, x in zip(step.plain, step.operands, strict=True)
        if x is not None
    ]
    if not operands:
        return nobody(shape)
    # What layers made comes first, then parameters, which follow it.
    operands.sort(key=lambda o: bool(varying(o[2])) and not o[0], reverse=True)
    (_, small, base), *others = operands
    for plain, x, whole in others:
        present = set(varying(whole))
        if varying(base) and set(varying(base)) < present and not plain:
            _join_operand(step, whole, small, base, plain=False)
            small, base = x, whole
        elif varying(base):
            _join_operand(step, base, x, whole, plain=plain)
        elif present:
            if is_nobody(base):
                step.labels.fix(whole, _real(small, whole), MEETS_NOBODY)
            base = whole
    return base


def _real(small: Tensor, whole: Tensor) -> list[int]:
    """Dimensions of the broadcast tensor `whole` in which `small` has entries of its own."""
    shift = whole.ndim - small.ndim
    return [dim for dim in range(shift, whole.ndim) if small.shape[dim - shift] > 1]


def _join_operand(step: Step, base: Tensor, x: Tensor, whole: Tensor, *, plain: bool) -> None:
    """Tie the labels of one more operand, `whole` once broadcast, to those of `base`.

    Args:
        step: The operation.
        base: Labels of the operands before, which differ along some dimensions.
        x: Labels of the operand.
        whole: The same, broadcast.
        plain: The operand is computed from parameters alone.
    """
    labels, dims, present = step.labels, set(varying(base)), set(varying(whole))
    held = [dim for dim in sorted(dims) if dim in _real(x, whole)]
    if present and present < dims and dims == set(held):  # whose entries go together already
        labels.tie(core(base, dims), core(whole, dims), MEETS_NOBODY)
    elif present and present < dims:  # which entries are of one unit is known when all is tied
        labels.later.append((core(base, dims), core(whole, dims)))
    elif present and dims <= present:
        labels.tie(core(base, present), core(whole, present), MEETS_NOBODY)
    elif present and plain:
        if dims & present:
            labels.later.append((core(base, dims | present), core(whole, dims | present)))
    elif present:  # an outer product: the result has the entries of one of them
        labels.refuse(core(whole, present), MEETS_OTHERS)
    elif is_nobody(whole):
        if not plain:
            labels.fix(base, held, MEETS_NOBODY)
    elif held:  # all its entries go together already
        labels.tie(core(base, held), core(whole, held), MEETS_NOBODY)


def _batch_norm(step: Step) -> list[Tensor]:
    if step.x.ndim > 1:
        vector = step.labels.along(step.x, 1, step.why)
        groups = step.saved("group") if step.kind == "NativeGroupNorm" else 1
        if 1 < groups < len(vector):
            tie_groups(step, vector, groups)
        for weight in step.operands[1:3]:
            if weight is not None:
                step.labels.tie(weight.flatten(), vector, MEETS_NOBODY)
    return [step.x]


def _layer_norm(step: Step) -> list[Tensor]:
    """A norm inside of units ties their entries; one across units is left to the proof."""
    x, weights = step.x, [w for w in step.operands[1:] if w is not None]
    length = len(step.saved("normalized_shape"))
    dims = varying(x)
    if any(dim < x.ndim - length for dim in dims):
        step.labels.fix(x, range(x.ndim - length, x.ndim), step.why)
        return [x] * len(step.shapes)
    for weight in (w.expand(x.shape) for w in weights if dims):
        union = {*dims, *varying(weight)}
        step.labels.tie(core(x, union), core(weight, union), MEETS_NOBODY)
    return [x] * len(step.shapes)


def _softmax(step: Step) -> list[Tensor]:
    x = step.x
    step.labels.fix(x, step.dims(), step.why)
    if x.ndim >= HEADED and not is_nobody(x):
        step.labels.softmaxes.append(Meeting(strided(x).flatten(), step.time))
    return [x]


def _windows(step: Step) -> list[Tensor]:
    """Windows of images ``(n, channels, …)`` as columns ``(n, channels · window, windows)``."""
    x, shape = step.x, step.shapes[0]
    if len(shape) != 3:  # noqa: PLR2004 - an image without a batch
        return unknown(step)
    step.labels.fix(x, range(2, x.ndim), step.why)
    x = step.labels.settled(x)[..., 0, 0].repeat_interleave(shape[1] // x.shape[1], 1)
    return [x.unsqueeze(-1).expand(shape)]


def _sample(step: Step) -> list[Tensor]:
    """Values at places: images ``(n, channels, …)``, places ``(n, …, coordinates)``.

    Where both are of heads, folded into the batch, a head has its own places.
    """
    labels, places = step.labels, step.operands[1]
    labels.fix(step.x, range(2, step.x.ndim), step.why)
    if places is not None:
        labels.fix(places, range(1, places.ndim), step.why)
        if 0 in varying(places) and 0 in varying(step.x):
            parts = (core(x, {0, *varying(x)}).reshape(len(x), -1) for x in (step.x, places))
            labels.merge(torch.cat(list(parts), 1), step.why)
        else:
            labels.refuse(core(places, varying(places)), step.why)
    x, shape = labels.settled(step.x), step.shapes[0]
    dims = varying(x)
    return [core(x, dims).reshape(kept(shape, dims)).expand(shape)]


def _choose(step: Step) -> list[Tensor]:
    """The largest entries along a dimension, or those of given indices: a router's choice."""
    dims, x, shape = step.dims(), step.x, step.shapes[0]
    if len(dims) != 1 or varying(x) != tuple(dims):
        return _reduce(step) if step.kind == "Max" else unknown(step)
    chosen = shape[dims[0]] if len(shape) == x.ndim else 1
    step.labels.choices.append(Choice(core(x, dims), chosen, step.time))
    return [nobody(shape) for shape in step.shapes]


Rule = Callable[[Step], list[Tensor]]
RULES: dict[str, Rule] = {
    **dict.fromkeys("View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias".split(), _reshape),
    **dict.fromkeys("Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes".split(), _split),
    **dict.fromkeys("Cat Stack".split(), _join),
    **dict.fromkeys("Mm Addmm Linear".split(), product),
    **dict.fromkeys(
        "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeGroupNorm".split(), _batch_norm
    ),
    **dict.fromkeys(
        "Mean Sum Prod Amax Amin Min Var Std VarMean StdMean LinalgVectorNorm Norm "
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
    "Im2Col": _windows,
    **dict.fromkeys("GridSampler2D GridSampler3D".split(), _sample),
    **dict.fromkeys("Topk Gather Max".split(), _choose),
    "GroupedMm": stacked,
    "NativeLayerNorm": _layer_norm,
    "Convolution": convolution,
    **dict.fromkeys("Embedding Index IndexSelect".split(), lookup),
    **dict.fromkeys("Softmax SafeSoftmax LogSoftmax".split(), _softmax),
    **dict.fromkeys("Bmm Baddbmm".split(), batched),
    **dict.fromkeys(
        (
            "ScaledDotProductFlashAttentionForCpu",
            "ScaledDotProductFlashAttention",
            "ScaledDotProductEfficientAttention",
            "ScaledDotProductFusedAttentionOverrideable",
        ),
        fused_attention,
    ),
}
MAKING = frozenset([product, convolution, lookup])
"""Rules whose results are made anew by a weight."""
UNKNOWN = tuple(
    "ScaledDotProduct Cumsum Cumprod Flip Roll Index Sort Scatter Take "
    "CopySlices AsStrided Fft Im2Col Col2Im Unfold Thnn Mkldnn Cudnn Kthvalue Median".split()
)
"""Operations that move values in ways that shapes do not tell."""


def _foreign(step: Step) -> list[Tensor]:
    """A function with a backward of its own: measured; of a product, it may be a softmax."""
    found = unknown(step)
    if any(step.products) and found[0].ndim >= HEADED:
        step.labels.softmaxes.append(Meeting(strided(found[0]).flatten(), step.time))
    return found


def rule_of(step: Step) -> Rule:
    """The rule of an operation."""
    if isinstance(step.function, BackwardCFunction):
        return _foreign
    if step.kind in ("Mm", "Addmm") and step.parameter(step.edges[-1]) is None:
        return batched
    return RULES.get(step.kind, unknown if step.kind.startswith(UNKNOWN) else elementwise)


def is_product(step: Step, rule: Rule) -> bool:
    """Whether the results are computed from a product of two values, and by no weight since.

    What a softmax makes of the values of a layer is weights as well: it takes all values of a head.
    """
    weighs = rule is _softmax and len(step.shapes[0]) >= HEADED
    made = rule in (batched, fused_attention) or weighs
    return made or (any(step.products) and rule not in MAKING)
