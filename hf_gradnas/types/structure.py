"""What is prunable in a model, and what the stock class can express."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import StructureError
from .kinds import KINDS, Kind
from .outlines import by_kind, outline
from .places import Slice, Tap
from .records import read_document, to_document
from .structure_checks import check_structure


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module that repeats a size.

    Every lost unit of `axis` takes ``factor`` off its value.

    Attributes:
        module: Path of the module.
        name: Name of the attribute.
        axis: Name of the axis that it counts.
        factor: What it counts for each unit.
        per: Name of an axis by whose number of units the count is divided
            (`num_key_value_groups`).
        in_config: Whether the module reads the value from its ``config`` while it runs.
        value: Its value before the cut, where other axes, or none, have a share in it; None: it is
            ``factor`` times the units of `axis`.
    """

    module: str
    name: str
    axis: str
    factor: int = 1
    per: str | None = None
    in_config: bool = False
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How the calls of a module are brought to fewer units, where its tensors do not say it all.

    Attributes:
        module: Path of the module.
        arguments: Names of its arguments that are made outside and have an entry for each unit, in
            the third dimension from the last ``(…, units, queries, keys)``: biases and masks.
        width: Width of all units, which its forward writes into shapes; 0 where it does not.
    """

    module: str
    arguments: tuple[str, ...] = ()
    width: int = 0


@dataclass(frozen=True, slots=True)
class Removal:
    """How a module that lost all its units is replaced, so that the rest still runs.

    Attributes:
        module: Path of the module to replace (the one that runs the attention).
        projection: Name of the out-projection inside `module`, or None when it is outside.
        features: Width of the replacement's output: the out-projection's, or 0 when it is outside.
        returns: One entry per element of the module's tuple output: ``"output"``, the name of an
            argument that is handed on, or None; empty when the module returns a bare tensor.
        cross: Whether the module is a cross-attention, which keeps no length in the cache.
        norm: Name of a norm inside `module` that takes the sum of input and output (ALBERT: the
            attention adds the residual itself).
        table: Name of the table inside `module`, if it has one, from which the attentions of a
            stack take a bias per head (T5); empty where they take none.
        passes: Whether the replacement hands on what it is given, in place of a whole layer, rather
            than zeros.
    """

    module: str
    projection: str | None
    features: int
    returns: tuple[str | None, ...] = ()
    cross: bool = False
    norm: str | None = None
    table: str = ""
    passes: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One prunable dimension of one module.

    Attributes:
        name: ``<module path>:<kind>``, e.g. ``bert.encoder.layer.0.attention:heads``.
        module: Path of the module that holds the axis.
        kind: What the units are.
        size: Number of units.
        slices: Rows of tensors that belong to a unit, and what they do for it. A KV group's are
            those of its keys and values; the queries and the out-projection belong to the heads.
        taps: Where a mask on the units is multiplied, and where scores are measured: the input of
            the out-projection of heads and neurons, the outputs of all layers that produce
            channels, in running order. A KV group has the values of all its heads there: masked,
            they are what they would be without its keys and values, and the sum of their
            gradients is the group's. Never empty.
        attributes: Sizes repeated outside the tensors.
        parent: Name of the axis in whose units these are, if there is one (heads in KV groups,
            neurons in experts); every kept unit of it keeps the same number of them, and unit ``i``
            is in unit ``i // (size // parent size)``.
        removal: What is done when nothing is kept (None: zero-width projections suffice).
        minimum: Fewest units that can stay, as far as it is proved (0: it can go altogether).
        multiple: What the number of kept units in each unit of the parent is a multiple of, where a
            kernel needs it; with others the module runs its slower kernel.
        blocks: Number of runs of neighbouring units of which each keeps the same number (the groups
            that a router chooses among before it chooses experts).
        tied: Axes with the same non-empty key must keep the same units in a stock checkpoint
            (T5: all layers share one position bias table).
        norms: Outputs of layers between producers and consumers whose result for one unit depends
            on other units or on parameters of its own (norms), in running order; a mask on the
            units covers them too.
        adaptation: What calls need besides, once units are gone; None: nothing.
        within: Name of the axis of the layer that this axis is in, and loses all units with. Empty
            where layers are no axes.
    """

    name: str
    module: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    taps: tuple[Tap, ...]
    attributes: tuple[Attribute, ...] = ()
    parent: str | None = None
    removal: Removal | None = None
    minimum: int = 0
    multiple: int = 1
    blocks: int = 1
    tied: str = ""
    norms: tuple[Tap, ...] = ()
    adaptation: Adaptation | None = None
    within: str = ""

    def __post_init__(self) -> None:
        if not self.taps:
            raise StructureError(
                f"{self.name}: the axis has no tap, but its units need a place among the "
                "activations to be masked at; give the input of the layer that reads them."
            )

    def block_of(self, unit: int) -> int:
        """The run of neighbouring units that a unit is in."""
        return unit // (self.size // self.blocks)

    @property
    def is_layer(self) -> bool:
        """Whether the one unit is a whole layer."""
        return self.removal is not None and self.removal.passes

    @property
    def makers(self) -> tuple[Slice, ...]:
        """Rows of weights that put out the units' values."""
        return tuple(part for part in self.slices if part.role == "makes")

    @property
    def readers(self) -> tuple[Slice, ...]:
        """Columns of weights that take the units' values in; a KV group is read by its heads."""
        return tuple(part for part in self.slices if part.role == "reads")

    @property
    def width(self) -> int:
        """Values per unit at the module of the first tap."""
        first = self.taps[0]
        return sum(t.width for t in self.taps if (t.module, t.side) == (first.module, first.side))

    @property
    def is_chosen(self) -> bool:
        """Whether a unit runs for the tokens that a router sends to it, and for no others."""
        return KINDS[self.kind].is_routed and self.taps[0].side != "every"

    @property
    def per_unit(self) -> int:
        """What people count in a unit: the channels that it holds, or 1, the unit itself."""
        return self.width if KINDS[self.kind].counts_values else 1

    @property
    def is_columns(self) -> bool:
        """Whether the units are the columns of one layer, in order."""
        return self.taps == (Tap(self.taps[0].module, "input", -1),) and not self.norms


@dataclass(frozen=True, slots=True)
class Refusal:
    """A module whose axis was seen but is not pruned, with the reason."""

    module: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Structure:
    """Everything prunable in one model, and all else.

    Attributes:
        axes: What can be pruned, proved.
        refusals: What was seen but cannot be pruned.
        unpruned: Why, by name, of every parameter that is in no axis and in no refused module: not
            prunable by design.

    Raises:
        StructureError: Two axes have the same name.
    """

    axes: tuple[Axis, ...]
    refusals: tuple[Refusal, ...] = ()
    unpruned: Mapping[str, str] = field(default_factory=dict)

    FORMAT_VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        names = Counter(axis.name for axis in self.axes)
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise StructureError(
                f"{twice[0]}: {names[twice[0]]} axes have this name, but a plan needs one name for "
                "each; report it with the model's class and config."
            )

    def __repr__(self) -> str:
        refused = Counter(str(refusal.kind) for refusal in self.refusals)
        rows = {
            "units": by_kind({axis.name: axis.size for axis in self.axes}),
            "axes": f"{len(self.axes):,}",
            "refused": ", ".join(f"{kind} of {n:,} modules" for kind, n in refused.items()),
        }
        return outline("Structure", rows)

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The structure as JSON can hold it; fields at their default are left out."""
        return to_document(self)

    @classmethod
    def from_dict(cls, data: Any) -> Structure:
        """Inverse of `to_dict`.

        Raises:
            StructureError: The data is no structure, holds nonsense, or is of another format.
        """
        return read_document(cls, data, check_structure)


@dataclass(frozen=True, slots=True)
class StockGroup:
    """Axes whose width the stock class reads from the same config values.

    Attributes:
        axes: Names of the axes that share one width.
        keys: Config key per kind of axis, e.g. ``{"heads": "num_attention_heads", "kv_groups":
            "num_key_value_heads"}``; a dotted key is in a sub-config.
        allowed: Counts that the class accepts, one mapping from kind to count each; None when any
            count from 1 to the size is accepted.
        copies: Kind per further config key that takes the same count, e.g.
            ``{"num_key_value_heads": "heads"}`` where every head has its own keys and values.
        constants: Config values that must be set beside the counts, e.g. ``{"head_dim": 64}``.
    """

    axes: tuple[str, ...]
    keys: Mapping[str, str]
    allowed: tuple[Mapping[str, int], ...] | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StockSpace:
    """What the unmodified class can express: groups of uniform widths, and the axes it cannot.

    Attributes:
        groups: Axes with a common width; each axis is in at most one group.
        refused: Reason per axis name for every axis that the stock class cannot express.
    """

    groups: tuple[StockGroup, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
