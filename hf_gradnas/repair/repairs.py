"""A repair: new values of the weights that read what was pruned, as data beside the plan.

Knows tensors, their file and how they are put into a model for a while or for good; how they are
found is said in `least_squares`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import write_whole
from ..batches.batch import tensor_bytes
from ..errors import GradNASError, GradNASWarning, RepairError, StructureError, described
from ..running.freed import give_back
from ..running.hooks import tensor_at
from ..running.lending import give
from ..running.offloading import is_offloaded
from ..running.processes import Processes
from ..running.wrappers import check_parameters, is_sharded, shape_of
from ..scores.fingerprints import model_fingerprint
from ..scores.normaliser import TOKEN_COUNTS
from ..types import REPAIR_MARK, Plan, Scores, metadata_of, parse_json

T = TypeVar("T")

FORMAT_VERSION = 1
CHOICES = ("auto", "weights", "swap", "none")
"""New weights; these also for a plan with swapped neurons; or nothing. ``auto`` swaps where the
loss is one of tokens."""


@dataclass(frozen=True, slots=True)
class Site:
    """What was fitted at once, and how far it was from the original.

    It is a layer that loses inputs, of which the output is compared; or a feed: what one or several
    layers read that lose none, and that are fitted too, so that they read what is nearer to the
    original's.

    Attributes:
        module: Path of the layer; of a feed that of the first layer that reads it.
        rows: Positions that it was fitted on, over all processes.
        columns: Inputs that stay, the unknowns of each output; of a feed all its features.
        ridge: Relative strength α of the pull towards the present weights; 0.0 where nothing was
            changed.
        error_before: Squared difference from the original on the held-out rows, relative to the
            squares of the original there; of many outputs those that the ridge was sought with.
        error_after: The same with weights that were fitted on the other rows.
        reason: Why it is as it was; "" where it has new weights.
    """

    module: str
    rows: int
    columns: int
    ridge: float = 0.0
    error_before: float = math.nan
    error_after: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class Repair:
    """New weights for a plan, found without training.

    Attributes:
        tensors: Whole new values of parameters by full name, in the model's dtype, on the CPU, or
            in a file that is read as they are. Rows and columns that the plan removes are as they
            were. Empty: the repair was not accepted.
        sites: What was fitted, in running order; after it the layers that lose inputs and could not
            be fitted.
        plan: Digest of the plan that it was made for (`plan_digest`).
        model: Fingerprint of the whole model that it was made from.
        kl_before: Mean KL divergence of the masked model's predictions from the original's on the
            held-out batches, in nats per predicted label; of a regression a mean squared
            difference.
        kl_after: The same with the new weights. They are fitted to these batches too, once the
            ridges are chosen: on a Llama that is 10 to 14 % less than with weights that are not.
        examples: Calibration examples, of which every fifth batch was held out.
    """

    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    plan: str
    model: str
    kl_before: float = math.nan
    kl_after: float = math.nan
    examples: int = 0
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def is_accepted(self) -> bool:
        """Whether there are new weights: the held-out KL fell."""
        return bool(self.tensors)

    def summary(self) -> dict[str, Any]:
        """JSON-ready description without the tensors."""
        data = {name: value for name, value in vars(self).items() if name != "tensors"}
        data["sites"] = [asdict(site) for site in self.sites]
        return data

    def digest(self) -> str:
        """SHA-256 of the new weights."""
        return _digest(self.tensors)

    def record(self) -> dict[str, Any]:
        """The same for ``gradnas.json``: plain JSON, in which what is not known is null."""
        data = {"method": "least squares", "is_accepted": self.is_accepted, **self.summary()}
        data["sites"] = [_without_nan(site) for site in data["sites"]]
        return _without_nan(data)

    def save(self, file: str | Path) -> None:
        """Write the repair as safetensors, whole or not at all; a repair that is there is replaced.

        Raises:
            RepairError: The file cannot be written, or holds something else; it is as it was.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        metadata = {REPAIR_MARK: json.dumps(self.summary()), "digest": _digest(tensors)}
        try:
            write_whole(
                file, lambda path: save_file(tensors, path, metadata=metadata), replaces=is_repair
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise RepairError(
                f"Repair: {file} cannot be written ({error}); what was there is as it was. Give "
                "another file, or free some space."
            ) from error

    @classmethod
    def load(cls, file: str | Path) -> Repair:
        """Read a repair written by `save`.

        Raises:
            RepairError: The file is missing, damaged or changed, or holds something else.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            data = dict(parse_json(metadata[REPAIR_MARK], allow_nan=True))
            data["sites"] = tuple(Site(**site) for site in data["sites"])
            repair = cls(tensors=tensors, **data)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RepairError(
                f"Repair: {file} cannot be read ({error}); it is missing, damaged or no repair of "
                "this version: give another file, or repair again."
            ) from error
        if repair.format_version != FORMAT_VERSION or metadata.get("digest") != _digest(tensors):
            raise RepairError(
                f"Repair: {file} was changed since it was written, or is of another version "
                f"({repair.format_version}, needed {FORMAT_VERSION}); repair again."
            )
        return repair


def is_repair(file: Path) -> bool:
    """Whether a file looks like one of `Repair.save`, of whatever version."""
    return REPAIR_MARK in metadata_of(file)


def plan_digest(plan: Plan) -> str:
    """SHA-256 over what a plan keeps."""
    kept = {name: [int(unit) for unit in plan.kept[name]] for name in sorted(plan.kept)}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def check_repair(repair: Repair, model: nn.Module, plan: Plan, *also: Plan) -> None:
    """Check that a repair was made for this plan, and from this very model.

    One that was not accepted changes nothing, so it may be that of another model.

    Args:
        repair: The repair.
        model: The whole model.
        plan: The plan.
        *also: The same plan by other names of its axes.

    Raises:
        RepairError: It was made for another plan or model, or is no repair.
    """
    if not isinstance(repair, Repair):
        raise RepairError(
            f"repair: found a {type(repair).__name__}, needed what pruner.repair(plan, dataloader) "
            "or Repair.load(file) gives; pass that, or None for the weights as they are."
        )
    if repair.plan not in map(plan_digest, (plan, *also)):
        raise RepairError(
            f"repair: it was made for the plan {repair.plan[:12]}, but the plan here is "
            f"{plan_digest(plan)[:12]}; new weights fit one plan only: repair this one."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in repair.tensors.items():
        found = parameters.get(name)
        if found is None or shape_of(found) != tuple(tensor.shape):
            has = "no such parameter" if found is None else f"the shape {shape_of(found)}"
            raise RepairError(
                f"repair: {name} has the shape {tuple(tensor.shape)}, the model has {has}; use it "
                "with the whole model that it was made from, or repair again."
            )
    needed = model_fingerprint(model) if repair.is_accepted else repair.model
    if repair.model != needed:
        raise RepairError(
            f"repair: it was made from other weights (fingerprint {repair.model[:12]}…, this "
            f"{type(model).__name__} has {needed[:12]}…); repair this model, in the dtype that it "
            "is pruned in."
        )


def check_unsharded(model: nn.Module, step: str, *, offloaded: bool = False) -> None:
    """Check that a model holds its weights whole on this process.

    Args:
        model: The model.
        step: What is to be done with it.
        offloaded: Whether weights that Accelerate loads when they are needed will do.

    Raises:
        StructureError: It does not.
    """
    if is_sharded(model):
        raise StructureError(
            f"{step}: {type(model).__name__} is sharded by FSDP2 or ZeRO-3, but a repair is found "
            "and tried with whole weights; find it with the whole model on one process, and give "
            "it to apply(plan, repair), which takes shards, or omit it (repair='none')."
        )
    if is_offloaded(model):
        check_parameters(model, step, offloaded=offloaded)


def swaps(choice: str, scores: Scores) -> bool:
    """Whether a plan with other neurons is tried too, by what was asked for and what was scored.

    Measured: a Llama is closer to the original with swapped neurons at every budget, a BERT
    classifier at none; the repair takes half as long again, or twice as long.
    """
    counted = re.findall(r"\w+", scores.metadata.get("normaliser", ""))
    is_of_tokens = not TOKEN_COUNTS.keys().isdisjoint(counted)
    return choice == "swap" or (choice == "auto" and is_of_tokens)


def mended(
    plan: Plan,
    batches: Iterable[Any],
    swap: Callable[..., Plan] | None,
    repair: Callable[..., Repair],
    processes: Processes,
    **options: Any,
) -> tuple[Plan, Repair | None]:
    """A plan and its repair; with `swap`, of the plan as it is and with swapped neurons the closer.

    Which that is differs from model to model; the KL of the held-out examples says it.

    Args:
        plan: Of what stays, as it was found.
        batches: Calibration data; read again and again.
        swap: Chooses neurons again, as `GradNASPruner.swap`; None: nothing is tried but the plan.
        repair: Finds new weights, as `GradNASPruner.repair`.
        processes: All that work together.
        **options: Further arguments of both.

    Returns:
        The plan that is cut, and its repair; the plan as it was and None, with a warning that says
        why, where no repair can be found.

    Raises:
        GradNASError: As of `attempted`.
    """

    def find() -> tuple[Plan, Repair]:
        give_back()
        found = repair(plan, batches, **options)
        if swap is None:
            return plan, found
        give_back()
        try:
            chosen = swap(plan, batches, **options)
        except (RepairError, StructureError) as error:
            said = f"No other neurons are tried. {error}"
            warnings.warn(said, GradNASWarning, stacklevel=3)
            return plan, found
        if chosen.kept == plan.kept:
            return plan, found
        give_back()
        other = repair(chosen, batches, **options)
        is_closer = other.is_accepted and other.kl_after < min(found.kl_before, found.kl_after)
        return (chosen, other) if is_closer else (plan, found)

    return attempted(find, processes) or (plan, None)


def attempted(find: Callable[[], T], processes: Processes) -> T | None:
    """What a repair finds if one can be found; else None, with a warning that says why.

    Raises:
        GradNASError: It is not for the repair that it fails: no data, another plan.
    """
    try:
        return find()
    except (RepairError, StructureError) as error:
        said = str(error)
    except GradNASError:
        raise
    except Exception as error:  # whatever it meets, a model that was scored for hours is pruned
        if processes.count > 1:  # the others may be in the midst of it
            raise
        said = f"repair: failed ({described(error)}); report it with the model's class."
    warnings.warn(f"The model is pruned without a repair. {said}", GradNASWarning, stacklevel=2)
    return None


def exchange_weights(model: nn.Module, repair: Repair, undo: ExitStack) -> None:
    """Give a whole model the new weights; `undo` puts the old ones back, unless it forgets them."""
    lend_values(model, repair.tensors, undo, copy=True)


def lend_values(
    model: nn.Module, values: Mapping[str, Tensor], undo: ExitStack, *, copy: bool = False
) -> None:
    """Let a model compute with other values of parameters until undone, read as they are needed."""
    for name in values:
        path, _, leaf = name.rpartition(".")
        make = partial(_value, values, name, copy)
        give(model.get_submodule(path), leaf, make, undo)


def _value(values: Mapping[str, Tensor], name: str, copy: bool, old: Tensor) -> Tensor:
    return values[name].to(old, copy=copy)


@contextmanager
def repaired(
    model: nn.Module, repair: Repair, context: AbstractContextManager[Any] | None = None
) -> Iterator[None]:
    """Run a whole model with the new weights within the block; the old ones are put back.

    Args:
        model: The model, whole.
        repair: The new weights, which stay as they are whatever becomes of the model's.
        context: What else is in force within the block; None: nothing.
    """
    with ExitStack() as undo:
        exchange_weights(model, repair, undo)
        undo.enter_context(context or nullcontext())
        yield


@torch.no_grad()
def install_repair(model: nn.Module, repair: Repair) -> None:
    """Write the new weights into a whole model for good, before it is cut."""
    for name, tensor in repair.tensors.items():
        tensor_at(model, name).copy_(tensor)


def _without_nan(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in data.items()
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        state.update(tensor_bytes(tensor))
    return state.hexdigest()
