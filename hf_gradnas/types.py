"""Frozen data that the verbs of hf_gradnas take and return.

Knows names, indices and numbers; knows neither torch nor transformers. Tensors are named by their
full path in the model, as in ``state_dict()``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import PlanError, ScoresError


class Kind(str, Enum):
    """What the units of an axis are. Compares and formats as its value."""

    HEADS = "heads"
    KV_GROUPS = "kv_groups"
    NEURONS = "neurons"

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


@dataclass(frozen=True, slots=True)
class Refusal:
    """A module whose axis was seen but is not pruned, with the reason."""

    module: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Structure:
    """Everything prunable in one model, and what was seen but refused."""

    axes: tuple[Axis, ...]
    refusals: tuple[Refusal, ...] = ()

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


@dataclass(frozen=True, slots=True)
class CostModel:
    """A cost as a closed form of how many units each axis keeps.

    ``cost(kept) = constant + Σ_axes (per_unit·kept + while_kept·[kept > 0])``. Exact for nested
    axes too, since the kept heads are counted over all kept groups.

    Attributes:
        name: ``"flops"`` or ``"params"``.
        constant: What no plan can change.
        per_unit: Cost of one unit, per axis name.
        while_kept: Cost that goes only when the axis loses its last unit (q/k norms of a head).
    """

    name: str
    constant: float
    per_unit: Mapping[str, float]
    while_kept: Mapping[str, float] = field(default_factory=dict)

    def of(self, kept: Mapping[str, int]) -> float:
        """Cost of a model that keeps ``kept[axis]`` units of each axis."""
        total = self.constant
        for axis, per_unit in self.per_unit.items():
            total += per_unit * kept[axis]
            if kept[axis]:
                total += self.while_kept.get(axis, 0.0)
        return total


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on one cost: `limit` in the cost's unit, `ratio` of the original's `total`."""

    cost: str
    limit: float
    total: float

    @property
    def ratio(self) -> float:
        """Limit as a fraction of the original cost."""
        return self.limit / self.total


@dataclass(frozen=True, slots=True)
class Plan:
    """For every axis the sorted indices of the units that stay. Pure data; JSON in and out.

    Attributes:
        kept: Sorted kept indices per axis name.
        sizes: Number of units of each axis in the unpruned model.
        layout: ``"stock"`` or ``"per_layer"``.
        budgets: What was asked for.
        costs: Achieved cost per cost name.
        loss_increase: Predicted loss increase in units of the score (0.5·Σ for `fisher`).
        search: Name of the strategy.
        score: Name of the score.
        steps: Smallest step of each budgeted cost in this layout, upwards from this plan.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    layout: str
    budgets: tuple[Budget, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    loss_increase: float = 0.0
    search: str = ""
    score: str = ""
    steps: Mapping[str, float] = field(default_factory=dict)

    FORMAT_VERSION = 1

    def counts(self) -> dict[str, int]:
        """Number of kept units per axis name."""
        return {name: len(units) for name, units in self.kept.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        data = asdict(self)
        data["format_version"] = self.FORMAT_VERSION
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            PlanError: The dictionary is not a plan, or one of a newer format.
        """
        if not isinstance(data, Mapping):
            raise PlanError("Plan: the file holds no object; make the plan again.")
        values = dict(data)
        version = values.pop("format_version", None)
        if version != cls.FORMAT_VERSION:
            raise PlanError(
                f"Plan: format_version is {version!r}, this hf_gradnas reads "
                f"{cls.FORMAT_VERSION}; upgrade hf_gradnas or make the plan again."
            )
        try:
            values["budgets"] = tuple(Budget(**budget) for budget in values["budgets"])
            values["kept"] = {name: tuple(units) for name, units in values["kept"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"Plan: not a plan of hf_gradnas ({error}); make it again.") from error

    def save(self, file: str | Path) -> None:
        """Write the plan as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: The file is not a plan.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"Plan: {file} cannot be read ({error}); give another file.") from error
        except ValueError as error:
            raise PlanError(f"Plan: {file} is not JSON ({error}); make the plan again.") from error
        return cls.from_dict(data)


@dataclass(frozen=True)
class Scores:
    """How much the loss is hurt when a unit goes: one float64 array per axis.

    Attributes:
        values: ``(size,)`` per axis name; ``kv_groups`` axes hold the joint score of their heads.
        metadata: Strings: ``method``, ``normaliser``, ``examples``, ``mask_place``,
            ``model_fingerprint``, ``data_fingerprint``, ``settings``, versions.
    """

    values: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)

    FORMAT_VERSION = 1

    def save(self, file: str | Path) -> None:
        """Write the scores as safetensors, one tensor per axis; the file is there whole or not."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        sibling = file.with_name(f"{file.name}.tmp")
        tensors = {
            name: np.ascontiguousarray(v, dtype=np.float64) for name, v in self.values.items()
        }
        metadata = {**self.metadata, "format_version": str(self.FORMAT_VERSION)}
        try:
            save_file(tensors, sibling, metadata=metadata)
            sibling.replace(file)
        finally:
            sibling.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path) -> Scores:
        """Read scores written by `save`.

        Raises:
            ScoresError: The file is missing, damaged, or holds something else.
        """
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                version = metadata.pop("format_version", None)
                if version != str(cls.FORMAT_VERSION):
                    raise ScoresError(
                        f"Scores: {file} has the format_version {version!r}, needed "
                        f"'{cls.FORMAT_VERSION}'; upgrade hf_gradnas, or score again into "
                        "another file."
                    )
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ScoresError(
                f"Scores: {file} cannot be read ({error}); it is missing, damaged or no scores "
                "file: remove it and score again."
            ) from error
        return cls(values, metadata)
