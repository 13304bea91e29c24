"""How long a model takes at other widths, on one machine, as a file that any machine can plan with.

Knows numbers and names; measuring is the matter of `costs.measured`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from .._files import write_text
from ..errors import BudgetError, StructureError
from .costs import LATENCY, CostModel, Curve, Shared
from .documents import read_object
from .kinds import Kind
from .prunable import Prunable
from .records import read_document, to_document
from .structure import Axis

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Timed:
    """Axes whose units cost the same time, and how much.

    Attributes:
        axes: Their names.
        curve: Milliseconds by kept units of one of them.
        parents: Names of the axes that their units are in, where the curve is that of one unit of
            those (neurons in experts); as many as `axes`, or none.
    """

    axes: tuple[str, ...]
    curve: Curve
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Milliseconds of a forward on one machine, by what every sub-layer keeps.

    Attributes:
        model: Fingerprint of the structure that it was measured for, of `table_fingerprint`.
        machine: Where, in words.
        device: Type of the device.
        dtype: Number type of the weights.
        batch_size: Examples at once.
        length: Tokens of each, of those that are read before in ``decode``; 0 without tokens.
        phase: ``prefill``, a forward of all tokens, or ``decode``, one of the next token.
        total_ms: Of the whole model.
        timed: What sub-layers share of it.
        uneven_ms: What it takes to read widths that are each layer's own (layout ``per_layer``).
    """

    model: str
    machine: str
    device: str
    dtype: str
    batch_size: int
    length: int
    phase: Phase
    total_ms: float
    timed: tuple[Timed, ...]
    uneven_ms: float = 0.0

    FORMAT_VERSION: ClassVar[int] = 1

    def cost(self, axes: Sequence[Axis], *, layout: str) -> CostModel:
        """Its closed form; what no sub-layer takes is constant.

        Args:
            axes: Those that it was measured for.
            layout: In ``"per_layer"`` a model that is cut also takes `uneven_ms`.
        """
        curves = _curves(self.timed)
        rest = self.uneven_ms if layout == "per_layer" else 0.0
        whole = Shared({axis.name: axis.size for axis in axes}, rest)
        return CostModel(
            name=LATENCY,
            constant=self.rest_ms + rest,
            per_unit={},
            shared=(whole,) if rest else (),
            parts={"other modules": self.rest_ms + rest},
            unit=self.said,
            curves=curves,
        )

    @property
    def rest_ms(self) -> float:
        """What no sub-layer takes."""
        curves = _curves(self.timed).values()
        return self.total_ms - math.fsum(curve.values[-1] for curve in curves)

    @property
    def said(self) -> str:
        """What it is the time of, in words."""
        tokens = f" x {self.length} tokens" if self.length else ""
        what = f"the next token after {self.batch_size}" if self.phase == "decode" else "a batch of"
        sizes = f"{tokens}" if self.phase == "decode" else f" {self.batch_size}{tokens}"
        return f"ms of {what}{sizes} in {self.dtype} on {self.machine}"

    def priced(self, prunable: Prunable, *, device: str | None = None) -> Prunable:
        """What a plan is made from, with this cost; one that is there already is replaced.

        Args:
            prunable: Axes, costs and layout of the model.
            device: Type of the device that the table has to be of; None: any.

        Raises:
            BudgetError: It is of another model or device.
        """
        if device is not None and device.partition(":")[0] != self.device:
            raise BudgetError(
                f"latency table: it was measured on {self.machine}, but the device is {device}; "
                "measure it there, or name no device to plan for the one that it is of."
            )
        known = {name for timed in self.timed for name in timed.axes}
        wanted = {axis.name for axis in prunable.axes if is_timed(axis)}
        if self.model != table_fingerprint(prunable) or known != wanted:
            raise BudgetError(
                "latency table: it was measured for a model of another structure (other modules or "
                f"shapes; {len(known)} axes, this one has {len(wanted)}); measure this model with "
                "measure_latency, on the machine that it will run on."
            )
        sizes = {axis.name: axis.size for axis in prunable.axes}
        for name, curve in _curves(self.timed).items():
            size = sizes[name] / sizes.get(curve.of, 1)
            if curve.widths[-1] != size:
                raise BudgetError(
                    f"latency table: {name}: its times reach to {curve.widths[-1]:g} units, but "
                    f"there are {size:g}; it was changed after it was measured: measure it again."
                )
        cost = self.cost(prunable.axes, layout=prunable.layout)
        return replace(
            prunable,
            costs={**prunable.costs, cost.name: cost},
            totals={**prunable.totals, cost.name: self.total_ms},
        )

    def save(self, file: str | Path) -> None:
        """Write it as JSON; only such a table is replaced."""
        text = json.dumps(to_document(self), indent=1) + "\n"
        write_text(file, text, replaces=self.is_file)

    @staticmethod
    def is_file(file: str | Path) -> bool:
        """Whether a file is one that `save` wrote."""
        return {"timed", "total_ms", "phase"} <= read_object(Path(file)).keys()

    @classmethod
    def load(cls, file: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            BudgetError: There is no such file, or it holds no table.
        """
        path = Path(file)
        if not path.is_file():
            raise BudgetError(
                f"latency table {file}: there is no such file; check the path, or measure one with "
                "measure_latency."
            )
        try:
            return read_document(cls, read_object(path), _check)
        except (OSError, ValueError, StructureError) as error:
            reason = str(error).replace("score the model again", "measure it again")
            raise BudgetError(f"latency table {file}: cannot be read: {reason}") from error


def is_timed(axis: Axis) -> bool:
    """Whether an axis is in a table: not layers, nor channels, whose times do not add up."""
    return not axis.is_layer and axis.kind is not Kind.CHANNELS


def table_fingerprint(prunable: Prunable) -> str:
    """SHA-256 over what a table depends on: the axes and the number of parameters, no values."""
    axes = [
        [axis.name, axis.kind.value, axis.size, axis.width, axis.parent]
        for axis in prunable.axes
        if not axis.is_layer
    ]
    content = json.dumps([sorted(map(repr, axes)), prunable.totals.get("params")])
    return hashlib.sha256(content.encode()).hexdigest()


def _curves(timed: Iterable[Timed]) -> dict[str, Curve]:
    """The curve of every axis, by name."""
    return {
        name: replace(found.curve, of=parent)
        for found in timed
        for name, parent in zip(found.axes, found.parents or ("",) * len(found.axes), strict=True)
    }


def _check(table: LatencyTable) -> None:
    """Raises ValueError where numbers make no sense."""
    if not (math.isfinite(table.total_ms) and table.total_ms > 0):
        raise ValueError(f"total_ms is {table.total_ms}, needed a number above 0")
    if not 0 <= table.uneven_ms < math.inf:
        raise ValueError(f"uneven_ms is {table.uneven_ms}, needed a number of 0 or more")
    if table.batch_size < 1 or table.length < 0:
        raise ValueError(f"its batch is {table.batch_size} of length {table.length}, which is none")
    if not table.rest_ms >= 0:
        raise ValueError("sub-layers take more time than the whole model")
