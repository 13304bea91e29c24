"""Describe one attention: its axes, the sizes repeated in attributes, and how it is replaced.

Knows the tables of `couplings` and the rows of the heads; several versions are
offered, since only the proof (`hf_gradnas.verification`) can tell which is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..surgery.modeling_gradnas import adapters_of, table_of
from ..surgery.rows import below
from ..types import Adaptation, Attribute, Axis, Kind, Removal, Slice, Tap
from . import couplings
from .trace import Call

Parts = Mapping[str, nn.Module]
STACK = 3
"""Dimensions of one matrix of queries and keys for each head."""


@dataclass(frozen=True)
class HeadLayout:
    """The rows of one attention.

    Attributes:
        heads: Number of query heads.
        groups: Number of KV groups (equal to `heads` without grouping, 1 for multi-query).
        width: Values per head that stand together at the input of the out-projection.
        head_slices: Rows that belong to one head.
        group_slices: Rows that belong to one KV group and to no single head.
        taps: Inputs of all weights that read heads, the out-projection's first.
        group_taps: The same of KV groups.
        norms: Norms across heads.
        group_norms: Norms across KV groups.
    """

    heads: int
    groups: int
    width: int
    head_slices: tuple[Slice, ...]
    group_slices: tuple[Slice, ...]
    taps: tuple[Tap, ...] = ()
    group_taps: tuple[Tap, ...] = ()
    norms: tuple[Tap, ...] = ()
    group_norms: tuple[Tap, ...] = ()

    @property
    def is_grouped(self) -> bool:
        """Whether there are KV groups that can go one by one (not one per head, not a single)."""
        return 1 < self.groups < self.heads

    @property
    def read_width(self) -> int:
        """Values per head that the out-projection reads, in all places."""
        return sum(tap.width for tap in self.taps if tap.module == self.taps[0].module)

    @property
    def minimum(self) -> int:
        """Fewest heads: a module that replaces them all puts out what one projection does."""
        return int(len({tap.module for tap in (*self.taps, *self.group_taps)}) > 1)


def attention_versions(
    module: nn.Module,
    layout: HeadLayout,
    *,
    core: str,
    projection: str,
    call: Call,
    shares: bool = False,
    sizes: tuple[Attribute, ...] = (),
) -> tuple[tuple[Axis, ...], ...]:
    """Axes of one attention, with every choice of attributes and replacement to be tried.

    Args:
        module: The enclosing module; all names are relative to it.
        layout: The rows of its heads.
        core: Path of the module that runs the softmax.
        projection: Name of the out-projection's weight.
        call: How `core` was called, and what it returned.
        shares: Whether it takes a bias from a table of another attention, or gives it one.
        sizes: Attributes that no tensor repeats and no table of names knows.
    """
    parts = _parts_of(module, core)
    removals = _removals(module, core=core, projection=projection, call=call, shares=shares)
    grouped = layout.is_grouped
    heads = Axis(
        name=":heads",
        module="",
        kind=Kind.HEADS,
        size=layout.heads,
        slices=layout.head_slices,
        taps=layout.taps,
        minimum=layout.minimum,
        attributes=_attributes(parts, layout, couplings.WIDTHS) + sizes,
        parent=":kv_groups" if grouped else None,
        norms=layout.norms,
    )
    known = {(a.module, a.name) for a in heads.attributes}
    extras = _extras(parts, layout, config=_config_counts(module, layout, core), known=known)
    needs = _adaptations(module.get_submodule(core), layout, core_path=core, call=call)
    versions = [
        replace(heads, attributes=heads.attributes + extra, removal=removal, adaptation=need)
        for need in needs
        for extra in extras
        for removal in removals
    ]
    if not grouped:
        return tuple((version,) for version in versions)
    groups = Axis(
        name=":kv_groups",
        module="",
        kind=Kind.KV_GROUPS,
        size=layout.groups,
        slices=layout.group_slices,
        taps=layout.group_taps,
        minimum=layout.minimum,
        norms=layout.group_norms,
    )
    return tuple((groups, version) for version in versions)


def _extras(
    parts: Parts,
    layout: HeadLayout,
    *,
    config: tuple[Attribute, ...],
    known: Collection[tuple[str, str]],
) -> list[tuple[Attribute, ...]]:
    """Further attributes that may repeat a size, nothing first."""
    widths, numbers = _model_widths(parts, layout), _numbers(parts, layout, known=known)
    wide = tuple(a for a in numbers if a.factor > 1)
    several = _multiples(parts, layout)
    return list(dict.fromkeys([(), several, widths, config, widths + config, wide, numbers]))


def _adaptations(
    core: nn.Module, layout: HeadLayout, *, core_path: str, call: Call
) -> list[Adaptation | None]:
    """What calls of the attention may need once heads are gone, nothing first."""
    before = adapters_of(core)
    size = before[0].units[0] if before else layout.heads
    names = list(inspect.signature(type(core).forward).parameters)[1:]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    per_head = tuple(
        name
        for name, x in given.items()
        if isinstance(x, Tensor) and x.ndim >= STACK and x.shape[-STACK] > 1
        if x.shape[-STACK] % size == 0
    )
    width = next((a.width[0] for a in before if a.width), layout.heads * layout.read_width)
    choices = [((), 0), *(((name,), 0) for name in per_head), (per_head, 0)]
    choices += [((), width), (per_head, width)]
    return [
        Adaptation(core_path, names, width) if names or width else None
        for names, width in dict.fromkeys(choices)
    ]


def _removals(
    module: nn.Module, *, core: str, projection: str, call: Call, shares: bool
) -> tuple[Removal, ...]:
    """How the attention may be replaced when it keeps nothing: plainly, or with its own norm."""
    owner = projection.rpartition(".")[0]
    inside = not core or owner.startswith(core + ".")
    features = 0
    if inside:
        weight = module.get_parameter(projection)
        is_turned = isinstance(module.get_submodule(owner), Conv1D)
        features = weight.shape[1 if is_turned else 0]
    shared = table_of(module.get_submodule(core))
    plain = Removal(
        module=core,
        projection=below(owner, core) if inside else None,
        features=features,
        returns=tuple(
            "output" if place == 0 else value if isinstance(value, str) and not shares else None
            for place, value in enumerate(call.returns)
        ),
        cross=any(call.kwargs.get(name) is not None for name in couplings.CROSS_ARGUMENTS),
        table="" if shared is None else shared.table,
    )
    children = module.get_submodule(core).named_children()
    norms = [name for name, child in children if isinstance(child, nn.LayerNorm)]
    return (plain, *(replace(plain, norm=name) for name in norms if inside))


def _parts_of(module: nn.Module, core: str) -> Parts:
    """Modules below `module` by path, without the other members of lists that the core is in."""
    parts, names = dict(module.named_modules()), core.split(".")
    for depth in range(1, len(names)):
        owner, member = (".".join(names[:n]) for n in (depth, depth + 1))
        if isinstance(parts[owner], nn.ModuleList):
            parts = {
                path: part
                for path, part in parts.items()
                if not path.startswith(f"{owner}.") or f"{path}.".startswith(f"{member}.")
            }
    return parts


def _attributes(parts: Parts, layout: HeadLayout, widths: frozenset[str]) -> tuple[Attribute, ...]:
    """Attributes of parts that repeat a number of heads."""
    grouped = layout.is_grouped
    groups_axis = ":kv_groups" if grouped else ":heads"
    found = []
    for path, child in parts.items():
        for name, value in vars(child).items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            if name in couplings.HEAD_COUNTS and value == layout.heads:
                found.append(Attribute(path, name, ":heads"))
            elif name in couplings.KV_COUNTS and value == layout.groups != 1:
                found.append(Attribute(path, name, groups_axis))
            elif name in couplings.HEADS_PER_GROUP and value > 1 and layout.groups != layout.heads:
                # MQA: one group of all heads; where each unit is a group, it keeps its heads
                per = ":kv_groups" if grouped else None
                each = 1 if grouped else max(value // layout.heads, 1)
                found.append(Attribute(path, name, ":heads", each, per=per))
            elif name in widths and value == layout.heads * layout.width:
                found.append(Attribute(path, name, ":heads", layout.width))
            elif name in widths and value == layout.heads * layout.read_width:
                found.append(Attribute(path, name, ":heads", layout.read_width))
    return tuple(found)


def _multiples(parts: Parts, layout: HeadLayout) -> tuple[Attribute, ...]:
    """Numbers of heads where each unit is several of them."""
    return tuple(
        Attribute(path, name, ":heads", value // layout.heads)
        for path, child in parts.items()
        for name, value in vars(child).items()
        if name in couplings.HEAD_COUNTS and type(value) is int
        if value > layout.heads > 1 and value % layout.heads == 0
    )


def _numbers(
    parts: Parts, layout: HeadLayout, *, known: Collection[tuple[str, str]]
) -> tuple[Attribute, ...]:
    """Attributes of any name whose value is a size of heads or groups."""
    width, groups_axis = layout.width, ":kv_groups" if layout.is_grouped else ":heads"
    sizes = {layout.heads: (":heads", 1), layout.heads * width: (":heads", width)}
    if layout.is_grouped:
        sizes |= {layout.groups: (groups_axis, 1), layout.groups * width: (groups_axis, width)}
    return tuple(
        Attribute(path, name, *sizes[value])
        for path, child in parts.items()
        if not type(child).__module__.startswith("torch.nn")
        for name, value in vars(child).items()
        if type(value) is int and value in sizes and (path, name) not in known
    )


def _model_widths(parts: Parts, layout: HeadLayout) -> tuple[Attribute, ...]:
    return tuple(
        a
        for a in _attributes(parts, layout, couplings.MODEL_WIDTHS)
        if a.name in couplings.MODEL_WIDTHS
    )


def _config_counts(module: nn.Module, layout: HeadLayout, core: str) -> tuple[Attribute, ...]:
    """Values that the core module may read from its config while it runs."""
    config = vars(module.get_submodule(core)).get("config")
    if config is None:
        return ()
    grouped = layout.is_grouped
    sizes = {"heads": layout.heads, "kv_groups": layout.groups}
    base = vars(config).get("_base", config)  # a layer that was cut before has a live view
    known = {*vars(base), *base.attribute_map}
    return tuple(
        Attribute(core, name, f":{kind}" if grouped else ":heads", in_config=True)
        for kind, names in couplings.CONFIG_COUNTS.items()
        for name in names
        if name in known and _value(config, name) == sizes[kind]
    )


def _value(config: object, name: str) -> object:
    """A value of a config; None where its layers have their own, which none can ask for."""
    try:
        return getattr(config, name)
    except RuntimeError:
        return None
