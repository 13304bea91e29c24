"""Masks on the units of a model: multiply the values of every unit by zeros and ones.

Knows where a unit is among the activations (`Axis.taps`), and how its kind is masked
(`KindRow.mask`): experts are excluded before the router chooses (`routing`), layers are bypassed.
Knows nothing of scores and plans. A mask at 1 changes no bit, and its gradient is ``∂L/∂m_i =
Σ_tokens Σ_{d in unit i} x·∂L/∂x`` over all these places, or for a layer from x to y, ``Σ (y -
x)·∂L/∂y``.

Norms between the producers and consumers of channels add a bias to zeros, and their statistics may
span channels. So `masked` gives them the result that the norm has once it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from .errors import PlanError, StructureError
from .members import times_mask
from .routing import chosen_in, excluded, with_weights
from .running.hooks import When, add_hook, add_pre_hook, module_at, only_when, stream_in
from .running.lending import value_of
from .stacks import MultiplyStack
from .surgery.rows import Kept, cut_part, gone_layers, lost_units
from .types import KINDS, Axis, Mask, Tap, is_integer


def out_projection(model: nn.Module, axis: Axis) -> nn.Module:
    """Return the module at which the units of an axis are first: that of its first tap.

    Raises:
        StructureError: The model has no module of that path.
    """
    return module_at(model, axis, axis.taps[0].owner)


def check_place(axis: Axis, tap: Tap, shape: Sequence[int]) -> None:
    """Check that a tensor of that shape holds the units of an axis, and nothing else if it is read.

    Raises:
        StructureError: It has fewer entries; or more, where the units begin the input of a layer
            without a gap, so that the layer reads nothing but them.
    """
    dim = tap.dim + len(shape) if tap.dim < 0 else tap.dim
    entries = shape[dim] if 0 <= dim < len(shape) else 0
    needed = tap.end(axis.size)
    is_all = tap.side == "input" and tap.offset == 0 and tap.stride == tap.width
    is_all = is_all and [t for t in axis.taps if t.module == tap.module] == [tap]
    if entries < needed or (is_all and entries != needed):
        raise StructureError(
            f"{axis.name}: the {tap.side} of {tap.module} holds {entries} values in dimension "
            f"{tap.dim}, but the axis has {axis.size} units of {tap.width} that reach to {needed}; "
            "discover the structure of this model again."
        )


@contextmanager
def masked(
    model: nn.Module, axes: Iterable[Axis], kept: Kept, *, when: When | None = None
) -> Iterator[None]:
    """Run a model as if only the kept units were there, without cutting it.

    Encloses forward and backward; the hooks go when the block ends, also by an exception.

    Args:
        model: The model; no parameter of it changes.
        axes: Axes to mask. A removed KV group takes its heads along, since it spans their values.
        kept: Indices of the units that stay, per axis name; an axis that is not named keeps all.
        when: Asked at every call of a masked module: whether to mask it now; None: always.

    Raises:
        PlanError: `kept` names an unknown axis or unit.
        StructureError: An axis does not fit the model.
    """
    by_name = {axis.name: axis for axis in axes}
    masks = {name: _mask_of(by_name, name, units) for name, units in kept.items()}
    gone = gone_layers(by_name.values(), kept)  # what is in them has no effect
    masking = [by_name[name] for name in masks if by_name[name].within not in gone]
    by_mask: dict[Mask, list[Axis]] = {"multiply": [], "exclude": [], "bypass": []}
    for axis in masking:
        by_mask[KINDS[axis.kind].mask].append(axis)
    with (
        multiplied(model, by_mask["multiply"], masks, when=when),
        excluded(model, by_mask["exclude"], masks, when=when),
        bypassed(model, by_mask["bypass"], masks, when=when),
        _normed(model, masking, masks, kept, when=when),
    ):
        yield


@contextmanager
def mask_leaves(model: nn.Module, axes: Iterable[Axis]) -> Iterator[dict[str, Tensor]]:
    """Put a differentiable mask of ones on every axis, for gradual pruning and for tests.

    Args:
        model: The model; the leaves take the dtype and device of its out-projections.
        axes: Axes to mask.

    Yields:
        One leaf ``(size,)`` per axis name, with ``requires_grad``; change it under ``no_grad``.

    Raises:
        StructureError: An axis does not fit the model.
    """
    axes = list(axes)
    leaves = {axis.name: _ones_for(out_projection(model, axis), axis.size) for axis in axes}
    layers = [axis for axis in axes if axis.is_layer]
    others = [axis for axis in axes if not axis.is_layer]
    with multiplied(model, others, leaves), bypassed(model, layers, leaves):
        yield leaves


def _ones_for(module: nn.Module, size: int) -> Tensor:
    """Ones in the dtype and on the device of a module's first floating-point parameter."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.ones(size, dtype=like.dtype, device=like.device, requires_grad=True)


def _mask_of(axes: Mapping[str, Axis], name: str, units: Sequence[int]) -> Tensor:
    """Mask ``(size,)`` of zeros, with ones at the kept units."""
    if name not in axes:
        raise PlanError(
            f"{name}: not an axis of this model (it has {len(axes)}, e.g. "
            f"{next(iter(axes), 'none')!r}); make the plan from this model's structure."
        )
    size = axes[name].size
    wrong = [unit for unit in units if not is_integer(unit) or not 0 <= unit < size]
    if wrong:
        raise PlanError(
            f"{name}: unit {wrong[0]!r} does not exist, the axis has {size} units (0 to "
            f"{size - 1}); make the plan from this model's structure."
        )
    mask = torch.zeros(size)
    mask[list(units)] = 1.0
    return mask


@contextmanager
def multiplied(
    model: nn.Module,
    axes: Iterable[Axis],
    masks: Mapping[str, Tensor],
    *,
    when: When | None = None,
) -> Iterator[None]:
    """Multiply the units of every axis by its mask, wherever they are, within the block.

    Args:
        model: The model.
        axes: Axes to mask.
        masks: ``(size,)`` per axis name; gradients reach those that require them.
        when: As in `masked`.

    Raises:
        StructureError: An axis does not fit the model.
    """
    with ExitStack() as stack:
        for axis in axes:
            for (path, side, _), taps in _by_place(axis.taps).items():
                module = module_at(model, axis, taps[0].owner)
                operation = _Multiply(axis, taps, masks[axis.name])
                if side in ("inputs", "outputs"):
                    times_mask(taps[0], masks[axis.name], module).attach(stack, module, when)
                elif side == "stack":
                    MultiplyStack(axis, path, masks[axis.name]).attach(stack, module, when)
                elif side == "choice":
                    hook = only_when(operation.on_choice, when)
                    add_pre_hook(stack, module, hook, with_kwargs=True)
                elif side == "every":
                    add_hook(stack, module, only_when(operation.on_every, when))
                elif side == "input":
                    add_pre_hook(stack, module, only_when(operation.on_input, when))
                else:
                    add_hook(stack, module, only_when(operation.on_output, when))
        yield


@contextmanager
def bypassed(
    model: nn.Module,
    axes: Iterable[Axis],
    masks: Mapping[str, Tensor],
    *,
    when: When | None = None,
) -> Iterator[None]:
    """Let layers put out ``m·y + (1 - m)·x`` within the block: all they add is masked.

    Args:
        model: The model.
        axes: Axes of one layer each.
        masks: ``(1,)`` per axis name; gradients reach those that require them.
        when: As in `masked`.

    Raises:
        StructureError: An axis does not fit the model.
    """
    with ExitStack() as stack:
        for axis in axes:
            layer = module_at(model, axis, axis.taps[0].module)
            hook = only_when(_Bypass(masks[axis.name]), when)
            add_hook(stack, layer, hook, with_kwargs=True)
        yield


class _Bypass:
    """Hook that mixes what a layer puts out ``y`` with what it was given ``x``.

    Args:
        mask: ``m``, of one entry.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        x = stream_in(args, kwargs)
        if not isinstance(output, tuple):
            return self._mixed(x, output)
        # A second stream beside the first (XLNet) has its place among the arguments, too.
        pairs = zip_longest([x, *args[1 : len(output)]], output)
        return tuple(self._mixed(a, b) if _are_streams(a, b, x) else b for a, b in pairs)

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        mask = self.mask.to(device=y.device, dtype=y.dtype)
        if mask.requires_grad or 0 < mask < 1:
            return mask * y + (1 - mask) * x
        return y if mask else x  # no NaN of a layer that is gone


def _are_streams(before: Any, after: Any, first: Tensor) -> bool:
    """Whether two values are a stream before and after a layer, of the kind of the first one."""
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    is_kept = before.shape == after.shape and before.is_floating_point()
    return is_kept and (before.ndim, before.shape[-1]) == (first.ndim, first.shape[-1])


def _by_place(taps: Iterable[Tap]) -> dict[tuple[str, str, int], list[Tap]]:
    """Taps that are entries of one dimension of one tensor, together."""
    places: dict[tuple[str, str, int], list[Tap]] = {}
    for tap in taps:
        places.setdefault((tap.module, tap.side, tap.dim), []).append(tap)
    return places


@contextmanager
def _normed(
    model: nn.Module,
    axes: Sequence[Axis],
    masks: Mapping[str, Tensor],
    kept: Kept,
    *,
    when: When | None,
) -> Iterator[None]:
    """Let the norms of the axes run as if cut to the kept units within the block."""
    losing = [axis for axis in axes if lost_units(axis, kept)]
    sharing: dict[tuple[str, int], list[tuple[Axis, list[Tap]]]] = {}
    for axis in losing:
        for (path, _, dim), taps in _by_place(axis.norms).items():
            sharing.setdefault((path, dim), []).append((axis, taps))
    with ExitStack() as stack:
        for (path, dim), owners in sharing.items():
            norm = module_at(model, owners[0][0], path)
            if isinstance(norm, _NormBase):  # each channel has statistics of its own
                for axis, taps in owners:
                    entries = _Multiply(axis, taps, masks[axis.name])
                    add_hook(stack, norm, only_when(entries.on_output, when))
            else:
                part = _CutNorm(model, path, dim, owners, kept)
                add_hook(stack, norm, only_when(part, when), with_kwargs=True)
        yield


class _Multiply:
    """Hooks that multiply a module's input or output by a mask ``(size,)``, all else by 1.

    Args:
        axis: The axis.
        taps: Where its units are among the entries of one dimension.
        mask: The mask of its units.
    """

    def __init__(self, axis: Axis, taps: Sequence[Tap], mask: Tensor) -> None:
        self.axis, self.taps, self.mask = axis, taps, mask
        self._owners = torch.empty(0, dtype=torch.long)

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._times_mask(args[0]), *args[1:])

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._times_mask(output)

    def on_choice(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        chosen = chosen_in(self.axis, args, kwargs)
        mask = self.mask.to(device=chosen.weights.device, dtype=chosen.weights.dtype)
        # One entry more: Transformers gives the index `size` to experts of other processes.
        factors = torch.cat([mask, mask.new_ones(1)])[chosen.indices.long()]
        return with_weights(chosen, chosen.weights * factors, args, kwargs)

    def on_every(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        mask = self.mask.to(device=output.device, dtype=output.dtype)
        return output * mask.repeat_interleave(len(output) // len(mask))[:, None]

    def _times_mask(self, x: Tensor) -> Tensor:
        for tap in self.taps:
            check_place(self.axis, tap, x.shape)
        dim = self.taps[0].dim
        mask = self.mask.to(device=x.device, dtype=x.dtype)
        shape = [1] * x.ndim
        shape[dim] = x.shape[dim]
        if self._is_in_order(x.shape[dim]):
            return x * mask.repeat_interleave(self.taps[0].width).view(shape)
        factors = torch.cat([mask, mask.new_ones(1)])[self._owners_of(x.shape[dim], x.device)]
        return x * factors.view(shape)

    def _is_in_order(self, entries: int) -> bool:
        """Whether the entries are those of the units one after another, and no others."""
        tap = self.taps[0]
        is_dense = (tap.offset, tap.stride) == (0, tap.width)
        return len(self.taps) == 1 and is_dense and tap.end(self.axis.size) == entries

    def _owners_of(self, entries: int, device: torch.device) -> Tensor:
        """Unit ``(entries,)`` of every entry; the number of units where it belongs to none."""
        if self._owners.numel() != entries or self._owners.device != device:
            owners = torch.full((entries,), self.axis.size)
            for tap in self.taps:
                units = torch.arange(self.axis.size).repeat_interleave(tap.width)
                owners[tap.rows(range(self.axis.size))] = units
            self._owners = owners.to(device)
        return self._owners


class _CutNorm:
    """Forward hook that gives a norm the result of one that is cut to the kept units.

    The cut norm sees the kept entries of the input, and the norm's own values: gradients reach
    them. All other entries of the result are 0.

    Args:
        model: The model.
        path: Path of the norm.
        dim: Dimension of its input and output in which the units are.
        owners: Axes that lose units, with the places of their units there.
        kept: Kept units per axis name.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        dim: int,
        owners: Sequence[tuple[Axis, Sequence[Tap]]],
        kept: Kept,
    ) -> None:
        self.dim = dim
        self.part, self.rows = cut_part(model, path, [axis for axis, _ in owners], kept)
        self.lost = {
            row for axis, taps in owners for tap in taps for row in tap.rows(lost_units(axis, kept))
        }

    def __call__(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        entries = [entry for entry in range(output.shape[self.dim]) if entry not in self.lost]
        if not entries:
            return torch.zeros_like(output)
        index = torch.tensor(entries, device=output.device)
        x = args[0].index_select(self.dim, index)
        self.part.train(norm.training)
        result = functional_call(self.part, self._values(norm), (x, *args[1:]), dict(kwargs))
        zeros = torch.zeros_like(output)
        return zeros.index_copy(self.dim, index, result.to(output.dtype))

    def _values(self, norm: nn.Module) -> dict[str, Tensor]:
        """The norm's parameters and buffers as they are now, the kept rows of them."""
        values: dict[str, Tensor] = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
        for name in [name for name, tensor in values.items() if tensor.is_meta]:
            path, _, leaf = name.rpartition(".")
            values[name] = value_of(norm.get_submodule(path), leaf)
        for name, dims in self.rows.items():
            for dim, rows in dims.items():
                index = torch.tensor(rows, device=values[name].device)
                values[name] = values[name].index_select(dim, index)
        return values
