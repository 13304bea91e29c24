"""Gradients of the masks, one per example and unit, as a by-product of one backward.

Knows where units are and how to sum ``x·∂L/∂x`` over them; knows nothing of losses and scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..masks import check_place
from ..members import AtMembers, members_in
from ..routing import (
    STACKED_DIMS,
    Chosen,
    Routed,
    chosen_in,
    per_expert,
    reading_neurons,
    rows_of_all,
    with_weights,
)
from ..running.copies import sent
from ..running.hooks import add_hook, add_pre_hook, stream_in, stream_out
from ..running.precision import wide, widest
from ..stacks import WatchProducts
from ..tokens import Following
from ..types import Axis
from .products import Product, has_saving_hooks, keeps_input, multiply, watched
from .rows import Positions, added
from .sites import KeptOutput, Site, check_examples, check_rows, sites_of
from .sums import ProductBuffer


class GradientRecorder:
    """Sums ``g[n, i] = Σ_tokens Σ_{d in unit i} x·∂L/∂x`` wherever the units of an axis are.

    That is the input of every out-projection, or for channels the output of every layer that
    produces them. A module that runs several times in a forward (ALBERT's shared layer), and
    several producers of the same channels, add up before anything is squared. Sums are taken in
    the backward only, so that a forward which gradient checkpointing runs again counts once.

    After `split`, the tokens of each example are summed in rows (see `rows`). Where the positions
    at one place are no sequence of the batch (windows of a picture), each example is one row.
    """

    is_replayed = True
    """Whether the hooks are on in the backward too, where layers may run again."""

    def __init__(self, model: nn.Module, axes: Iterable[Axis]) -> None:
        self._model, self._axes = model, tuple(axes)
        self._sites = sites_of(model, self._axes)
        self._following = {s.runner: Following() for s in self._sites if s.runner is not None}
        self._sums: dict[Site, Tensor] = {}
        self._outputs: dict[int, KeptOutput] = {}
        self._overwritten: set[Site] = set()
        self._checked: dict[Site, torch.Size] = {}  # shapes of the latest examples
        self._is_spoilt = False
        self._positions: Positions | None = None
        self._is_folded = False
        self._buffer = ProductBuffer()
        self._num_examples = 0
        self._calls = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook into the model within the block."""
        with ExitStack() as stack:
            stack.callback(self._forget)
            stacks = {s.module: partial(self._watch_stack, s) for s in self._sites if s.is_stack}
            stack.enter_context(reading_neurons(self._model, stacks))
            for runner, following in self._following.items():
                following.attach(stack, runner)
            for site in self._sites:
                if site.is_stack:
                    continue
                if site.is_of_list:
                    read = partial(self._watch_member, site, len(members_in(site.module)))
                    AtMembers(site.places[0][1], read).attach(stack, site.module)
                elif site.side == "choice":
                    hook = partial(self._watch_choice, site)
                    add_pre_hook(stack, site.module, hook, with_kwargs=True)
                elif site.side == "stack":
                    name = site.path.removeprefix(f"{site.places[0][1].owner}.")
                    watch = WatchProducts(name, partial(self._watch_product, site))
                    watch.attach(stack, site.module)
                elif site.side == "every":
                    add_hook(stack, site.module, partial(self._watch_every, site))
                elif site.side == "input":
                    add_pre_hook(stack, site.module, partial(self._watch, site))
                elif site.side == "bypass":
                    hook = partial(self._watch_layer, site)
                    add_hook(stack, site.module, hook, with_kwargs=True)
                else:
                    add_hook(stack, site.module, partial(self._watch_output, site))
            yield

    def start(self, num_examples: int) -> None:
        """Begin a batch of that many examples."""
        self._forget()
        self._num_examples = num_examples
        self._positions, self._is_folded = None, False

    def split(self, positions: Positions | None) -> None:
        """Sum the batch's tokens in rows, from now on; before its backward begins."""
        self._positions = positions

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the batch so far: ``(examples, size)`` per axis name, float64.

        None as for `rows`.
        """
        found = self.rows()
        return None if found is None else {name: rows.sum(1) for name, rows in found.items()}

    def rows(self) -> dict[str, Tensor] | None:
        """Gradients of the batch so far: ``(examples, rows, size)`` per axis name.

        One row an example, in float64; after `split` several, in float32 unless the model is
        float64, since they may be hundreds of times as many.

        None where the model wrote over an output in place (``nn.ReLU(inplace=True)`` right after a
        convolution) before it could be read: start and run the batch again. Such outputs are known
        from then on, and copied.
        """
        for kept in self._outputs.values():
            self._note(kept)
        if self._is_spoilt:
            return None
        found: dict[str, Tensor] = {}
        for site, sums in self._sums.items():
            for axis, tap in site.places:
                part = site.sums_of(tap, axis.size, sums)
                earlier = found.get(axis.name)
                found[axis.name] = part if earlier is None else added(earlier.clone(), part)
        place = next((x.device for x in found.values()), torch.device("cpu"))
        for axis in self._axes:
            if axis.name not in found:
                size = (self._num_examples, 1, axis.size)
                found[axis.name] = torch.zeros(size, dtype=widest(place), device=place)
        if self._is_folded:
            return {name: wide(rows).sum(1, keepdim=True) for name, rows in found.items()}
        return found

    def _forget(self) -> None:
        self._sums.clear()
        self._outputs.clear()
        self._is_spoilt = False

    def _watch(self, site: Site, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Forward pre-hook: have the gradient of the input ``x`` reported to `_add`."""
        if not torch.is_grad_enabled():
            return None
        x: Tensor = args[0]
        if site.runner is not None:
            return (self._watch_stack(site, x, self._rows_taken(site, x)), *args[1:])
        self._check(site, x)
        kept = partial(self._add_kept, site) if keeps_input(module, x) else None
        return (self._watched(x, partial(self._add, site), kept), *args[1:])

    def _watched(self, x: Tensor, add: Any, add_kept: Any = None) -> Tensor:
        return watched(x, add, is_replayed=self.is_replayed, add_kept=add_kept)

    def _watch_choice(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Forward pre-hook: have the gradient of the experts' weights reported.

        A token's output is ``y = Σ_e w_e·f_e(x)``, so that ``w_e·∂L/∂w_e = ⟨w_e·f_e(x), ∂L/∂y⟩`` is
        the gradient of a mask on what expert e adds; it is 0 where e was not chosen.
        """
        if not torch.is_grad_enabled():
            return None
        (axis, _), *_ = site.places
        chosen = chosen_in(axis, args, kwargs)
        tokens = chosen.weights[..., 0].numel()
        check_rows(site, tokens, self._num_examples)
        w = chosen.weights
        if not w.requires_grad:
            w = w.detach().requires_grad_()
        own = w.view_as(w)
        own.register_hook(partial(self._add_choice, site, chosen, w.detach()))
        return with_weights(chosen, own, args, kwargs)

    def _add_choice(self, site: Site, chosen: Chosen, weights: Tensor, gradient: Tensor) -> None:
        """Tensor hook: add ``w·gradient`` of each chosen expert to the site's sums."""
        (axis, _), *_ = site.places
        values = per_expert(chosen, weights.float() * gradient.float(), axis.size)  # (tokens, E)
        self._add_features(site, values.view(self._num_examples, -1, axis.size))

    def _watch_layer(
        self, site: Site, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Forward hook: have the gradient of what a layer puts out reported.

        A mask on it gives ``m·y + (1 - m)·x``, whose gradient by ``m`` is ``(y - x)·∂L/∂y``.
        """
        if not torch.is_grad_enabled():
            return None
        x, y = stream_in(args, kwargs), stream_out(output)
        check_rows(site, y.shape[0], self._num_examples)
        own = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
        own.register_hook(partial(self._add_layer, site, x.detach(), y.detach()))
        return (own, *output[1:]) if isinstance(output, tuple) else own

    def _add_layer(self, site: Site, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        """Tensor hook: add ``(y - x)·gradient`` to the site's sums."""
        product = self._buffer.like(gradient)
        multiply(y - x, gradient, product)
        # (examples, positions, …, features), or (examples * positions, features)
        values = product.flatten(min(product.ndim - 1, 2)).sum(-1)
        self._add_features(site, values.reshape(self._num_examples, -1, 1))

    def _watch_every(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Forward hook: have the gradient of what all experts put out reported."""
        if not torch.is_grad_enabled():
            return None
        (axis, _), *_ = site.places
        check_rows(site, len(output) // axis.size, self._num_examples)
        return self._watched(output, partial(self._add_every, site))

    def _add_every(self, site: Site, product: Product, gradient: Tensor) -> None:
        """Tensor hook: add ``y·gradient`` of each expert to the site's sums."""
        values = self._buffer.like(gradient)  # (experts · tokens, features)
        product(gradient, values)
        (axis, _), *_ = site.places
        sums = values.view(axis.size, self._num_examples, -1, values.shape[1]).sum(3)
        self._add_features(site, sums.permute(1, 2, 0).contiguous())

    def _watch_product(self, site: Site, weight: Tensor, x: Tensor, number: int | None) -> Tensor:
        """Have the gradient of what a product reads with a parameter ``(…, entries)`` reported."""
        (axis, _), *_ = site.places
        if number is not None:
            whole = len(weight) if weight.ndim == STACKED_DIMS else axis.size // x.shape[-1]
            routed = self._rows_of_one(site, x, number, whole)
        else:
            routed = rows_of_all(weight, x, apart=any(part.each for part in axis.readers))
        return self._watch_stack(site, x, routed)

    def _rows_taken(self, site: Site, x: Tensor) -> Routed:
        """Where rows come from that a module takes out of its input.

        Raises:
            StructureError: They were not followed.
        """
        tokens = None if site.runner is None else self._following[site.runner].tokens
        numbers = None if tokens is None else tokens.of(x)
        if tokens is None or numbers is None:
            axis = site.places[0][0]
            raise StructureError(
                f"{axis.name}: the rows that {site.path} reads were not followed, so that no "
                f'gradient belongs to one example; exclude it with rules={{"{axis.name}": None}}.'
            )
        rows = numbers.flatten()
        return Routed(rows, torch.zeros_like(rows), tokens.count, 1)

    def _watch_stack(self, site: Site, x: Tensor, routed: Routed) -> Tensor:
        """Have the gradient of what chosen experts read ``(…, entries)`` reported."""
        if not torch.is_grad_enabled():
            return x
        check_rows(site, routed.count, self._num_examples)
        return self._watched(x, partial(self._add_stack, site, routed))

    def _add_stack(self, site: Site, routed: Routed, product: Product, gradient: Tensor) -> None:
        """Tensor hook: add ``x·gradient`` to the sums of each row's expert and observation."""
        values = self._buffer.like(gradient)
        product(gradient, values)
        values = site.in_member(values.flatten(0, -2), routed.number)  # (rows, entries)
        places, count = self._observations(site, routed.count)
        tokens, experts = (sent(x, values.device) for x in (routed.tokens, routed.experts))
        rows = sent(places, values.device)[tokens] * routed.number + experts
        sums = values.new_zeros(self._num_examples * count * routed.number, values.shape[1])
        sums.index_add_(0, rows, values)
        self._add_sums(site, sums.view(self._num_examples, count, -1))

    def _watch_member(self, site: Site, count: int, number: int, x: Tensor) -> Tensor:
        """Have ``x·∂L/∂x`` in a module of a list reported; of its output f, ``⟨w·f, ∂L/∂y⟩``."""
        if not torch.is_grad_enabled():
            return x
        routed = self._rows_of_one(site, x, number, count)
        return self._watch_stack(site, x, routed)

    def _rows_of_one(self, site: Site, x: Tensor, number: int, count: int) -> Routed:
        """Where rows come from that one of so many experts takes."""
        routed = self._rows_taken(site, x)
        return replace(routed, experts=torch.full_like(routed.tokens, number), number=count)

    def _observations(self, site: Site, tokens: int) -> tuple[Tensor, int]:
        """Which observation each token belongs to ``(tokens,)``, and how many an example has."""
        examples = self._num_examples
        if self._positions is not None:
            found = self._positions.rows_of(site.module, tokens, examples)
            self._is_folded |= found is None
            if found is not None:
                return found
        return torch.arange(examples).repeat_interleave(tokens // examples), 1

    def _watch_output(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Tensor | None:
        """Forward hook: have the gradient of the output reported to `_add`.

        All readers of an output come after the mask, so that it is hooked itself and kept without
        a copy, which for every output of a ResNet would take a tenth more time and a fifth more
        memory (2 CPU cores). What follows gets a copy only where it writes in place, and where the
        output is the first to need a gradient (torch lets nothing write over a leaf).
        """
        if not torch.is_grad_enabled():
            return None
        if not isinstance(output, Tensor):
            raise StructureError(
                f"{site.places[0][0].name}: {site.path} returned a {type(output).__name__}, but "
                "channels are measured at layers that return one tensor; exclude it with "
                f'rules={{"{site.places[0][0].module}": None}}.'
            )
        self._check(site, output)
        if self.is_replayed and has_saving_hooks():  # what is saved must not be written over
            return self._watched(output, partial(self._add, site)).clone()
        x = output if output.requires_grad else output.detach().requires_grad_()
        self._calls += 1
        is_copied = x is not output or site in self._overwritten
        own = x.clone() if is_copied else x
        if not is_copied:
            self._outputs[self._calls] = KeptOutput(site, x.detach(), x._version)
        own.register_hook(partial(self._add_output, site, self._calls, x.detach()))
        return own if is_copied else None

    def _check(self, site: Site, x: Tensor) -> None:
        """Check that the units are in ``x``, and its rows in the examples of the batch.

        Raises:
            StructureError: They do not.
        """
        if self._checked.get(site) != x.shape[1:]:
            for axis, tap in site.places:
                check_examples(axis, tap, x.shape)
                check_place(axis, tap, x.shape)
            self._checked[site] = x.shape[1:]
        check_rows(site, x.shape[0], self._num_examples)

    def _add_output(self, site: Site, call: int, x: Tensor, gradient: Tensor) -> None:
        """Tensor hook: as `_add`, unless ``x`` was overwritten."""
        if call in self._outputs:
            self._note(self._outputs.pop(call))
        self._add(site, partial(multiply, x), gradient)

    def _add_kept(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Tensor hook: as `_add`, with values at hand."""
        if self._positions is None and len(gradient) == self._num_examples:
            sums = self._buffer.sums(x, gradient, site.dim % gradient.dim())
            self._add_sums(site, sums[:, None])
        else:
            self._add(site, partial(multiply, x), gradient)

    def _add(self, site: Site, multiply_by_x: Product, gradient: Tensor) -> None:
        """Tensor hook: add ``x·gradient``, summed per example and unit, to the site's sums."""
        product = self._buffer.like(gradient)
        multiply_by_x(gradient, product)
        dim = site.dim % gradient.dim()
        if dim < gradient.dim() - 1:
            product = product.flatten(dim + 1).sum(-1)
        rows = self._row_sums(site, product, is_last=dim == gradient.dim() - 1)
        if rows is None:
            features = product.view(self._num_examples, -1, gradient.shape[dim]).sum(1)
            rows = wide(features)[:, None]
        self._add_sums(site, rows)

    def _add_features(self, site: Site, values: Tensor) -> None:
        """Add values ``(examples, positions, units)`` to the site's sums."""
        rows = self._row_sums(site, values, is_last=True)
        self._add_sums(site, wide(values.sum(1))[:, None] if rows is None else rows)

    def _add_sums(self, site: Site, rows: Tensor) -> None:
        sums = rows if site.width == 1 else rows.unflatten(-1, (-1, site.width)).sum(-1)
        earlier = self._sums.get(site)
        self._sums[site] = sums if earlier is None else added(earlier, sums)

    def _row_sums(self, site: Site, product: Tensor, *, is_last: bool) -> Tensor | None:
        """Sums ``(examples, rows, features)``; None: one row an example, here or in all."""
        if self._positions is None:
            return None
        rows = self._positions.sums(site.module, product, self._num_examples) if is_last else None
        self._is_folded |= rows is None
        return rows

    def _note(self, kept: KeptOutput) -> None:
        """Have an output copied from now on, and this batch run again, if it was overwritten."""
        if kept.is_overwritten:
            self._overwritten.add(kept.site)
            self._is_spoilt = True
