"""Find the experts that a router chooses among: rows of its weight, and one matrix per expert.

A router is a weight whose products end in a choice of the largest. Its experts are the tensors in
the same block that have one entry per row of it; which rows of them belong to a neuron is measured
(`expert_neurons`). Several versions are offered, since only the proof (`hf_gradnas.verification`)
can tell which tensors and sizes follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch import Tensor, nn

from ..errors import StructureError
from ..routing import STACKED_DIMS, find_chosen
from ..surgery.rows import above, below
from ..types import KINDS, Attribute, Axis, Kind, Slice, Tap
from . import couplings
from .expert_lists import is_list_of, neurons_of_members, slices_of_members, tap_of_members
from .expert_neurons import all_run, is_flat, neurons_in_block, neurons_of
from .labels import NOBODY
from .reading import IrregularRows, Reading
from .trace import Call

BEST_OF_GROUP = 2


@dataclass(frozen=True)
class Routing:
    """A router, and the block that holds its experts.

    Attributes:
        block: Path of the module around router and experts.
        router: The rows of the router's weight.
        experts: Path of the module that holds the experts' matrices.
        size: Number of experts.
        chosen: How many are chosen for a token.
        time: When the router runs.
    """

    block: str
    router: Slice
    experts: str
    size: int
    chosen: int
    time: int = field(compare=False)

    @property
    def names(self) -> list[str]:
        """Modules and tensors that belong to it."""
        return [self.block, self.router.tensor, self.experts]


def find_routings(reading: Reading) -> Iterator[Routing]:
    """Every router whose block holds as many matrices as it has rows, in running order."""
    known: dict[str, Routing] = {}
    for choice in sorted(reading.labels.choices, key=lambda choice: choice.time):
        roots = reading.labels.roots(choice.labels)
        weights = {weight for root in roots for weight in reading.makers.get(root, ())}
        if len(weights) != 1 or NOBODY in roots or len(set(roots)) < len(roots):
            continue
        (router,) = weights
        if router in known:
            before = known[router]
            if choice.is_one_of_several:
                known[router] = replace(before, chosen=before.chosen + choice.chosen)
            continue
        found, rows = _block_of(reading, router, len(roots)), _rows(reading, router, roots)
        if found is None or rows is None:
            continue
        block, experts = found
        known[router] = Routing(block, rows, experts, len(roots), choice.chosen, choice.time)
    return iter(known.values())


def _rows(reading: Reading, router: str, roots: Sequence[int]) -> Slice | None:
    """Rows of a router that make its experts' logits; None where they are not in order."""
    units = {root: number for number, root in enumerate(roots)}
    for rows, entries in reading.rows.items():
        if rows.tensor != router or not entries.present >= units.keys():
            continue
        try:
            patterns = entries.patterns(units)
        except IrregularRows:
            return None
        if len(patterns) == 1:
            return Slice(router, rows.dim, *patterns[0], role="makes")
    return None


def _block_of(reading: Reading, router: str, size: int) -> tuple[str, str] | None:
    """The nearest called module around a router that holds its experts, and where these are."""
    path = router.rpartition(".")[0]
    while path:
        path = path.rpartition(".")[0]
        if path not in reading.forward.calls:
            continue
        for inner, module in reading.modules[path].named_modules():
            place = f"{path}.{inner}".rstrip(".")
            is_held = any(is_stack(p, size) for p in module.parameters(recurse=False))
            is_list = is_list_of(module, size) and not router.startswith(f"{place}.")
            if is_held or is_list or _holds_flat(module, reading.forward.calls.get(place), size):
                return path, place
    return None


def _holds_flat(module: nn.Module, call: Call | None, size: int) -> bool:
    """Whether a module that is told who was chosen holds the matrices of experts on each other."""
    is_told = call is not None and find_chosen(call.args, call.kwargs) is not None
    return is_told and any(is_flat(p, size) for p in module.parameters())


def is_stack(tensor: Tensor, size: int) -> bool:
    """Whether a tensor holds one matrix for each of so many experts."""
    return tensor.ndim == STACKED_DIMS and tensor.shape[0] == size


UNTOLD = (
    "its experts are not told by indices which of them were chosen, nor do all run for every "
    "token, so that none can be scored"
)


def counted_with_others(model: nn.Module, routing: Routing) -> str:
    """Why no expert can go: a module around the block counts those of others by one number."""
    path = routing.block
    while path and not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        names = _present(couplings.EXPERT_COUNTS, vars(around))
        if not path or all(vars(around)[name] != routing.size for name in names):
            continue
        for inner, module in around.named_modules():
            place = above(inner, path)
            is_other = not f"{place}.".startswith(f"{routing.block}.")
            if is_other and any(
                is_stack(p, routing.size) for p in module.parameters(recurse=False)
            ):
                return (
                    f"{path}.{names[0]} counts its experts and those of {place}, which would have "
                    "to keep as many; neurons in them can go"
                )
    return ""


def expert_versions(
    model: nn.Module,
    routing: Routing,
    calls: Mapping[str, Call],
    *,
    is_fixed: bool = False,
    members: Sequence[Axis] = (),
) -> tuple[tuple[Axis, ...], ...]:
    """The axes of the experts and of the neurons in them, by names in their block.

    In every choice of what may follow; after the versions with both axes those with one of them.

    Args:
        model: The model.
        routing: A router, and its block.
        calls: How the modules were called.
        is_fixed: Whether all experts stay.
        members: Axes that were found in experts that are modules of a list, by names in the block.

    Raises:
        StructureError: They cannot be scored.
    """
    block = model.get_submodule(routing.block)
    router = replace(routing.router, tensor=below(routing.router.tensor, routing.block))
    inside = below(routing.experts, routing.block)
    if is_list_of(block.get_submodule(inside), routing.size):
        tap = tap_of_members(dict(model.named_modules()), routing.block, routing.experts, calls)
        alone = _experts_alone(block, routing, router, tap)
        return _versions_of(alone, neurons_of_members(block, inside, alone[0], members), is_fixed)
    module, call = block.get_submodule(inside), calls.get(routing.experts, Call((), {}, ()))
    chosen = find_chosen(call.args, call.kwargs)
    if chosen is not None:  # by several choices of one each, as in PhiMoE
        routing = replace(routing, chosen=max(routing.chosen, chosen.indices.shape[-1]))
    apart: list[Slice] = []
    if chosen is None and not all_run(module, call, routing.size):
        apart, inside = neurons_in_block(block, calls[routing.block], routing.size), ""
        if not apart:
            raise StructureError(UNTOLD)
    side = "choice" if chosen else "every"
    alone = _experts_alone(block, routing, router, Tap(inside, side, -1))
    if apart:
        return _in_several(alone, apart, is_fixed=is_fixed)
    experts = alone[0]
    neurons = neurons_of(module, inside, chosen, call, experts)
    if neurons is None and not any(is_stack(p, routing.size) for p in module.parameters()):
        raise StructureError("its experts are rows of one matrix, and no neurons of them were told")
    return _versions_of(alone, neurons, is_fixed)


def _versions_of(
    alone: Sequence[Axis], neurons: Axis | None, is_fixed: bool
) -> tuple[tuple[Axis, ...], ...]:
    """Experts in every choice of what may follow, with the neurons in them and without."""
    experts = alone[0]
    if neurons is None:
        return () if is_fixed else tuple((axis,) for axis in alone)
    fixed = replace(experts, minimum=experts.size)
    if is_fixed:
        return ((fixed, replace(neurons, minimum=experts.size)),)
    return (
        *((axis, replace(neurons, minimum=axis.minimum)) for axis in alone),
        *((axis,) for axis in alone if any(part.each for part in neurons.slices)),
        (fixed, replace(neurons, minimum=experts.size)),
    )


def _experts_alone(block: nn.Module, routing: Routing, router: Slice, tap: Tap) -> list[Axis]:
    """The axis of the experts, by names in their block, in every choice of what may follow.

    Args:
        block: Around router and experts.
        routing: The router.
        router: Its rows.
        tap: Where the experts are.
    """
    listed = tap.owner if tap.side == "outputs" else ""
    own = tuple(_slices(block, router, tap, routing.size))
    own += tuple(slices_of_members(block, listed)) if listed else ()
    loose = tuple(_loose(block, own, routing.size, but=listed))
    sizes, config = _attributes(block, routing.size, but=listed)
    experts = Axis(
        name=f":{Kind.EXPERTS}",
        module="",
        kind=Kind.EXPERTS,
        size=routing.size,
        slices=own,
        taps=(tap,),
        attributes=sizes,
        minimum=max(routing.chosen, KINDS[Kind.EXPERTS].minimum),
    )
    return [
        replace(axis, slices=(*own, *more), attributes=(*sizes, *read))
        for axis, more, read in product(
            _grouped(experts, block.get_submodule(router.module)),
            dict.fromkeys([loose, ()]),
            dict.fromkeys([(), config]),
        )
    ]


def _in_several(
    alone: Sequence[Axis], slices: Sequence[Slice], *, is_fixed: bool
) -> tuple[tuple[Axis, ...], ...]:
    """Axes of experts whose matrices are in several modules: they are measured by their neurons.

    Args:
        alone: The experts in every choice of what may follow.
        slices: Rows of their neurons, those that read first.
        is_fixed: Whether all experts stay.
    """
    reader, each = slices[0].tensor, slices[0].each
    versions = []
    for axis in alone[:1] if is_fixed else alone:
        own = tuple(replace(s, role="reads") if s.tensor == reader else s for s in axis.slices)
        tap = Tap(reader, "stack", -1, each, 0, each)
        fewest = axis.size if is_fixed else axis.minimum
        neurons = Axis(
            name=f":{Kind.NEURONS}",
            module="",
            kind=Kind.NEURONS,
            size=axis.size * each,
            slices=tuple(slices),
            taps=(Tap(reader, "stack", -1),),
            parent=axis.name,
            minimum=fewest,
        )
        versions.append((replace(axis, slices=own, taps=(tap,), minimum=fewest), neurons))
    return tuple(versions)


UNROUTED = "no router was seen that chooses among its experts; neurons in them can go"


def versions_without_router(module: nn.Module, call: Call) -> tuple[tuple[Axis, ...], ...]:
    """The axes of experts that all stay, and of the neurons in them, by names in their module.

    Args:
        module: Holds experts behind Transformers' interface.
        call: How it was called.
    """
    chosen = find_chosen(call.args, call.kwargs)
    size = len(next(p for p in module.parameters(recurse=False) if p.ndim == STACKED_DIMS))
    own = [name for name, p in module.named_parameters(recurse=False) if len(p) == size]
    experts = Axis(
        name=f":{Kind.EXPERTS}",
        module="",
        kind=Kind.EXPERTS,
        size=size,
        slices=tuple(Slice(name, 0) for name in own),
        taps=(Tap("", "choice", -1),),
        minimum=size,
    )
    neurons = None if chosen is None else neurons_of(module, "", chosen, call, experts)
    return () if neurons is None else ((experts, neurons),)


def _grouped(experts: Axis, router: nn.Module) -> list[Axis]:
    """The axis as it is; and in groups, if the router may first choose among these.

    A router like DeepSeek's weighs a group by its two best experts, so that two stay in each.
    """
    held = vars(router)
    groups = next((held[name] for name in couplings.EXPERT_GROUPS if name in held), 1)
    chosen = next((held[name] for name in couplings.CHOSEN_GROUPS if name in held), groups)
    if not isinstance(groups, int) or groups < 2 or experts.size % groups:  # noqa: PLR2004
        return [experts]
    fewest = max(BEST_OF_GROUP, -(-experts.minimum // max(chosen, 1)))
    return [experts, replace(experts, blocks=groups, minimum=groups * fewest)]


def _slices(block: nn.Module, router: Slice, tap: Tap, size: int) -> Iterator[Slice]:
    """Rows of the router and of the stacks, with the biases beside them."""
    experts = tap.module
    for path, module in block.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        is_router = path == router.module
        is_inside = not experts or f"{path}.".startswith(f"{experts}.")
        if not (is_router or is_inside):
            continue
        for leaf, tensor in own:
            name = f"{path}.{leaf}".lstrip(".")
            if name == router.tensor:
                yield router
            elif tensor.ndim and tensor.shape[0] == size:
                yield Slice(name, 0, role="follows")


def _loose(block: nn.Module, own: Sequence[Slice], size: int, *, but: str = "") -> Iterator[Slice]:
    """Vectors elsewhere in the block with one entry per expert, such as corrections of a choice.

    Not those inside of the modules of a list.
    """
    held = {part.tensor for part in own}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        dim = _vector_dim(tensor, size)
        is_inside = but and name.startswith(f"{but}.")
        if name not in held and dim is not None and not is_inside:
            yield Slice(name, dim, role="follows")


def _vector_dim(tensor: Tensor, size: int) -> int | None:
    """The dimension of a vector with one entry per expert, among others of size 1."""
    dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
    return dims[0] if len(dims) == 1 and tensor.numel() == size else None


def _attributes(
    block: nn.Module, size: int, *, but: str = ""
) -> tuple[tuple[Attribute, ...], tuple[Attribute, ...]]:
    """Attributes that repeat the number of experts, and values that a forward may read.

    Not those of the modules of a list.
    """
    sizes, config = [], []
    axis = f":{Kind.EXPERTS}"
    for path, module in block.named_modules():
        if but and path.startswith(f"{but}."):
            continue
        held = vars(module)
        sizes += [
            Attribute(path, name, axis)
            for name in _present(couplings.EXPERT_COUNTS, held)
            if held[name] == size and not isinstance(held[name], bool)
        ]
        own = held.get("config")
        base = vars(own).get("_base", own) if own is not None else None
        if base is not None:
            values = {**vars(base), **{n: getattr(base, n, None) for n in base.attribute_map}}
            config += [
                Attribute(path, name, axis, in_config=True)
                for name in _present(KINDS[Kind.EXPERTS].config_names, values)
                if values[name] == size
            ]
    return tuple(sizes), tuple(config)


def _present(names: Iterable[str], values: object) -> list[str]:
    return [name for name in names if name in values]  # type: ignore[operator]
