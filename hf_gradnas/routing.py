"""What a router chooses for each token, and how experts are excluded from the choice.

Knows how routers and experts of Transformers speak to each other: the experts are given, for each
token, the indices of those that were chosen and their weights. Knows nothing of scores and plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ._compat import implementations
from .errors import StructureError
from .running.hooks import When, add_hook, add_pre_hook, module_at, only_when, tensor_at
from .types import Axis

PRODUCTS = frozenset("linear matmul mm addmm __matmul__ __rmatmul__".split())
SUMS = frozenset("add __add__ __radd__ sub __sub__".split())
EXCLUDED = float("-inf")
STACKED_DIMS = 3
"""Dimensions of a tensor that holds one matrix per expert."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experts that were chosen for each token.

    Attributes:
        indices: ``(tokens, chosen)``, whole numbers.
        weights: ``(tokens, chosen)``, what the experts' outputs are multiplied by.
        place: Position or name of the weights among the arguments.
    """

    indices: Tensor
    weights: Tensor
    place: int | str


def find_chosen(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Chosen | None:
    """Find the choice among the arguments of a module: indices beside weights of their shape."""
    tensors = _tensors(args, kwargs)
    for indices in tensors.values():
        if indices.is_floating_point() or indices.dtype == torch.bool:
            continue
        for place, weights in tensors.items():
            if weights.is_floating_point() and weights.shape == indices.shape:
                return Chosen(indices, weights, place)
    return None


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Tensor]:
    """Tensors among the arguments of a call, by position or name."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {place: value for place, value in given if isinstance(value, Tensor)}


def chosen_in(axis: Axis, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Chosen:
    """Find the choice among the arguments of the module that runs the experts of an axis.

    Raises:
        StructureError: There is none.
    """
    found = find_chosen(args, kwargs)
    if found is not None:
        return found
    shapes = {place: tuple(x.shape) for place, x in _tensors(args, kwargs).items()}
    raise StructureError(
        f"{axis.name}: {axis.taps[0].module} is called with {shapes}, needed are the indices of "
        "the chosen experts and their weights, in one shape; exclude it with "
        f'rules={{"{axis.module}": None}}.'
    )


def with_weights(
    chosen: Chosen, weights: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other weights in their place."""
    if isinstance(chosen.place, str):
        return args, {**kwargs, chosen.place: weights}
    return (*args[: chosen.place], weights, *args[chosen.place + 1 :]), dict(kwargs)


def per_expert(chosen: Chosen, values: Tensor, size: int) -> Tensor:
    """Values ``(tokens, chosen)`` by expert: ``(tokens, size)``, 0 where one was not chosen."""
    flat = chosen.indices.reshape(-1, chosen.indices.shape[-1])
    rows = values.reshape(flat.shape)
    # One entry more: Transformers gives the index `size` to experts of other processes.
    found = rows.new_zeros(len(flat), size + 1)
    return found.scatter_add_(1, flat.long().clamp(max=size), rows)[:, :size]


def follows_interface(module: nn.Module) -> bool:
    """Whether a module's experts run through Transformers' `ExpertsInterface`.

    Its decorator says of each how its stacks are laid out.
    """
    return {"has_gate", "has_bias", "is_transposed", "is_concatenated"} <= vars(module).keys()


Held = Callable[[], Tensor]


class Excluding(TorchFunctionMode):
    """While a block runs, gives excluded experts no chance to be chosen.

    The logits of the router are −∞ at them, and so are sums with a correction that has one entry
    per expert: the tokens go where they would go if those experts were not there.

    Args:
        weight: Gives the router's weight as it is now, since offloaded ones are loaded meanwhile;
            products with it, or with a view or copy of it, are logits.
        logits: Place of each expert among the logits ``(experts,)``.
        corrections: Each gives a vector ``(experts,)`` beside it.
        keep: ``(experts,)``, false where an expert is excluded.
    """

    def __init__(
        self, weight: Held, logits: Sequence[int], corrections: Sequence[Held], keep: Tensor
    ) -> None:
        super().__init__()
        self._keep, self._logits = keep, torch.tensor(logits)
        self._weight, self._given = weight, tuple(corrections)
        # Views and copies, held: the id of a tensor that is gone may come again.
        self._weights: list[Tensor] = []
        self._corrections: list[Tensor] = []
        self._size = weight().numel()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        name = getattr(func, "__name__", "")
        weights = (self._weight(), *self._weights)
        corrections = (*(held() for held in self._given), *self._corrections)
        if any(x is held for x in given for held in weights):
            if name in PRODUCTS:
                kept = torch.ones(out.shape[-1], dtype=torch.bool)
                kept[self._logits] = self._keep
                return self._without(out, kept)
            if out.numel() == self._size and len(given) == 1:
                self._weights.append(out)
        elif any(x is held for x in given for held in corrections):
            if name in SUMS:
                return self._without(out, self._keep)
            if out.numel() == self._keep.numel() and len(given) == 1:
                self._corrections.append(out)
        return out

    def _without(self, out: Tensor, kept: Tensor) -> Tensor:
        if out.shape[-1:] != kept.shape:
            return out
        return out.masked_fill(~kept.to(out.device), EXCLUDED)


@contextmanager
def excluded(
    model: nn.Module,
    axes: Iterable[Axis],
    masks: Mapping[str, Tensor],
    *,
    when: When | None = None,
) -> Iterator[None]:
    """Keep units out of the choice of their router within the block, wherever their mask is 0.

    Args:
        model: The model.
        axes: Axes whose units are chosen by a router.
        masks: ``(size,)`` per axis name.
        when: As in `masked`.

    Raises:
        StructureError: An axis does not fit the model.
    """
    with ExitStack() as stack:
        for axis in axes:
            if bool(masks[axis.name].all()):
                continue
            _Exclude(model, axis, masks[axis.name]).attach(stack, when)
        yield


class _Exclude:
    """Hooks of the block that holds a router, which watch the router while the block runs."""

    def __init__(self, model: nn.Module, axis: Axis, mask: Tensor) -> None:
        self.model, self.axis, self.keep = model, axis, mask.bool()
        self.block = module_at(model, axis, axis.module)
        self._running: list[Excluding] = []

    def attach(self, stack: ExitStack, when: When | None) -> None:
        """Hook into the block until `stack` closes."""
        add_pre_hook(stack, self.block, only_when(self._begin, when))
        add_hook(stack, self.block, self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        (router,) = self.axis.makers
        others = [
            self._held(part.tensor)
            for part in self.axis.slices
            if part.role == "follows" and not part.holder and part.tensor not in self._stacks()
        ]
        weight, logits = self._held(router.tensor), router.rows(range(self.axis.size))
        mode = Excluding(weight, logits, others, self.keep)
        mode.__enter__()
        self._running.append(mode)

    def _held(self, name: str) -> Held:
        """What gives a parameter or buffer as it is at that time."""
        path, _, leaf = name.rpartition(".")
        return partial(getattr, self.model.get_submodule(path), leaf)

    def _stacks(self) -> set[str]:
        """Tensors with more than one entry per expert."""
        own = (part.tensor for part in self.axis.slices if not part.holder)
        held = {name: tensor_at(self.model, name) for name in own}
        return {name for name, tensor in held.items() if tensor.numel() > self.axis.size}

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode = _get_current_function_mode()
        if mode in self._running:  # else another forward waits in the block, and this is not masked
            self._running.remove(mode)
            mode.__exit__(None, None, None)


# --- experts that run one after another, so that what their neurons hold can be seen --------------


@dataclass(frozen=True, slots=True)
class Routed:
    """Where the rows of a module of experts come from.

    Attributes:
        tokens: Number of the token ``(rows,)``.
        experts: Number of the expert ``(rows,)``.
        count: How many tokens there are.
        number: How many experts there are.
    """

    tokens: Tensor
    experts: Tensor
    count: int
    number: int


def rows_of_all(weight: Tensor, x: Tensor, *, apart: bool) -> Routed:
    """Where the rows of values come from that a module reads with a parameter, for all tokens.

    Args:
        weight: A matrix, or one for each expert, every one of which reads all tokens.
        x: ``(…, entries)``; of experts ``(experts, tokens, entries)``.
        apart: Whether every expert has units of its own.
    """
    each = len(weight) if weight.ndim == x.ndim == STACKED_DIMS else 1
    count = x[..., 0].numel() // each
    tokens, numbers = torch.arange(count).repeat(each), torch.arange(each)
    experts = numbers.repeat_interleave(count) if apart else torch.zeros_like(tokens)
    return Routed(tokens, experts, count, each if apart else 1)


Read = Callable[[Tensor, Routed], Tensor]
"""Gets neurons ``(rows, neurons)``, and returns those that the experts' last product reads."""
KERNEL = "hf_gradnas"


@contextmanager
def reading_neurons(model: nn.Module, reads: Mapping[nn.Module, Read]) -> Iterator[None]:
    """Let modules of stacked experts show their neurons, within the block.

    All experts of the model run in our own kernel, which is the one of Transformers for grouped
    products with a loop in their place; its sums differ by rounding.

    Args:
        model: The model.
        reads: Per module what is done with its neurons.
    """
    with own_kernel(model, reads) if reads else nullcontext():
        yield


@contextmanager
def own_kernel(model: nn.Module, reads: Mapping[nn.Module, Read]) -> Iterator[None]:
    """Run stacked experts one after another, within the block, with weights or without.

    Args:
        model: The model.
        reads: Per module what is done with its neurons.
    """

    def run(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        return run_experts(module, hidden_states, top_k_index, top_k_weights, reads.get(module))

    with ExitStack() as stack:
        stack.callback(ALL_EXPERTS_FUNCTIONS.pop, KERNEL)
        ALL_EXPERTS_FUNCTIONS[KERNEL] = run
        stack.enter_context(implementations(model, experts=KERNEL))
        yield


def run_experts(
    module: Any, x: Tensor, indices: Tensor, weights: Tensor, read: Read | None
) -> Tensor:
    """What stacked experts put out for tokens, one expert after another.

    Args:
        module: The experts, of Transformers' `ExpertsInterface`.
        x: ``(tokens, features)``.
        indices: ``(tokens, chosen)``; those from the number of experts on are left out.
        weights: ``(tokens, chosen)``.
        read: What is done with the neurons; None: nothing.

    Returns:
        ``(tokens, features)``.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if x.is_meta:  # nobody knows what is chosen: all by the first, which costs as much
        indices, up, down = torch.zeros(indices.shape, dtype=torch.long), up[:1], down[:1]
    order = indices.reshape(-1).argsort(stable=True)  # (tokens · chosen,), by expert
    experts = indices.reshape(-1)[order]
    numbers = torch.arange(len(up) + 1, dtype=experts.dtype, device=experts.device)
    ends = torch.searchsorted(experts, numbers).tolist()  # all that the host waits for
    counts = [end - start for start, end in pairwise(ends)]
    order, experts = order[: ends[-1]], experts[: ends[-1]]
    tokens = order // indices.shape[-1]  # (rows,)
    rows = _products(module, x[tokens], up, counts)  # (rows, neurons), twice with gates
    if module.has_bias:
        rows = rows + getattr(module, f"{name}_bias")[experts]
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    if read is not None:
        rows = read(rows, Routed(tokens, experts, len(x), len(up)))
    rows = _products(module, rows, down, counts)  # (rows, features)
    if module.has_bias:
        rows = rows + module.down_proj_bias[experts]
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    rows = rows * weights.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, tokens.to(x.device), rows.to(x.dtype))


def _products(module: Any, x: Tensor, stack: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of each expert, of which there are so many, times its matrix."""
    matrices = stack if module.is_transposed else stack.transpose(1, 2)  # (experts, in, out)
    parts = x.split(list(counts))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
