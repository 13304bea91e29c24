"""Prove for the channels of convolutions that cutting the whole model equals masking it.

Channels are tied across modules, so a copy of the whole model runs in float64, once with masks and
once cut, for an irregular choice of all channels at once. Only when the two differ, axes are cut
one by one to find out which are at fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import attention_implementation
from ..errors import described
from ..masks import masked
from ..structure.channels import discover_channels
from ..structure.probe import double_call, double_copy
from ..structure.trace import Call
from ..surgery import cut
from ..types import Axis, Refusal
from .modules import EFFECT, NO_EFFECT, NOT_RUNNING, RETRY_SCALES, ROUNDING, TOLERANCE

KERNEL = "eager"
TINY = torch.finfo(torch.float64).tiny


def find_channels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    taken: Sequence[Axis] = (),
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Discover the channels of the convolutions of `model` and keep those that are proved.

    Args:
        model: On a device with float64, in any dtype; it is left as it was.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        taken: Axes that are proved already, whose tensors are not cut in the same way again.
    """
    axes, refusals = discover_channels(model, args, kwargs, taken=taken)
    good, bad = prove_channels(model, axes, args, kwargs)
    return good, (*refusals, *bad)


def prove_channels(
    model: nn.Module,
    axes: Sequence[Axis],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    tables: Mapping[str, Tensor] | None = None,
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Axes that are proved together, and the others with the reason.

    One copy of the model in float64 is alive at a time.

    Args:
        model: The whole model, on a device with float64, in any dtype; it is left as it was.
        axes: Axes of channels.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        tables: Shared tables by name (see `surgery.cut`).
    """
    if not axes:
        return (), ()
    trial = _Trial(model, Call(args, kwargs, ()), _irregular(axes), tables)
    with attention_implementation(model, KERNEL):
        reasons = trial.without_effect(axes)
        live = [axis for axis in axes if axis.name not in reasons]
        if live and trial.disproof(live):
            reasons |= _guilty(trial, live)
    good = tuple(axis for axis in axes if axis.name not in reasons)
    bad = [axis for axis in axes if axis.name in reasons]
    return good, tuple(Refusal(a.module, str(a.kind), reasons[a.name]) for a in bad)


def _irregular(axes: Sequence[Axis]) -> dict[str, list[int]]:
    """Half of the units of every axis or fewer: another number and another choice for each.

    Axes that must keep equal counts would look independent if all kept the same share. Few units
    are kept, as some of those that go may be dead.
    """
    kept = {}
    for index, axis in enumerate(axes):
        fewest = max(axis.size // 8, axis.minimum, 1)
        most = max(axis.size // 2, fewest)
        count = fewest + (most - fewest + index) % (most - fewest + 1)
        order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(index))
        kept[axis.name] = sorted(order[:count].tolist())
    return kept


def _guilty(trial: _Trial, axes: Sequence[Axis]) -> dict[str, str]:
    """Reason for each axis that fails alone, or beside those before it."""
    alone = {axis.name: trial.disproof([axis]) for axis in axes}
    reasons = {name: reason for name, reason in alone.items() if reason}
    good = [axis for axis in axes if axis.name not in reasons]
    if reasons and not (good and trial.disproof(good)):
        return reasons
    together = good[:1]
    for axis in good[1:]:
        reason = trial.disproof([*together, axis])
        if reason:
            reasons[axis.name] = f"beside the channels before it, {reason}"
        else:
            together.append(axis)
    return reasons


@dataclass(frozen=True)
class _Trial:
    """A model, its arguments, and the units that stay of each axis."""

    model: nn.Module
    call: Call
    kept: Mapping[str, Sequence[int]]
    tables: Mapping[str, Tensor] | None

    @torch.no_grad()
    def without_effect(self, axes: Sequence[Axis]) -> dict[str, str]:
        """Reason for each axis whose mask runs not, or changes nothing in the model's output."""
        try:
            twin, call = double_copy(self.model), double_call(self.call)
            whole = _run(twin, call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own code may raise anything
            return dict.fromkeys(self.kept, f"in float64 {_not_running(error)}")
        reasons = {}
        for axis in axes:
            units = self.kept[axis.name]
            try:
                with masked(twin, [axis], {axis.name: units}):
                    effect = _difference(_run(twin, call), whole, whole)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reasons[axis.name] = f"masked down to {_counts(axis, units)} {_not_running(error)}"
            else:
                if not effect > EFFECT:
                    reasons[axis.name] = f"masking down to {_counts(axis, units)} {NO_EFFECT}"
        return reasons

    def disproof(self, axes: Sequence[Axis]) -> str:
        """Why masking and cutting all the axes differ; "" when they agree.

        The input is scaled anew while rounding to float32 inside the model may be at fault.
        """
        units = _counts(axes[-1], self.kept[axes[-1].name])
        difference = 0.0
        for scale in RETRY_SCALES:
            try:
                difference = self._masked_against_cut(axes, scale)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return f"cut to {units} {_not_running(error)}"
            if not TOLERANCE < difference < ROUNDING:
                break
        if difference <= TOLERANCE:
            return ""
        return (
            f"cut to {units} it differs from masked by {difference:.1e} "
            f"({KERNEL}, relative, float64)"
        )

    @torch.no_grad()
    def _masked_against_cut(self, axes: Sequence[Axis], scale: float) -> float:
        """Difference of all outputs between masked and cut, relative to the largest value."""
        kept = {axis.name: self.kept[axis.name] for axis in axes}
        twin, call = double_copy(self.model), double_call(self.call, scale=scale)
        whole = _run(twin, call)
        with masked(twin, axes, kept):
            reference = _run(twin, call)
        cut(twin, axes, kept, tables=self.tables)
        return _difference(_run(twin, call), reference, whole)


def _counts(axis: Axis, units: Sequence[int]) -> str:
    return f"{len(units)} {axis.kind}"


def _not_running(error: Exception) -> str:
    return f"{NOT_RUNNING} ({described(error)})"


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    return list(_floating(model(*call.args, **call.kwargs)))


def _floating(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested tuples, mappings and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _floating(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _floating(getattr(output, field.name))


def _difference(
    result: Sequence[Tensor], reference: Sequence[Tensor], whole: Sequence[Tensor]
) -> float:
    """Largest difference of any two tensors, relative to the largest finite value in `whole`."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (result, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the model puts out tensors of {shapes[0]}, needed {shapes[1]}")
    differences = [torch.zeros((), dtype=torch.float64)]
    for new, old, full in zip(result, reference, whole, strict=True):
        if new.numel():
            finite = full[full.isfinite()].abs()
            scale = max(float(finite.max()) if finite.numel() else 1.0, TINY)
            # Equal infinities do not differ; a nan does, and stays the largest of all.
            apart = (new - old).abs().where(new != old, torch.zeros_like(new))
            differences.append(apart.max().double().cpu() / scale)
    return float(torch.stack(differences).max())
