"""Experts that are modules of a list, each with the tensors that the others have.

Their axes are those of stacked experts: the tensors of all of them are one stack (`Slice.tensor`).
Knows no architecture; that the modules are what a router chooses among is proved by masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..errors import StructureError
from ..members import members_in
from ..surgery.rows import above, below
from ..types import MEMBER, Attribute, Axis, Kind, Slice, Tap
from .expert_neurons import first_of, taker_of
from .graph import Forward
from .trace import Call

FEWEST = 2
"""Modules in a list that are experts."""
UNFOLLOWED = (
    "its experts are modules of a list that all get all tokens, or tokens that were not followed, "
    "so that none can be scored; neurons in them can go"
)
TUPLES = (
    "its experts are modules of a list that put out more than one tensor, so that none can be "
    "scored; neurons in them can go"
)
SEVERAL = "its experts are modules of a list with other units than the neurons of one FFN"


def is_list_of(module: nn.Module, size: int) -> bool:
    """Whether a module holds so many modules of one kind, with tensors of the same shapes."""
    members = list(members_in(module).values())
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not len(members) == size >= FEWEST:
        return False
    kinds = {
        (type(member), *((name, tuple(p.shape)) for name, p in member.named_parameters()))
        for member in members
    }
    has_matrices = any(p.ndim > 1 for p in members[0].parameters())
    return len({id(member) for member in members}) == size and len(kinds) == 1 and has_matrices


def gets_parts(module: nn.Module, path: str, forward: Forward) -> bool:
    """Whether a list of modules of one kind is called with other numbers of rows each."""
    names = (f"{path}.{name}" for name, _ in module.named_children())
    inputs = [first_of(forward.calls[name]) for name in names if name in forward.calls]
    rows = {len(x) for x in inputs if x is not None}
    return is_list_of(module, len(members_in(module))) and len(rows) > 1


def tap_of_members(
    modules: Mapping[str, nn.Module], block: str, holder: str, calls: Mapping[str, Call]
) -> Tap:
    """Where experts in a list are among the activations: what each of them puts out.

    Args:
        modules: All modules of the model by path.
        block: Path of the module around router and experts.
        holder: Path of the list.
        calls: How the modules were called.

    Raises:
        StructureError: It is not known which tokens an expert gets, or it puts out a tuple.
    """
    members = (f"{holder}.{name}" for name in members_in(modules[holder]))
    if any(calls[path].returns for path in members if path in calls):
        raise StructureError(TUPLES)
    runner = taker_of(modules, holder, calls)
    if not f"{runner}.".startswith(f"{block}."):
        raise StructureError(UNFOLLOWED)
    path = f"{below(holder, block)}.{MEMBER}"
    return Tap(path, "outputs", -1, runner=below(runner, block))


def slices_of_members(block: nn.Module, holder: str) -> list[Slice]:
    """The stacks of all tensors of the modules in a list, by their names in the block."""
    first, *_ = members_in(block.get_submodule(holder)).values()
    named = (*first.named_parameters(), *first.named_buffers())
    return [Slice(f"{holder}.{MEMBER}.{name}", 0) for name, _ in named]


def neurons_of_members(
    block: nn.Module, holder: str, experts: Axis, inside: Sequence[Axis]
) -> Axis | None:
    """The axis of the neurons of experts in a list; None where they have none.

    Args:
        block: Around router and experts.
        holder: Path of the list in it.
        experts: The axis of the experts.
        inside: Axes of single experts, by names in the block.

    Raises:
        StructureError: What they have besides or instead are no neurons of one FFN.
    """
    if not inside:
        return None
    names = list(members_in(block.get_submodule(holder)))
    found = {_any_member(axis, holder, names) for axis in inside}
    (first, *others) = found
    tap = first.taps[0]
    is_dense = (tap.offset, tap.stride, len(first.taps)) == (0, tap.width, 1)
    if others or first.kind is not Kind.NEURONS or tap.side != "input" or not is_dense:
        raise StructureError(SEVERAL)
    return replace(
        first,
        name=f":{Kind.NEURONS}",
        module="",
        size=experts.size * first.size,
        slices=tuple(replace(s, dim=s.dim + 1, each=first.size) for s in first.slices),
        taps=(replace(tap, side="inputs", runner=experts.taps[0].runner),),
        attributes=tuple(_for_members(first.attributes, names)),
        parent=experts.name,
        minimum=experts.minimum,
        removal=None,
    )


def _any_member(axis: Axis, holder: str, names: Sequence[str]) -> Axis:
    """An axis in one module of a list, as one in any of them."""

    def moved(path: str) -> str:
        own, _, rest = path.removeprefix(f"{holder}.").partition(".")
        return above(rest, f"{holder}.{MEMBER}") if own in names else path

    return replace(
        axis,
        name="",
        module=moved(axis.module),
        slices=tuple(replace(s, tensor=moved(s.tensor)) for s in axis.slices),
        taps=tuple(replace(t, module=moved(t.module)) for t in axis.taps),
        attributes=tuple(
            replace(a, module=moved(a.module), axis=f":{Kind.NEURONS}") for a in axis.attributes
        ),
    )


def _for_members(attributes: Iterable[Attribute], names: Sequence[str]) -> Iterable[Attribute]:
    """Sizes that the modules of a list repeat, each for its own neurons."""
    for attribute in attributes:
        for name in names:
            path = attribute.module.replace(f".{MEMBER}", f".{name}")
            yield replace(attribute, module=path, per=f":{Kind.EXPERTS}")
