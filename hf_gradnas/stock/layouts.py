"""How a pruned model is written, decided from axes before the search.

Needs no model: only what the stock class can express.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..errors import PlanError
from ..types import Axis, Kind, StockSpace

LAYOUTS = ("auto", "stock", "per_layer")


def layout_for(
    space: StockSpace, axes_allowed: Iterable[Axis], *, requested: str = "auto"
) -> tuple[str, str]:
    """Decide how the result is written, before the search.

    Args:
        space: What the stock class can express.
        axes_allowed: The axes that the rules let shrink.
        requested: ``"auto"``, ``"stock"`` or ``"per_layer"``. ``auto`` drops no axis to reach
            stock: one that the stock class cannot express decides for ``per_layer``.

    Returns:
        ``"stock"`` or ``"per_layer"``, and the reason as a sentence for the user.

    Raises:
        PlanError: An unknown layout, or ``"stock"`` where the stock class can express nothing.
    """
    if requested not in LAYOUTS:
        raise PlanError(
            f"layout: there is no layout {requested!r}; choose one of {', '.join(LAYOUTS)}."
        )
    if requested == "per_layer":
        return "per_layer", "Layout per_layer, as asked for."
    allowed = list(axes_allowed)
    # The only unit of an axis goes with its whole module: no width can say that.
    axes = [axis for axis in allowed if axis.size > 1 or axis.is_layer] or allowed
    stuck = _inexpressible(space, axes, allowed)
    if not stuck:
        kinds = _listed({axis.kind.value for axis in axes})
        can = f"the unmodified class can express fewer {kinds}" if axes else "no axis may be pruned"
        return "stock", f"Layout stock: {can}."
    first = next(iter(stuck))
    kinds = _listed({axis.kind.value for axis in axes if axis.name in stuck})
    why = f"{kinds} ({len(stuck)} of {len(axes)} axes, the first {first}: {stuck[first]})"
    if requested == "auto":
        return "per_layer", f"Layout per_layer: the unmodified class cannot express fewer {why}."
    if len(stuck) == len(axes):
        raise PlanError(
            "layout: 'stock' leaves nothing to prune: the unmodified class cannot express fewer "
            f"{why}; choose layout='per_layer' or 'auto'."
        )
    return "stock", f"Layout stock, as asked for, keeps what the class cannot express whole: {why}."


def _inexpressible(
    space: StockSpace, axes: Collection[Axis], allowed: Collection[Axis]
) -> dict[str, str]:
    """Reason per allowed axis that a stock checkpoint would have to keep whole."""
    names = {axis.name for axis in allowed}
    stuck = {axis.name: space.refused[axis.name] for axis in axes if axis.name in space.refused}
    for group in space.groups:
        members = [axis.name for axis in axes if axis.name in group.axes]
        kept = [name for name in group.axes if name not in names]
        kept = [] if str(Kind.LAYERS) in group.keys else kept  # each goes by itself
        keys = _listed(group.keys.values())
        if kept:
            reason = f"{keys} also sets {kept[0]}, which the rules keep whole"
            stuck.update(dict.fromkeys(members, reason))
        elif group.allowed is not None and len(group.allowed) == 1:
            stuck.update(dict.fromkeys(members, f"no smaller value of {keys} is accepted"))
    return stuck


def _listed(words: Iterable[str]) -> str:
    *first, last = sorted(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last
