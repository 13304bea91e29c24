"""Labels of products: with weights, which make new entries, and of two values.

Entries that meet in the same products go together: so the queries, keys and values of a head become
one unit, and heads that share keys and values stand in a group. See `labels.Labels.meet`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import (
    ATTRIBUTE,
    NOBODY,
    Made,
    Meeting,
    Rows,
    core,
    is_nobody,
    kept,
    nobody,
    spread,
    strided,
    varying,
)
from .steps import MEETS_NOBODY, Parameter, Shape, Step, fits, unknown

COMPUTED = "the weight that makes or reads them is computed (a parametrization), no tensor to slice"
STACKED = "one tensor holds several matrices, such as those of all experts, which is not cut"
OF_GROUPS = (
    "a weight reads them in groups, of which each has all of one or a part of it, and whose number "
    "is fixed"
)
EMBEDDED = "an embedding table makes them"


def _make(step: Step, size: int, weight: Parameter | None, read: Tensor) -> Tensor:
    """Labels of new channels; nothing can be cut where the weight is no parameter itself."""
    made = step.labels.fresh(size)
    if weight is None:
        for labels in (made, read):
            step.labels.refuse(labels, COMPUTED)
    else:
        step.labels.made.append(Made(weight[0], made, step.time))
    return made


def tie_groups(step: Step, vector: Tensor, groups: int) -> None:
    """Tie the channels that are at the same position of every group."""
    step.labels.merge(vector.view(groups, -1).t(), MEETS_NOBODY)


def convolution(step: Step) -> list[Tensor]:
    """Convolutions and transposed ones, in groups or not."""
    labels, shape = step.labels, step.shapes[0]
    groups, transposed = int(step.saved("groups")), bool(step.saved("transposed"))
    lin = step.labels.along(step.x, 1, step.why)
    weight = step.parameter(step.edges[1])
    made = _make(step, shape[1], weight, lin)
    if weight is not None:
        name, dims = weight
        row, column = Rows(name, dims[int(transposed)]), Rows(name, dims[int(not transposed)])
        if groups > 1 and groups == len(lin) and bool((lin != NOBODY).any()):
            labels.tie(lin.repeat_interleave(shape[1] // groups), made, MEETS_NOBODY)
            labels.bind(Rows(name, dims[0]), lin if transposed else made)
            labels.bind(Rows(name.rpartition(".")[0], ATTRIBUTE), lin)
        else:
            if groups > 1:
                tie_groups(step, lin, groups)
                tie_groups(step, made, groups)
            # Of the two, the one that a grouped weight holds once for all groups is dimension 1.
            labels.bind(column, lin if transposed else lin[: len(lin) // groups], time=step.time)
            labels.bind(row, made[: shape[1] // groups] if transposed else made)
    _add_bias(step, step.operands[2], made)
    return [spread(made, 1, shape)]


def _add_bias(step: Step, bias: Tensor | None, made: Tensor) -> None:
    if bias is not None and bias.numel() == len(made) > 1:
        step.labels.tie(bias.flatten(), made, MEETS_NOBODY)


def product(step: Step) -> list[Tensor]:
    """``x @ weight`` (Mm), ``bias + x @ weight`` (Addmm), ``x @ weight.T + bias`` (Linear)."""
    first = 1 if step.kind == "Addmm" else 0
    (x, w), shape = (first, first + 1), step.shapes[0]
    weight, read = step.parameter(step.edges[w]), step.operands[x]
    if weight is not None and weight[0] in step.labels.constants:
        return []
    inside = read is not None and any(dim != read.ndim - 1 for dim in varying(read))
    if read is not None and inside and not step.plain[x]:  # a learned sequence is no unit a row
        return [_inside(step, read, shape)]
    lin = nobody((1,)) if read is None else step.labels.along(read, -1, step.why)
    made = _make(step, shape[-1], weight, lin)
    if weight is not None:
        order = weight[1][::-1] if step.kind == "Linear" else weight[1]
        step.labels.bind(Rows(weight[0], order[0]), lin, time=step.time)
        step.labels.bind(Rows(weight[0], order[1]), made)
    if step.kind != "Mm":
        _add_bias(step, step.operands[2 if step.kind == "Linear" else 0], made)
    return [spread(made, -1, shape)]


def _inside(step: Step, read: Tensor, shape: Shape) -> Tensor:
    """A weight that works inside of units (within heads, along tokens): all units share it."""
    last = read.ndim - 1
    step.labels.fix(read, [last], step.why)
    read = step.labels.settled(read)
    dims = [dim for dim in varying(read) if dim != last]
    return core(read, dims).reshape(kept(shape, dims)).expand(shape)


def batched(step: Step) -> list[Tensor]:
    """Products of two values (Bmm, Baddbmm, Mm and Addmm without a weight)."""
    first = 1 if step.kind in ("Addmm", "Baddbmm") else 0
    (left, right), shape = (first, first + 1), step.shapes[0]
    grouped = step.blocks(step.edges[right]) if step.kind == "Bmm" else None
    if grouped is not None:
        return [_in_groups(step, grouped)]
    operands = []
    for place in (left, right):
        edge, labels = step.edges[place], step.operands[place]
        if step.parameter(edge) is not None and labels is not None and is_nobody(labels):
            return stacked(step)  # too large to be labelled entry by entry
        operands.append(None if labels is None or labels.ndim > len(shape) else labels)
    x, y = (None if z is None else z.unsqueeze(0) if z.ndim == 2 else z for z in operands)  # noqa: PLR2004
    size = x.shape[2] if x is not None else y.shape[1] if y is not None else 1
    batch, rows, columns = shape if len(shape) == 3 else (1, *shape)  # noqa: PLR2004
    x = nobody((batch, rows, size)) if x is None else x
    y = nobody((batch, size, columns)) if y is None else y
    weight = step.labels.table_of(y) if batch == 1 and step.plain[right] else None
    if weight is not None:
        result = _read_table(step, x, weight, y)
    else:
        result = multiply(step, x, y, products=(step.products[left], step.products[right]))
    result = result if len(shape) == 3 else result[0]  # noqa: PLR2004
    if first and step.operands[0] is not None:
        labelled = fits(tuple(step.operands[0].shape), shape)
        if labelled and varying(result) and varying(step.operands[0]):
            step.labels.tie(result, step.operands[0].expand(shape), MEETS_NOBODY)
    return [result]


def _in_groups(step: Step, weight: str) -> Tensor:
    """A product with a matrix for each of several groups, which are the rows of one weight.

    All groups share its columns: what is at the same position of every group goes together.
    """
    groups, _, size = step.shapes[0]
    lin = step.labels.along(step.x, -1, OF_GROUPS)  # (m,)
    made = step.labels.fresh(size)
    step.labels.made.append(Made(weight, made, step.time))
    step.labels.bind(Rows(weight, 1), lin, time=step.time)
    step.labels.bind(Rows(weight, 0), made.repeat(groups))
    return spread(made, -1, step.shapes[0])


def _read_table(step: Step, x: Tensor, weight: str, y: Tensor) -> Tensor:
    """A product with a parameter of several dimensions, of which each factor has some.

    Args:
        step: The operation.
        x: Labels ``(1, n, m)`` of what is multiplied.
        weight: Name of the parameter.
        y: Labels ``(1, m, p)`` of its entries, none of which has met others.
    """
    lin = step.labels.along(x, -1, step.why)  # (m,)
    made = step.labels.fresh(y.shape[2])
    step.labels.made.append(Made(weight, made, step.time))
    step.labels.weights.append((weight, y[0], lin, made, step.time))
    return spread(made, -1, (1, x.shape[1], y.shape[2]))


def stacked(step: Step) -> list[Tensor]:
    """A product with a weight of three dimensions, whose first are experts or groups."""
    for plain, labels in zip(step.plain, step.operands, strict=True):
        if (
            labels is not None and not plain
        ):  # entries of the weight itself are many, and in no unit
            step.labels.refuse(labels, STACKED)
    made = step.labels.fresh(step.shapes[0][-1])
    step.labels.refuse(made, STACKED)
    return [spread(made, -1, step.shapes[0])]


def multiply(step: Step, x: Tensor, y: Tensor, *, products: tuple[bool, bool]) -> Tensor:
    """Labels of ``x @ y`` for ``(batch, n, m)`` and ``(batch, m, p)``.

    What one product sums over meets there. Rows of `x` are products of their own where `y` is the
    same for all of them (grouped queries folded into the rows), and so are columns of `y`; but not
    where the other factor is a product already: attention weights take all of a head's values.

    Args:
        step: The operation.
        x: Labels of the first factor.
        y: Labels of the second.
        products: Per factor, whether it is computed from a product of values.
    """
    by_row, by_column = 1 in varying(x), 2 in varying(y)  # noqa: PLR2004 - n and p
    lonely = is_nobody(x) or is_nobody(y)
    if not lonely and products[0] != products[1]:
        by_row, by_column = by_row and products[0], by_column and products[1]
    if by_row and by_column:
        by_row = by_column = False
    batch, n, p = *x.shape[:2], y.shape[2]
    x, y = strided(x), strided(y).transpose(1, 2)  # (batch, n, m), (batch, p, m), or 1 for each
    if by_row or by_column:
        free, other = (x, y) if by_row else (y, x)
        count, width, other = n if by_row else p, free.shape[2], other.flatten(1).unsqueeze(1)
        free = free.expand(batch, count, width).reshape(batch * count, width)
        other = other.expand(batch, count, other.shape[2]).reshape(batch * count, -1)
    else:
        free = x.flatten(1).expand(batch, -1)
        other = y.flatten(1).expand(batch, -1)
    rows = torch.cat([free, other], 1)
    kinds, places = rows.unique(dim=0, return_inverse=True)
    finest = step.labels.meet(kinds, step.time, step.why, record=not lonely)[places]
    if by_row:
        return finest.view(batch, n, 1).expand(batch, n, p)
    if by_column:
        return finest.view(batch, 1, p).expand(batch, n, p)
    return finest.view(batch, 1, 1).expand(batch, n, p)


def fused_attention(step: Step) -> list[Tensor]:
    """``softmax(q @ k.T) @ v`` in one kernel, for ``(batch, heads, tokens, features)``."""
    shape = step.shapes[0]
    given = [x for x in step.operands[:3] if x is not None]
    if len(given) < 3 or any(x.ndim != 4 for x in given):  # noqa: PLR2004
        return unknown(step)
    q, k, v = (x.repeat_interleave(shape[1] // x.shape[1], 1).flatten(0, 1) for x in given)
    scores = multiply(step, q, k.transpose(1, 2), products=(False, False))
    step.labels.softmaxes.append(Meeting(strided(scores).flatten(), step.time))
    out = multiply(
        step, step.labels.settled(scores), step.labels.settled(v), products=(True, False)
    )
    results = [out.view(*shape[:2], *out.shape[1:])]
    return [*results, *(nobody(other) for other in step.shapes[1:])]


def lookup(step: Step) -> list[Tensor]:
    """Rows of a table (Embedding, indexing of a parameter): one label a column of the table."""
    parameter = step.parameter(step.edges[0])
    if parameter is None or len(parameter[1]) != 2:  # noqa: PLR2004 - (rows, columns)
        return unknown(step)
    name, dims = parameter
    if name in step.labels.constants:
        return []
    column = 1
    if step.kind == "IndexSelect":
        column = 1 - step.dims()[0]
    elif step.kind == "Index":
        free = [dim for dim, index in enumerate(step.saved("indices")) if index is None]
        column = free[0] if free else 1
    shape = step.shapes[0]
    place = len(shape) - 1 if column == 1 else 0
    made = step.labels.fresh(shape[place])
    step.labels.made.append(Made(name, made, step.time))
    step.labels.bind(Rows(name, dims[column]), made)
    if step.kind == "Embedding":
        step.labels.refuse(made, EMBEDDED)
    return [spread(made, place, shape)]
