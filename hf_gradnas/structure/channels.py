"""Read axes of channels out of the labels of a forward: what heads and neurons leave.

What it returns is optimistic: the proof runs the whole model masked and cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from ..types import KINDS, Axis, Kind, Refusal
from .labels import NOBODY, OUTPUT, Rows
from .reading import IrregularRows, Reading, Units

TOGETHER = "all of them meet in one sum or product, so that none can go alone"


def read_channels(
    reading: Reading, taken: Sequence[Axis], roots: Set[int]
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Axes of kind ``channels`` in running order, not proved yet, and what cannot be cut.

    Args:
        reading: What the labels of a forward say.
        taken: Axes of heads and neurons; channels that own rows of theirs are left out.
        roots: Labels of heads and neurons that were seen.
    """
    owners: dict[int, list[str]] = {}
    for path, _, entries in reading.producers:
        for root in dict.fromkeys(entries.roots):
            if root != NOBODY and root not in roots:
                owners.setdefault(root, []).append(path)
    groups: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for root, paths in owners.items():
        groups.setdefault(paths[0], {}).setdefault(tuple(paths), []).append(root)
    found = [_read_group(reading, path, list(g.values()), taken) for path, g in groups.items()]
    refusals = [item for item in found if isinstance(item, Refusal)]
    for root, path in reading.collapsed.items():
        reason = next(iter(reading.reasons.get(root, ())), TOGETHER)
        if root not in {NOBODY, *roots} and reason != OUTPUT:
            refusals.append(Refusal(path, str(Kind.CHANNELS), reason))
    return tuple(item for item in found if isinstance(item, Axis)), tuple(refusals)


def _read_group(
    reading: Reading, path: str, parts: Sequence[Sequence[int]], taken: Sequence[Axis]
) -> Axis | Refusal | None:
    """The axis of the channels that `path` makes first; None where there is nothing to say."""
    roots = [root for part in parts for root in part]
    touched = set(reading.touched(roots))
    owned = {Rows(s.tensor, s.dim) for axis in taken for s in axis.slices}
    if len(roots) == 1 or touched & owned:
        return None
    reason = _obstacle(reading, roots, touched, taken)
    if reason == OUTPUT and not touched & reading.readers.keys():
        return None
    if reason is None and len(parts) > 1:
        reason = "only some of them meet the channels of other layers"
    if reason is None:
        try:
            return _axis(reading, path, {root: number for number, root in enumerate(roots)})
        except IrregularRows as error:
            reason = str(error)
    return Refusal(path, str(Kind.CHANNELS), reason)


def _obstacle(
    reading: Reading, roots: Sequence[int], touched: Iterable[Rows], taken: Sequence[Axis]
) -> str | None:
    """Why the units cannot be cut, if there is a reason."""
    names = sorted(rows.tensor for rows in touched)
    attentions = [a.removal.module for a in taken if a.kind is Kind.HEADS and a.removal]
    inside = [n for n in names if any(n.startswith(f"{a}.") for a in attentions)]
    if inside and inside == names:
        return f"they are inside an attention, whose heads are pruned instead ({names[0]})"
    if inside:
        return f"they are the residual stream of attention layers ({inside[0]} belongs to one)"
    reasons = [why for root in roots for why in reading.reasons.get(root, ())]
    if OUTPUT in reasons:
        return OUTPUT
    owner = reading.opaque_owner(names)
    if owner is not None:
        return f"{owner} holds some of them, which is not cut by channels"
    untapped = [reading.untapped[root] for root in roots if root in reading.untapped]
    return next(iter([*reasons, *untapped]), None)


def _axis(reading: Reading, path: str, units: Units) -> Axis:
    """The axis of the units, by root.

    Raises:
        IrregularRows: Slices cannot say it.
    """
    name = f"{path}:{Kind.CHANNELS}"
    return Axis(
        name=name,
        module=path,
        kind=Kind.CHANNELS,
        size=len(units),
        slices=reading.slices(units),
        taps=reading.taps(reading.producers, units),
        attributes=reading.sizes_of(units, name),
        minimum=KINDS[Kind.CHANNELS].minimum,
        norms=reading.taps(reading.norms, units),
    )
