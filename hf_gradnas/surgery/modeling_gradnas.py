"""Gives stock Transformers models the shapes of a pruned checkpoint, layer by layer.

hf_gradnas imports this file, and every per-layer checkpoint carries a verbatim copy of it, which
``trust_remote_code=True`` runs where hf_gradnas is not installed. It therefore imports the standard
library, torch and transformers only, and stays one file however long it gets.

All it knows of a model is the *record* under the key ``gradnas`` of its config::

    {"format_version": 1, "architecture": "LlamaForCausalLM",  # the class of all module paths
     "modules": {                                # tensor shapes, integer attributes, and values
       "model.layers.0.self_attn.q_proj": {"weight": [192, 256]},      # read from `config` at
       "model.layers.0.self_attn": {"num_key_value_groups": 2,         # run time
                                    "config": {"num_attention_heads": 3}}},
     "removed": {                                # attentions that lost every unit, and layers
       "model.layers.2.self_attn": {"projection": "o_proj", "features": 256,
                                    "returns": ["output", null], "cross": false}},
     "own_position_bias": {                      # T5: layers that do not take the bias of the
       "decoder.block.1.layer.0.SelfAttention": [32, 5],      # layer before, with their table
       "decoder.block.1.layer.1.EncDecAttention": []},        # [buckets, heads] if they have one
     "adapted": {                                # calls with sizes of all heads: in arguments, or
       "transformer.h.0.self_attention": {"arguments": ["alibi"],      # written into shapes
                                          "units": [4, [0, 2, 3]], "width": [64, 48]}},
     "lists": {"encoder.block.1.layer.1.mlp.experts": ["expert_6", "expert_7"]},  # what is gone
     "native": {"text_config": {"2": {"head_dim": 8}}}}       # per_layer_config before the cut
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import threading
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

FORMAT_VERSION = 1
SECTIONS = ("modules", "removed", "own_position_bias", "adapted", "lists")
NEEDS = "widths differ by layer: import hf_gradnas, or pass trust_remote_code=True to an Auto class"
SAME_VERSION = "load it with the Transformers version that the checkpoint was saved with."

Record = Mapping[str, Any]
Rows = Mapping[str, Mapping[int, list[int]]]
Tensors = Mapping[str, torch.Tensor]
Modules = Mapping[str, Any]  # what a path leads to: modules with attributes of any kind
Shape = tuple[int, ...]
Wanted = Mapping[tuple[str, str], Shape]  # shape per module's path and tensor's name

# A table (buckets, heads) whose bias others take as `argument`; `flag` says who computes it.
SharedTable = namedtuple("SharedTable", "flag table argument")
# T5 and its kin: layer 0 computes the position bias for all of its stack.
T5 = SharedTable("has_relative_attention_bias", "relative_attention_bias", "position_bias")
SHARED_TABLES = (T5,)

# Attributes by which an attention, or one in a layer, knows its place in the cache.
INDICES = ("layer_idx", "layer_id")

# Attributes in which a generic module repeats a dimension of its weight (convolutions: `_sync`).
SIZES: tuple[tuple[type[nn.Module], Mapping[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (Conv1D, {"nx": 0, "nf": 1}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (_NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (nn.PReLU, {"num_parameters": 0}),
)


class RecordError(ValueError):
    """A record that this file cannot read, or that does not fit the model."""


# --- modules that stand in for others -------------------------------------------------------------


class RemovedAttention(nn.Module):
    """Stands where an attention lost every unit, or a layer is gone; keeps the cache's length.

    Args:
        replaced: The attention; its numbers, strings and flags (`layer_idx` among them) are kept.
        projection: Out-projection in `replaced`, whose bias stays a parameter; None: it is outside.
        features: Width of the output; 0 for an empty context that an outer projection reads.
        returns: Per element of the output tuple ``"output"``, an argument's name or None; empty: no
            tuple.
        cross: Whether it is a cross-attention, which keeps no length in the cache.
        norm: Name of a norm in `replaced` that takes the sum of input and output (ALBERT).
        passes: Whether it hands on what comes in, as the output.
    """

    def __init__(
        self,
        replaced: nn.Module,
        *,
        projection: str | None,
        features: int,
        returns: list[str | None],
        cross: bool,
        norm: str | None = None,
        passes: bool = False,
    ) -> None:
        super().__init__()
        indices = (vars(m).get(name) for m in replaced.modules() for name in INDICES)
        self.layer_idx = next((index for index in indices if isinstance(index, int)), None)
        for name, value in vars(replaced).items():
            if not name.startswith("_") and isinstance(value, int | float | str | None):
                setattr(self, name, value)
        # Underscores keep clear of the names that the parts have in `replaced`.
        self._features, self._returns, self._cross = features, tuple(returns), cross
        self._norm, self._projection, self._passes = norm, None, passes
        self._arguments = list(inspect.signature(type(replaced).forward).parameters)[1:]
        if norm is not None:
            self.add_module(norm, replaced.get_submodule(norm))
        if projection is not None and replaced.get_submodule(projection).bias is not None:
            self._projection = projection
            part: nn.Module = _without_input(replaced.get_submodule(projection))
            first, *inner = projection.split(".")
            for name in reversed(inner):
                part = nn.ModuleDict({name: part})
            self.add_module(first, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the bias, as wide as the out-projection, in the structure of the original."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache) and not self._cross:
                self._grow(value, hidden_states)
        output = hidden_states if self._passes else _zeros(hidden_states, self._features)
        if self._projection is not None:
            bias = cast(torch.Tensor, self.get_submodule(self._projection).bias)
            output = output + bias.to(output.dtype)
        if self._norm is not None:
            output = self.get_submodule(self._norm)(hidden_states + output)
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs, "output": output}
        return tuple(given.get(str(entry)) for entry in self._returns) if self._returns else output

    def _grow(self, cache: Cache, hidden_states: torch.Tensor) -> None:
        """Write keys and values of width 1: masks and positions ask this layer for its length."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if (index := self.layer_idx) is None:  # in an encoder
            return
        batch, length = hidden_states.shape[-3:-1]
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if (state := getattr(layer, "has_previous_state", None)) is not None:  # linear: no length
            layer.has_previous_state = dict.fromkeys(state, True) if type(state) is dict else True
        if layer is not None and (not hasattr(layer, "keys") or _is_like(layer, DummyLayer)):
            return
        held = [] if layer is None else [x for x in (layer.keys, layer.values) if x is not None]
        sizes = [(x.shape[1], x.shape[3]) for x in held if x.ndim > 1]  # allocated ahead of time
        stubs = [hidden_states.new_zeros(batch, h, length, w) for h, w in sizes or [(1, 1)] * 2]
        cache.update(*stubs, index)


def _zeros(x: torch.Tensor, features: int) -> torch.Tensor:
    """Zeros of another width that depend on `x`: DDP waits for a gradient of all that led to it."""
    return x.new_zeros(*x.shape[:-1], features) + x[..., :0].sum(-1, keepdim=True)


class _EmptyConv1D(Conv1D):
    """Returns its bias: a `Conv1D` without inputs fails in ``x.view(-1, 0)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _zeros(x, self.nf) + self.bias


class _LayerConfig:
    """A live view of a config with a few values of one layer's own.

    A copy would not follow ``set_attn_implementation``: its kernel would silently lose the mask.
    """

    def __init__(self, base: PreTrainedConfig, values: Mapping[str, Any]) -> None:
        names = base.attribute_map
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_values", {names.get(k, k): v for k, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stored = self._base.attribute_map.get(name, name)
        return self._values[stored] if stored in self._values else getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._base, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _LayerConfig, (self._base, dict(self._values))


def _forget_position_bias(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a layer with a table of its own compute its own position bias."""
    row = table_of(module)
    return args, kwargs if row is None else {**kwargs, row.argument: None}


def table_of(module: Any) -> SharedTable | None:
    """The row of `SHARED_TABLES` whose bias an attention takes as an argument; None otherwise."""
    given = inspect.signature(type(module).forward).parameters
    rows = (row for row in SHARED_TABLES if row.flag in vars(module) and row.argument in given)
    return next(rows, None)


class _Adapter(TorchFunctionMode):
    """Hooks for calls: arguments ``(…, units, queries, keys)`` and shapes of the `units` left."""

    def __init__(self, arguments: list[str], units: list[Any], width: list[int]) -> None:
        super().__init__()
        self.arguments, self.units, self.width = arguments, units, width
        self._given: dict[int, torch.Tensor] = {}

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        size, kept = self.units
        for name in self.arguments:
            x = call.arguments.get(name)
            if isinstance(x, torch.Tensor) and x.shape[-3:-2].numel() % size == 0:
                index = torch.tensor(kept, device=x.device)
                folded = x.unflatten(-3, (-1, size))  # units alone, or those of every example
                call.arguments[name] = left = folded.index_select(-3, index).flatten(-4, -3)
                self._given[id(left)] = x
        if self.width:
            self.__enter__()
        return call.args[1:], call.kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)
        given, self._given = self._given, {}  # what is handed on to other modules stays whole
        return tuple(given.get(id(x), x) for x in output) if type(output) is tuple else output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reshape to as many entries as there are; one size of all units is reduced."""
        if func in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape) and len(args) > 1:
            x, sizes = args[0], list(args[1] if isinstance(args[1], tuple | list) else args[1:])
            entries = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 0
            if entries and [*sizes[-1:], *x.shape[-1:]] == self.width:
                args = (x, [*sizes[:-1], self.width[1]])
            elif entries > x.numel():  # it is negative where one size is free
                place = max(range(len(sizes)), key=lambda p: (sizes[p] == self.width[0], p))
                sizes[place] = sizes[place] * x.numel() // entries
                args = (x, sizes)
        return func(*args, **(kwargs or {}))


def adapters_of(module: nn.Module) -> list[Any]:
    """What brings the calls of a module to fewer units."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if _is_like(owner, _Adapter)]


# --- resizing -------------------------------------------------------------------------------------


def resize(
    model: nn.Module,
    record: Record,
    *,
    rows: Rows | None = None,
    new_tensors: Tensors | None = None,
    members: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Bring a model to the record's shapes, in place, after checking everything.

    Tensors (parameters and buffers) keep dtype, device, ``requires_grad`` and ties. Parameters that
    end up empty become buffers outside the state dict. A second call changes nothing.

    Args:
        model: The model; of another class than the record's architecture, paths are translated.
        record: What the config keeps under ``gradnas``.
        rows: Rows to keep per full tensor name and dimension (a cut); None: the first ones.
        new_tensors: For a cut, values of position bias tables that a layer comes to own.
        members: For a cut, the name that a module in a list had, by the name that it takes.

    Raises:
        RecordError: The record is of a newer format or does not fit; the model is unchanged.
    """
    record = translated(checked(record), model)
    whole: Modules = dict(model.named_modules(remove_duplicate=False))
    lists, modules = _shorter_lists(whole, record, members or {})
    wanted = _wanted_shapes(modules, record, rows, new_tensors or {})
    _check_shapes(wanted, modules, record, rows)
    _check_removals(modules, record)
    for path, left in lists.items():
        whole[path]._modules, whole[path]._gradnas_gone = left, record["lists"][path]
    _set_attributes(modules, record)  # first: the channels of a convolution follow its groups
    _slice(model, modules, wanted, rows)
    _own_position_biases(modules, record, new_tensors or {})
    for path, spec in record["adapted"].items():
        if rows is not None or not adapters_of(modules[path]):
            adapter = _Adapter(**spec)
            modules[path].register_forward_pre_hook(adapter.enter, with_kwargs=True)
            modules[path].register_forward_hook(adapter.leave, always_call=True, prepend=True)
    for path, spec in record["removed"].items():
        if not _is_like(modules[path], RemovedAttention):
            old, new = modules[path], RemovedAttention(modules[path], **spec)
            for parent in list(model.modules()):
                parent._modules.update({n: new for n, m in parent._modules.items() if m is old})


def checked(record: Record) -> Record:
    """The record with every section present; refuse one of a newer format."""
    if (version := record.get("format_version")) != FORMAT_VERSION:
        raise RecordError(
            f"config.gradnas: format_version is {version!r}, but this file reads {FORMAT_VERSION}; "
            "upgrade hf_gradnas, or load with the modeling_gradnas.py that came with the weights."
        )
    full = {**{name: {} for name in SECTIONS}, **record}
    is_whole = isinstance(full.get("architecture"), str)
    if not is_whole or not all(isinstance(full[name], Mapping) for name in SECTIONS):
        raise _changed("the record", full)
    for name in SECTIONS:
        for path, entry in full[name].items():
            is_table, kind = name == "own_position_bias", list if name == "lists" else Mapping
            if not (_is_shape(entry) if is_table else isinstance(entry, kind)):
                raise _changed(path if is_table else "the record", entry if is_table else full)
    return full


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _changed(where: str, found: object) -> RecordError:
    what = "which hf_gradnas never writes there; it was changed or damaged: restore config.json."
    return RecordError(f"config.gradnas: {where} holds {found!r:.60}, {what}")


def translated(record: Record, model: nn.Module) -> Record:
    """The record with the paths that `model` uses, if it is another class of the same family."""
    if type(model).__name__ == record["architecture"]:
        return record
    if not isinstance(model, PreTrainedModel):
        raise RecordError(
            f"{type(model).__name__}: config.gradnas holds sizes of {record['architecture']}, and "
            "only classes of Transformers have paths that translate; build that class instead."
        )
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    renames: list[Callable[[str], str]] = [str, lambda p: p.removeprefix(prefix), prefix.__add__]
    paths = [path for section in SECTIONS for path in record[section]]
    rename = max(renames, key=lambda rename: sum(rename(path) in known for path in paths))
    translate = [(s, {rename(k): v for k, v in record[s].items()}) for s in SECTIONS]
    found = {s: {k: v for k, v in part.items() if k in known} for s, part in translate}
    if paths and not any(found.values()):
        raise RecordError(
            f"{type(model).__name__}: none of the {len(paths)} module paths that config.gradnas "
            f"names for {record['architecture']} exist, e.g. {paths[0]}; load that class instead."
        )
    return {**record, **found}


def _shorter_lists(modules: Modules, record: Record, members: Mapping[str, Any]) -> Any:
    """Modules that stay in each list, by the names that they take; and all by their new paths."""
    lists, found = {}, {p: m for p, m in modules.items() if not _inside(p, record["lists"])}
    for path, gone in record["lists"].items():
        has = _module(modules, path)._modules
        if not all(isinstance(n, str) for n in gone) or set(has) <= set(gone):
            raise _changed(path, gone)
        own = {new: has[old] for new, old in members.get(path, {}).items()}
        lists[path] = {name: own.get(name, m) for name, m in has.items() if name not in gone}
        found[path] = modules[path]
        for name, module in lists[path].items():
            found |= dict(module.named_modules(None, f"{path}.{name}", False))
    return lists, found


def _wanted_shapes(
    modules: Modules, record: Record, rows: Rows | None, new_tensors: Tensors
) -> dict[tuple[str, str], Shape]:
    """Shape wanted of each tensor, by module path and name; check paths and attributes."""
    wanted: dict[tuple[str, str], Shape] = {}
    for path, values in record["modules"].items():
        if _inside(path, record["removed"]):
            continue
        module = _module(modules, path)
        absent = [name for name in values if getattr(module, name, None) is None]
        if "config" in values and "config" not in absent:
            absent += [f"config.{n}" for n in values["config"] if not hasattr(module.config, n)]
        for name in values.keys() - set(absent):
            there, value = getattr(module, name), values[name]
            fits = type(value) is type(there) or not isinstance(there, int)
            if not (_is_shape(value) if isinstance(there, torch.Tensor) else fits):
                raise _changed(f"{path}.{name}", value)
        if absent:
            what = f"{type(module).__name__} has no {absent[0]!r}, which config.gradnas sets"
            raise RecordError(f"{path}: {what}; {SAME_VERSION}")
        wanted |= {(path, name): tuple(v) for name, v in values.items() if isinstance(v, list)}
    for path, size in record["own_position_bias"].items():
        module, row = _module(modules, path), table_of(modules[path])
        table = "" if row is None else row.table
        given, has = f"{path}.{table}.weight" in new_tensors, table in module._modules
        if row is None or (size and not has and rows is not None and not given):
            raise RecordError(
                f"{path}: config.gradnas gives it a position bias of its own, but "
                f"{type(module).__name__} has no table and no values came; pass new_tensors."
            )
        if size and has and not given:
            wanted[f"{path}.{table}", "weight"] = tuple(size)
    return wanted


def _check_shapes(wanted: Wanted, modules: Modules, record: Record, rows: Rows | None) -> None:
    """Check that every wanted shape can be had, and that all rows are used."""
    shape_of: dict[int, Shape] = {}
    for (path, name), shape in wanted.items():
        tensor = getattr(modules[path], name)
        kept = None if rows is None else rows.get(_join(path, name), {})
        fits = _can_slice(tuple(tensor.shape), shape, kept)
        if not fits or shape_of.setdefault(id(tensor), shape) != shape:
            counts = {dim: len(indices) for dim, indices in (kept or {}).items()}
            raise RecordError(
                f"{_join(path, name)}: has shape {list(tensor.shape)}, but config.gradnas wants "
                f"{list(shape)}{'' if kept is None else f' from rows {counts}'}; the record "
                "belongs to another model, or a tied tensor is wanted in two shapes."
            )
    unknown = (rows or {}).keys() - {_join(*key) for key in wanted}
    for name in [name for name in unknown if not _inside(name, record["removed"])]:
        raise RecordError(f"{name}: rows are given, but the record wants no shape; drop them.")


def _can_slice(size: Shape, shape: Shape, kept: Mapping[int, Any] | None) -> bool:
    """Whether a tensor of `size` gives `shape`: by its first rows (None), or by the kept ones."""
    rows = {d: r if r and isinstance(r[0], list) else [r] for d, r in (kept or {}).items()}
    return len(size) == len(shape) and all(
        len(own) == wants and all(0 <= row < has for row in own)
        for d, (has, wants) in enumerate(zip(size, shape, strict=True))
        for own in rows.get(d, [range(has if kept is not None or has < wants else wants)])
    )


def _check_removals(modules: Modules, record: Record) -> None:
    for path, spec in record["removed"].items():
        module, projection = _module(modules, path), spec["projection"]
        if projection is None or _is_like(module, RemovedAttention):
            continue
        found = _module(modules, f"{path}.{projection}")
        if not isinstance(found, nn.Linear | Conv1D):
            raise RecordError(
                f"{path}.{projection}: is a {type(found).__name__}, but only Linear and Conv1D "
                "projections of an attention can be removed; keep one unit of this attention."
            )


def _slice(model: nn.Module, modules: Modules, wanted: Wanted, rows: Rows | None) -> None:
    """Slice every tensor once and put the result wherever the old one stood."""
    places: dict[int, list[tuple[dict[str, Any], str, nn.Module]]] = defaultdict(list)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                places[id(tensor)].append((store, name, module))
    unique = {id(t := getattr(modules[key[0]], key[1])): (t, key) for key in wanted}  # tied: once
    for old, key in unique.values():
        shape, kept = wanted[key], (rows or {}).get(_join(*key), {})
        if old.shape == shape and not kept:
            continue
        new: Any = _kept(old.detach(), shape, kept).contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for store, attribute, module in places[id(old)]:
            store[attribute] = new
            _sync(module)


def _kept(x: torch.Tensor, shape: Shape, kept: Mapping[int, Any]) -> torch.Tensor:
    """The kept rows in each dimension, or the first ones."""
    for dim, size in enumerate(shape):
        index = torch.tensor(kept.get(dim, range(size)), device=x.device).long()
        if index.ndim > 1:  # each matrix of a stack keeps rows of its own
            x = x.take_along_dim(index[(..., *[None] * (x.ndim - 2))].movedim(1, dim), dim)
        elif dim in kept or size < x.shape[dim]:
            x = x.index_select(dim, index)
    return x


def _set_attributes(modules: Modules, record: Record) -> None:
    for path, values in record["modules"].items():
        if _inside(path, record["removed"]):
            continue
        for name, value in values.items():
            if name == "config":
                base = vars(modules[path].config).get("_base", modules[path].config)
                modules[path].config = _LayerConfig(base, value)
            elif not isinstance(value, list):
                old = getattr(modules[path], name)  # `normalized_shape` of a norm without weight
                whole = (value, *old[1:]) if isinstance(old, tuple) else value
                setattr(modules[path], name, whole)


def _own_position_biases(modules: Modules, record: Record, new_tensors: Tensors) -> None:
    """Let layers compute their own position bias, from a table of their own if they have one."""
    for path, size in record["own_position_bias"].items():
        module, row = modules[path], cast(SharedTable, table_of(modules[path]))
        hooks = {hook.__name__ for hook in module._forward_pre_hooks.values()}
        if _forget_position_bias.__name__ not in hooks:
            module.register_forward_pre_hook(_forget_position_bias, with_kwargs=True)
        values = new_tensors.get(f"{path}.{row.table}.weight")
        if values is None and size and row.table not in module._modules:
            values = next(module.parameters()).new_zeros(size)
        if values is not None:
            table = nn.Embedding(size[0], size[1], _weight=values.clone())
            module.add_module(row.table, table.train(module.training))
        setattr(module, row.flag, bool(size))


def _without_input(projection: Any) -> Any:
    """Narrow a projection to its bias."""
    weight = projection.weight
    empty = weight.detach().narrow(0 if isinstance(projection, Conv1D) else 1, 0, 0).clone()
    projection.weight = nn.Parameter(empty, weight.requires_grad)
    _sync(projection)
    return projection


def _sync(module: Any) -> None:
    """Bring a module's attributes in line with its tensors, and hide empty ones."""
    for kind, sizes in SIZES:
        if isinstance(module, kind):
            weight: Any = module.weight if module.weight is not None else module.running_mean
            for attribute, dim in sizes.items():
                setattr(module, attribute, weight.shape[dim])
    if isinstance(module, _ConvNd):
        sides = (module.weight.shape[0], module.weight.shape[1] * module.groups)
        module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    if isinstance(module, Conv1D) and module.nx == 0:
        module.__class__ = _EmptyConv1D
    for name, parameter in list(module.named_parameters("", False, False)):
        if parameter.numel() == 0:
            del module._parameters[name]
            module.register_buffer(name, parameter.detach(), persistent=False)
    hidden = {name for name, b in module.named_buffers(recurse=False) if b.numel() == 0}
    module._non_persistent_buffers_set |= hidden


def _module(modules: Modules, path: str) -> Any:
    if path not in modules:
        what = f"config.gradnas names this module, but {type(modules['']).__name__} has none there"
        raise RecordError(f"{path}: {what}; {SAME_VERSION}")
    return modules[path]


def _is_like(value: object, kind: type) -> bool:
    return type(value).__name__ == kind.__name__  # a copy of this file defines another class


def _inside(path: str, outer: Mapping[str, Any]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in outer)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- per-layer classes ----------------------------------------------------------------------------


class _PerLayer:
    """What a per-layer class adds to the stock class that it inherits from."""

    _gradnas_stock_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with _construction() as outermost, _uniform(config):
            self._gradnas_stock_class.__init__(cast(Any, self), config, *args, **kwargs)
        if outermost and "gradnas" in vars(config):
            resize(cast(PreTrainedModel, self), config.gradnas)
            name_files(cast(PreTrainedModel, self))

    def initialize_weights(self) -> None:
        """Let classes find as many modules in a list as their config counts."""
        short: list[Any] = [m for m in cast(Any, self).modules() if "_gradnas_gone" in vars(m)]
        for m in short:
            m._modules |= dict.fromkeys(m._gradnas_gone, next(iter(m._modules.values())))
        try:
            cast(Any, super()).initialize_weights()
        finally:
            for m in short:
                m._modules = {k: v for k, v in m._modules.items() if k not in m._gradnas_gone}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        getattr(kwargs.get("config"), "__dict__", {}).pop("transformers_weights", None)  # `NEEDS`
        return cast(Any, super()).from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        with _uniform(cast(Any, self).config, written=True):
            cast(Any, super()).save_pretrained(save_directory, *args, **kwargs)
        self._say_needs(save_directory, kwargs.get("is_main_process", [*args, True][0]))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        self._say_needs(working_dir)  # with push_to_hub: before the upload
        return cast(Any, super())._upload_modified_files(working_dir, *args, **kwargs)

    def _say_needs(self, folder: Any, is_main: bool = True) -> None:
        file = Path(folder, "config.json")
        if is_main and file.is_file():  # an adapter has none; alone, upstream says: no such weights
            values = {**json.loads(file.read_text("utf-8")), "transformers_weights": NEEDS}
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if type(self) is per_layer_class(self._gradnas_stock_class):  # pickle finds it by no name
            function, arguments = _blank, (self._gradnas_stock_class,)
        return (function, arguments, *state)


FROM_FILES = """__module__ __qualname__ __doc__
is_custom_code _can_set_attn_implementation _can_set_experts_implementation""".split()
_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def is_per_layer(model_class: type) -> bool:
    """Whether a class comes from `per_layer_class` of this file or of any copy of it."""
    return hasattr(model_class, "_gradnas_stock_class")


def per_layer_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Subclass of a stock class that takes the shapes in ``config.gradnas`` once it is built.

    It carries the stock class's name and this module's: upstream's ``save_pretrained`` then copies
    this file beside the weights and names the class in ``auto_map``. A class that Transformers does
    not export (a user's own, remote code) keeps its module: this file alone could not find it.
    """
    if is_per_layer(stock):  # perhaps that of an older copy of this file
        stock = cast(Any, stock)._gradnas_stock_class
    if stock not in _CLASSES:
        mixin = [GenerationMixin] * (stock.can_generate() and issubclass(stock, GenerationMixin))
        bases = (_PerLayer, stock, *mixin)  # a direct base, or upstream wraps the class once more
        # Upstream decides some by reading the file of the class: it has to read the stock one.
        body = {n: getattr(stock, n) for n in FROM_FILES} | {"_gradnas_stock_class": stock}
        if getattr(transformers, stock.__name__, None) is stock:
            body |= {"__module__": __name__, "_auto_class": auto_class_name(stock) or "AutoModel"}
        _CLASSES[stock] = created = type(stock.__name__, bases, body)
        # Keyed by the class's name; filled by a constructor, which `make_per_layer` does not run.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(created), stock._can_record_outputs)
    return _CLASSES[stock]


def name_files(model: PreTrainedModel) -> None:
    """Name the code file in the config, and forget ties of parameters that are gone."""
    if "_auto_class" in vars(type(model)):  # Transformers exports its class
        built = {name: classes[0] for name, classes in _auto_classes(type(model.config))}
        if auto_class_name(cast(Any, type(model))._gradnas_stock_class) is None:
            built["AutoModel"] = type(model)
        file = __name__.rsplit(".", 1)[-1]
        model.config.auto_map = {name: f"{file}.{part.__name__}" for name, part in built.items()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = [tie for tie in model.all_tied_weights_keys.items() if tie[0] in names]
    heirs = {of: of if of in names else target for target, of in reversed(ties)}
    model.all_tied_weights_keys = {t: heirs[of] for t, of in ties if t != heirs[of]}


def _auto_classes(config_class: type) -> Iterator[tuple[str, tuple[type, ...]]]:
    """Names of the Auto classes that know a config class, with the classes they build from it."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415 (stock loading needs it not)

    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", {}) if name.startswith("Auto") else {}
        if config_class in mapping:
            found = mapping[config_class]
            yield name, found if isinstance(found, tuple) else (found,)


def auto_class_name(stock: type[PreTrainedModel]) -> str | None:
    """The most telling Auto class of a stock class; `AutoBackbone` loads from no folder."""
    found = _auto_classes(stock.config_class)
    names = [name for name, built in found if stock in built and name != "AutoBackbone"]
    return min(names, key=lambda n: (n != "AutoModel", "ForPreTraining" in n), default=None)


def _blank(stock: type[PreTrainedModel]) -> PreTrainedModel:
    return object.__new__(per_layer_class(stock))


def _thread() -> threading.local:
    """State shared by all copies of this file, so that only the outermost constructor resizes."""
    if "_gradnas_thread" not in vars(PreTrainedModel):
        PreTrainedModel._gradnas_thread = threading.local()
    return cast(threading.local, PreTrainedModel._gradnas_thread)


def under_construction() -> bool:
    """Whether this thread is inside the constructor of a per-layer class."""
    return getattr(_thread(), "depth", 0) > 0


@contextmanager
def _construction() -> Iterator[bool]:
    """Mark a constructor; true for the outermost: the models nested in it must stay stock."""
    depth = getattr(thread := _thread(), "depth", 0)
    try:
        thread.depth = depth + 1
        yield depth == 0
    finally:
        thread.depth = depth


@contextmanager
def _uniform(config: PreTrainedConfig, *, written: bool = False) -> Iterator[None]:
    """Show stock code the ``per_layer_config`` of before the cut, or all of it without warnings."""
    native = vars(config).get("gradnas", {}).get("native", {})
    name, own = "_heterogeneity_spec", {"": config, **vars(config)}.items()
    configs = [(p, c) for p, c in own if isinstance(c, PreTrainedConfig) and name in vars(c)]
    specs = [(path, owner, vars(owner)[name]) for path, owner in configs]
    try:
        for path, owner, spec in specs:
            if written:  # upstream's checks read each attribute, and warn of those that are named
                vars(owner)[name] = copy.copy(spec)
                vars(owner)[name].per_layer_attributes = set()
            else:
                owner.per_layer_config = native.get(path)
        yield
    finally:
        for _, owner, spec in specs:
            vars(owner)[name] = spec


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Per-layer class of the stock class `name`: what ``auto_map`` asks of this file."""
    stock = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        what = f"has no attribute {name!r}, and transformers exports no model class of that name"
        raise AttributeError(f"{__name__}: {what}; {SAME_VERSION}")
    return per_layer_class(stock)
