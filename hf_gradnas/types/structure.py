"""What is prunable in a model, and what the stock class can express."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..errors import StructureError


class Kind(str, Enum):
    """What the units of an axis are. Compares and formats as its value."""

    HEADS = "heads"
    KV_GROUPS = "kv_groups"
    NEURONS = "neurons"
    CHANNELS = "channels"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of one tensor that belong to each unit of an axis.

    Unit ``i`` owns rows ``offset + i*stride … offset + i*stride + width - 1`` of dimension `dim`.
    """

    tensor: str
    dim: int
    width: int = 1
    offset: int = 0
    stride: int = 1

    def rows(self, units: Iterable[int]) -> list[int]:
        """Rows of the given units, in the order of the units."""
        return [
            self.offset + unit * self.stride + row for unit in units for row in range(self.width)
        ]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where the units of an axis stand among the activations of a module.

    Unit ``i`` owns entries ``offset + i*stride … offset + i*stride + width - 1`` of dimension `dim`
    of the module's first input or of its output. An axis may have several taps at one module.

    Attributes:
        module: Path of the module.
        side: ``"input"`` or ``"output"``.
        dim: 1 for channels ``(batch, channels, …)``, -1 for features ``(batch, …, features)``.
    """

    module: str
    side: str
    dim: int
    width: int = 1
    offset: int = 0
    stride: int = 1

    def rows(self, units: Iterable[int]) -> list[int]:
        """Entries of the given units, in the order of the units."""
        return [
            self.offset + unit * self.stride + row for unit in units for row in range(self.width)
        ]


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module that repeats a size.

    After a cut its value is ``factor`` times the number of kept units of `axis`, divided by the
    number of kept units of `per` where that is given (`num_key_value_groups`).
    With `in_config`, the module reads the value from its ``config`` while it runs.
    """

    module: str
    name: str
    axis: str
    factor: int = 1
    per: str | None = None
    in_config: bool = False


@dataclass(frozen=True, slots=True)
class Removal:
    """How a module that lost all its units is replaced, so that the rest still runs.

    Attributes:
        module: Path of the module to replace (the one that runs the attention).
        projection: Name of the out-projection inside `module`, or None when it stands outside.
        features: Width of the replacement's output: the out-projection's, or 0 when it is outside.
        returns: One entry per element of the module's tuple output: ``"output"`` or None;
            empty when the module returns a bare tensor.
        cross: Whether the module is a cross-attention, which keeps no length in the cache.
        norm: Name of a norm inside `module` that takes the sum of input and output (ALBERT: the
            attention adds the residual itself).
    """

    module: str
    projection: str | None
    features: int
    returns: tuple[str | None, ...] = ()
    cross: bool = False
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """One prunable dimension of one module.

    Attributes:
        name: ``<module path>:<kind>``, e.g. ``bert.encoder.layer.0.attention:heads``.
        module: Path of the module that holds the axis.
        kind: What the units are.
        size: Number of units.
        read_at: Path of the out-projection; its input holds `width` values per unit, in order.
        width: Values per unit at the input of `read_at`.
        slices: Rows of tensors that belong to a unit. A KV group's are those of its keys and
            values; the queries and the out-projection belong to the heads.
        attributes: Sizes repeated outside the tensors.
        parent: Name of the ``kv_groups`` axis whose groups hold the heads, if there is one; every
            kept group keeps the same number of heads, and head ``h`` stands in group
            ``h // (size // parent size)``.
        removal: What is done when nothing is kept (None: zero-width projections suffice).
        minimum: Fewest units that can stay, as far as it is proved (0: it can go altogether).
        tied: Axes with the same non-empty key must keep the same units in a stock checkpoint
            (T5: all layers share one position bias table).
        taps: Outputs of all layers that produce the units, in running order, for ``channels`` axes
            (whose `read_at` is the first producer, and `width` the channels per unit there); empty
            for the other kinds, whose one tap is the input of `read_at`.
        norms: Outputs of layers between producers and consumers whose result for one unit depends
            on other units or on parameters of its own (norms), in running order; a mask on the
            units covers them too.
    """

    name: str
    module: str
    kind: Kind
    size: int
    read_at: str
    width: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    parent: str | None = None
    removal: Removal | None = None
    minimum: int = 0
    tied: str = ""
    taps: tuple[Tap, ...] = ()
    norms: tuple[Tap, ...] = ()

    @property
    def masked_at(self) -> tuple[Tap, ...]:
        """Where a mask on the units is multiplied, and where scores are measured."""
        return self.taps or (Tap(self.read_at, "input", -1, self.width, 0, self.width),)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A module whose axis was seen but is not pruned, with the reason."""

    module: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Structure:
    """Everything prunable in one model, and what was seen but refused.

    Raises:
        StructureError: Two axes have the same name.
    """

    axes: tuple[Axis, ...]
    refusals: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        names = Counter(axis.name for axis in self.axes)
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise StructureError(
                f"{twice[0]}: {names[twice[0]]} axes have this name, but a plan needs one name for "
                "each; report it with the model's class and config."
            )

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class StockGroup:
    """Axes whose width the stock class reads from the same config values.

    Attributes:
        axes: Names of the axes that share one width.
        keys: Config key per kind of axis, e.g. ``{"heads": "num_attention_heads", "kv_groups":
            "num_key_value_heads"}``; a dotted key stands in a sub-config.
        allowed: Counts that the class accepts, one mapping from kind to count each; None when any
            count from 1 to the size is accepted.
        copies: Kind per further config key that takes the same count, e.g.
            ``{"num_key_value_heads": "heads"}`` where every head has its own keys and values.
        constants: Config values that must stand beside the counts, e.g. ``{"head_dim": 64}``.
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
        groups: Axes with a common width; each axis stands in at most one group.
        refused: Reason per axis name for every axis that the stock class cannot express.
    """

    groups: tuple[StockGroup, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
