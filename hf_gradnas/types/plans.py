"""Which units stay, and what every unit is worth; each with its file format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .._files import write_text, write_whole
from ..errors import PlanError, ScoresError, StructureError
from .basis import Basis
from .costs import Budget
from .documents import metadata_of, parse_json, read_object
from .outlines import amounts, by_kind, by_place, headline_of, outline
from .plan_checks import check_values
from .units import Units

FORMAT_VERSION = 2
"""Of files of plans and of scores. In 1, by version 0.1, some axes had other names."""
READ_VERSIONS = tuple(str(version) for version in range(1, FORMAT_VERSION + 1))
DIGEST = "sha256"
"""Key of a scores file's metadata: of its values and of the rest of its metadata."""
SUMS = "sums"
"""Key of a scores file's metadata: of which methods it holds all sums, with commas."""
CHOICE_KEYS = ("row_power", "effective_ratio")
"""Keys of metadata that belong to a method that holds its sums alone."""
POWERS = "row_powers"
"""Key of a pass's settings: what such methods choose between."""
UNSCORED = "unscored"
"""Key of a scores file's metadata: which axes have no scores, with commas between them."""
BASIS = "basis"
"""Key of a scores file's metadata: what plans are made from besides, as JSON."""
ALSO = "also"
"""Key of a scores file's metadata: which further methods it holds, with commas between them."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """For every axis the sorted indices of the units that stay. Pure data; JSON in and out.

    Attributes:
        kept: Sorted kept indices per axis name: tuples, or `Units`, which are equal to tuples.
        sizes: Number of units of each axis in the unpruned model.
        layout: ``"stock"`` or ``"per_layer"``.
        budgets: What was asked for.
        costs: Achieved cost per cost name.
        loss_increase: Predicted loss increase in `loss_unit`; without a unit the sum of the pruned
            scores, which ranks plans of the same scores and is no loss.
        search: Name of the strategy.
        score: Name of the score.
        steps: Smallest step of each budgeted cost in this layout, upwards from this plan.
        loss_unit: ``"nats per token"``, ``"nats per example"`` or ``"nats per label"``; "" where
            the scores are no loss (`tempered`, `balanced`, `gradnas`,
            `magnitude`, `random`) or do not say
            of what.
            For `fisher` the prediction is second order, for `taylor` the first-order change at
            most; both add up units as if each went alone, and forecast small cuts only.
        loss_before: Loss of the whole model on what was scored, in `loss_unit`.
        tried: KL to the original on held-out rows, in nats per label, of the plans of all scores
            that were tried for this budget; empty where one score was asked for.
        format_version: Of its file; `former_names` reads the names of format 1.
        basis: What it was made from, in its layout, where no model was at hand; None elsewhere.
    """

    kept: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    layout: str
    budgets: tuple[Budget, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    loss_increase: float = 0.0
    search: str = ""
    score: str = ""
    steps: Mapping[str, float] = field(default_factory=dict)
    loss_unit: str = ""
    loss_before: float | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    basis: Basis | None = field(default=None, compare=False, repr=False)

    def counts(self) -> dict[str, int]:
        """Number of kept units per axis name."""
        return {name: len(units) for name, units in self.kept.items()}

    def __repr__(self) -> str:
        return outline("Plan", self._said())

    def summary(self) -> str:
        """What the plan keeps, in lines to print: by kind, what it costs, and axis by axis.

        Axes that differ in numbers of their names only are in one line.
        """
        totals = {b.cost: b.total for b in self.budgets if b.cost in self.costs}
        lines = [f"{title}: {said}" for title, said in self._said().items() if said]
        return "\n".join(
            [*headline_of(self.costs, totals), *lines, *by_place(self.sizes, self.counts())]
        )

    def _said(self) -> dict[str, str]:
        """Rows of `__repr__`."""
        loss = f"{self.loss_increase:.4g} {self.loss_unit}" if self.loss_unit else ""
        limits = [f"{b.cost} at most {b.limit:,.12g} ({b.ratio:.1%})" for b in self.budgets]
        return {
            "kept": by_kind(self.sizes, self.counts()),
            "costs": amounts(self.costs),
            "budgets": ", ".join(limits),
            "predicted loss increase": loss,
            "layout": self.layout,
            "score": self.score,
            "search": self.search,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        data = asdict(replace(self, kept={}, sizes={}, basis=None))
        del data["basis"]
        data["kept"] = {name: _listed(units) for name, units in self.kept.items()}
        data["sizes"] = {name: int(size) for name, size in self.sizes.items()}
        if self.basis is not None:
            data["basis"] = self.basis.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            PlanError: The dictionary is not a plan, holds nonsense, or is of a newer format.
        """
        if not isinstance(data, Mapping):
            raise PlanError("Plan: the file holds no object; make the plan again.")
        values = dict(data)
        version = values.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise PlanError(
                f"Plan: format_version is {version!r}, this hf_gradnas reads 1 to "
                f"{FORMAT_VERSION}; upgrade hf_gradnas or make the plan again."
            )
        try:
            values["budgets"] = tuple(Budget(**budget) for budget in values["budgets"])
            values["kept"] = {name: _units_of(units) for name, units in values["kept"].items()}
            if "basis" in values:
                values["basis"] = Basis.from_dict(values["basis"])
            plan = cls(**values)
        except (KeyError, TypeError, AttributeError, StructureError) as error:
            raise PlanError(f"Plan: not a plan of hf_gradnas ({error}); make it again.") from error
        check_values(plan)
        return plan

    def save(self, file: str | Path) -> None:
        """Write the plan as JSON, whole or not at all; a plan that is there is replaced.

        Raises:
            PlanError: The file cannot be written, or holds something else; it is as it was.
        """
        text = json.dumps(self.to_dict(), indent=1)
        try:
            write_text(file, text, replaces=self._is_file)
        except (OSError, ValueError) as error:
            raise PlanError(
                f"Plan: {file} cannot be written ({error}); what was there is as it was. Give "
                "another file, or free some space."
            ) from error

    @staticmethod
    def _is_file(file: Path) -> bool:
        """Whether a file looks like one of `save`, of whatever version."""
        return {"kept", "sizes", "format_version"} <= read_object(file).keys()

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: The file is not a plan.
        """
        try:
            data = parse_json(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"Plan: {file} cannot be read ({error}); give another file.") from error
        except ValueError as error:
            raise PlanError(f"Plan: {file} is not JSON ({error}); make the plan again.") from error
        return cls.from_dict(data)


def _units_of(units: Any) -> Any:
    """Units of a list, or a tuple where they can be none; anything else as it is, for the check."""
    if not isinstance(units, list):
        return units
    if all(type(unit) is int and unit >= 0 for unit in units):
        with suppress(TypeError):  # above 64 bits
            return Units(units)
    return tuple(units)


def _listed(units: Sequence[int]) -> list[int]:
    return units.tolist() if isinstance(units, Units) else [int(unit) for unit in units]


@dataclass(frozen=True, repr=False)
class Scores:
    """How much the loss is hurt when a unit goes: one float64 array per axis.

    Attributes:
        values: ``(size,)`` per axis name; ``kv_groups`` axes hold the joint score of their heads.
        metadata: Strings: ``method``, ``normaliser``, ``examples``, ``mask_place``,
            ``model_fingerprint``, ``data_fingerprint``, ``settings``, versions; ``loss_sum``
            and ``labels_scored``: the loss in nats while scoring, and of how many labels (tokens,
            examples) it is the sum, where the model's loss is a log-likelihood.
        also: Values of further methods from the same pass, per method; `of` gives their scores.
        sums: Of methods that choose between several formulas, all their sums, as `scores.methods`
            lays them out, by method: what a pass that broke off goes on from.
        format_version: Of their file; `former_names` reads the names of format 1.
        basis: What plans are made from besides; None where it is not known.
    """

    values: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    basis: Basis | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        rows = {
            "units": by_kind({name: len(values) for name, values in self.values.items()}),
            "methods": ", ".join(self.methods),
            "examples": self.metadata.get("examples", ""),
        }
        return outline("Scores", rows)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods that these scores hold, that of `values` first."""
        return (self.metadata.get("method", ""), *self.also)

    @property
    def unscored(self) -> frozenset[str]:
        """Names of axes that were not scored: their values are 0, and they stay whole."""
        return frozenset(filter(None, self.metadata.get(UNSCORED, "").split(",")))

    def of(self, method: str) -> Scores:
        """The scores of one method alone, as a pass for it would have given them.

        Raises:
            ScoresError: They hold no such method, or settings that cannot be read.
        """
        if method not in self.methods:
            raise ScoresError(
                f"Scores: they hold {', '.join(map(repr, self.methods))}, but {method!r} was asked "
                "for; choose one of these, or score the model again with that method."
            )
        metadata = {**self.metadata, "method": method}
        if "settings" in metadata:
            settings = {**_settings_of(metadata["settings"]), "method": method, "also": []}
            powers = dict(settings.get(POWERS) or {})
            settings[POWERS] = {method: powers[method]} if method in powers else None
            metadata["settings"] = json.dumps(settings, sort_keys=True)
        sums = {method: self.sums[method]} if method in self.sums else {}
        if not sums:
            metadata = {key: text for key, text in metadata.items() if key not in CHOICE_KEYS}
        values = self.also.get(method, self.values)
        return replace(self, values=values, metadata=metadata, also={}, sums=sums)

    def save(self, file: str | Path) -> None:
        """Write the scores as safetensors, one tensor per axis; the file is there whole or not.

        Those of further methods are named ``method/axis``, and sums ``method/``.

        Several processes may write one file at once; the last one to end wins.

        Raises:
            ScoresError: The file cannot be written, or holds something else; it is as it was.
        """
        further = {
            f"{m}/{name}": v for m, values in self.also.items() for name, v in values.items()
        } | {f"{m}/": sums for m, sums in self.sums.items()}
        tensors = {
            name: np.ascontiguousarray(v, dtype=np.float64)
            for name, v in {**self.values, **further}.items()
        }
        metadata = {**self.metadata, "format_version": str(self.format_version)}
        if self.also:
            metadata[ALSO] = ",".join(self.also)
        if self.sums:
            metadata[SUMS] = ",".join(self.sums)
        if self.basis is not None:
            metadata[BASIS] = json.dumps(self.basis.to_dict())
        metadata[DIGEST] = _digest(tensors, metadata)
        try:
            write_whole(
                file,
                lambda path: save_file(tensors, path, metadata=metadata),
                replaces=self.is_file,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ScoresError(
                f"Scores: {file} cannot be written ({error}); what was there is as it was. Give "
                "another file, or free some space."
            ) from error

    @staticmethod
    def is_file(file: str | os.PathLike[str]) -> bool:
        """Whether a file looks like one of `save`, of whatever version."""
        return "format_version" in metadata_of(file)

    @classmethod
    def load(cls, file: str | Path) -> Scores:
        """Read scores written by `save`.

        Raises:
            ScoresError: The file is missing, damaged or changed, or holds something else.
        """
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                version = metadata.get("format_version")
                if version not in READ_VERSIONS:
                    raise ScoresError(
                        f"Scores: {file} has the format_version {version!r}, needed "
                        f"{' or '.join(map(repr, READ_VERSIONS))}: it is no scores file, or of a "
                        "newer version; give another file, upgrade hf_gradnas, or score again."
                    )
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ScoresError(
                f"Scores: {file} cannot be read ({error}); it is missing, damaged or no scores "
                "file: give another one, or score again."
            ) from error
        written = metadata.pop(DIGEST, None)  # version 0.1 wrote none
        if written is not None and written != _digest(values, metadata):
            raise ScoresError(
                f"Scores: {file} was changed since it was written: its values and metadata do not "
                "have the digest in it; remove it and score again."
            )
        del metadata["format_version"]
        summed = [name for name in metadata.pop(SUMS, "").split(",") if f"{name}/" in values]
        sums = {method: values.pop(f"{method}/") for method in summed}
        methods = [name for name in metadata.pop(ALSO, "").split(",") if name]
        also = {method: _part(values, f"{method}/") for method in methods}
        basis = _basis_of(metadata.pop(BASIS, None), file)
        return cls(values, metadata, also, sums, int(version), basis)


def _basis_of(text: str | None, file: str | Path) -> Basis | None:
    """The basis in a file's metadata.

    Raises:
        ScoresError: The text is none.
    """
    try:
        return None if text is None else Basis.from_dict(parse_json(text))
    except ValueError as error:
        raise ScoresError(
            f"Scores: {file} does not say what plans are made from ({error}); score again."
        ) from error


def _settings_of(text: str) -> dict[str, Any]:
    """Settings of a pass, as scores keep them.

    Raises:
        ScoresError: The text is none.
    """
    try:
        return dict(parse_json(text))
    except (ValueError, TypeError) as error:
        raise ScoresError(
            f"Scores: their settings hold {text!r:.80}, needed a JSON object ({error}); score the "
            "model again."
        ) from error


def _part(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Take the values whose names begin with a prefix out of the others."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in names}


def _digest(values: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of values with their names, types and shapes, and of metadata."""
    state = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        state.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(array.tobytes())
    return state.hexdigest()
