"""Cut a model to a plan, prove that the cut did what its masks said, and rewrite its configs.

The result of a Transformers model is one that its own save_pretrained writes. Knows the order of
the steps; what is cut is said in `surgery`, and what is written in `stock.rewrite`. Heads that a
generation config names by layer and number are counted anew here: of all configs of Transformers
5.23 only Whisper's has such a key, the cross-attention heads whose probabilities tell when a word
was said.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..batches.batch import to_device
from ..batches.longest import probe_inputs
from ..costs.counting import count_params
from ..errors import CutError, GradNASWarning, PlanError, described
from ..masks import masked
from ..repair.mapped import replace_weights
from ..repair.repairs import Repair
from ..running.states import evaluating, seeded
from ..running.wrappers import without_autocast
from ..stock.layers import drop_layers
from ..stock.rewrite import native_layers, write_per_layer, write_stock
from ..stock.values import locate_axes
from ..surgery.cut import Record, check_kept, cut, make_per_layer
from ..surgery.modeling_gradnas import translated
from ..surgery.records import merge_records
from ..types import KINDS, Axis, Plan, StockSpace, Structure


def check_uncut(step: str, *, is_cut: bool) -> None:
    """Check that a step is taken before the cut.

    Raises:
        PlanError: It is taken after it.
    """
    if is_cut:
        raise PlanError(
            f"{step}: this model was cut already, and scores and plans count the units of the "
            "uncut one; make a new GradNASPruner of the cut model to prune it further."
        )


def apply_plan(
    model: PreTrainedModel,
    plan: Plan,
    structure: Structure,
    space: StockSpace,
    *,
    sample: Mapping[str, Any] | None = None,
    repair: Repair | None = None,
) -> None:
    """Cut a model in place and rewrite its config; a plan that does not fit changes nothing.

    Args:
        model: The model that the others were found on, not cut yet.
        plan: Kept units and layout.
        structure: Its axes.
        space: What its class can express.
        sample: Batch for ``model(**sample)``, on which the cut model must do what the masked one
            does; None: only its parameters are counted.
        repair: New weights for this plan, which the masked model and the cut one then have.

    Raises:
        CutError: The cut model is not what the plan promises, and not usable.
        PlanError: The plan does not fit the model or, in layout ``stock``, its class.
    """
    # On a copy first: what fails does so before anything is cut.
    _write_config(copy.deepcopy(model.config), model, plan, structure, space)
    earlier = vars(model.config).get("gradnas")
    native = native_layers(model.config)
    calls = [] if sample is None else calls_of(sample, model)
    with ExitStack() as undo:
        if repair is not None:
            replace_weights(model, repair.tensors, undo)
        record = cut_with_proof(model, structure.axes, plan.kept, layout=plan.layout, calls=calls)
        undo.pop_all()  # the new weights stay
    _write_config(model.config, model, plan, structure, space)
    renumber_heads(model, structure.axes, plan.kept)
    if plan.layout == "stock":
        drop_layers(model, structure.axes, plan.kept)
    else:
        if earlier is not None:
            record = merge_records(translated(earlier, model), record)
        make_per_layer(model, {**record, "native": native} if native else record)


def _write_config(
    config: PreTrainedConfig,
    model: PreTrainedModel,
    plan: Plan,
    structure: Structure,
    space: StockSpace,
) -> None:
    if plan.layout == "stock":
        write_stock(config, plan, structure, space)
    else:
        keys = locate_axes(model, structure, space)
        write_per_layer(config, plan, structure, keys, space=space)


def calls_of(sample: Mapping[str, Any], model: PreTrainedModel) -> list[Call]:
    """Arguments to run, the cheapest first: the first tokens may be too few for some heads."""
    decoder = bool(model.config.is_encoder_decoder)
    short = probe_inputs(sample, decoder=decoder)
    whole = {name: value for name, value in sample.items() if name != "labels" or decoder}
    return [((), to_device(inputs, model)) for inputs in (short, whole)]


# --- proof ----------------------------------------------------------------------------------------


def cut_with_proof(
    model: nn.Module,
    axes: Sequence[Axis],
    kept: Mapping[str, Sequence[int]],
    *,
    layout: str = "per_layer",
    calls: Sequence[Call] = (),
) -> Record:
    """As `surgery.cut`, and prove that the cut model does what the masked one did.

    Args:
        model: The model, in any state; its training flags stay as they are.
        axes: All its axes.
        kept: Sorted kept indices per axis name.
        layout: ``"per_layer"`` or ``"stock"``.
        calls: Arguments for forwards; the first that the model runs is taken. None of them: only
            the parameters are counted.

    Returns:
        The record of new shapes.

    Raises:
        CutError: Outputs differ, or the number of parameters is not the one that was counted.
        PlanError: `kept` does not fit the axes; nothing was changed.
    """
    check_kept(axes, kept)
    counts = {axis.name: len(kept.get(axis.name, range(axis.size))) for axis in axes}
    claimed = count_params(model, axes, counts, layout=layout)
    call, wanted = _masked_outputs(model, axes, kept, calls)
    record = cut(model, axes, kept, layout=layout)
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != claimed:
        raise _not_usable(model, f"has {found:,} parameters, but the plan counts {claimed:,}")
    if call is not None:
        try:
            outputs = outputs_of(model, call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own code may raise anything
            why = f"does not run ({described(error)})"
            raise _not_usable(model, why) from error
        _, wrong = compared(outputs, wanted, half=half_tolerance(model))
        if wrong:
            raise _not_usable(model, wrong)
    return record


def _masked_outputs(
    model: nn.Module,
    axes: Sequence[Axis],
    kept: Mapping[str, Sequence[int]],
    calls: Sequence[Call],
) -> tuple[Call | None, dict[str, Tensor]]:
    """The first call that the masked model runs, and what comes out."""
    for number, call in enumerate(calls, 1):
        try:
            with masked(model, axes, kept):
                return call, outputs_of(model, call)
        except Exception:  # as above
            if number == len(calls):
                raise
    return None, {}


def compared(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, half: float
) -> tuple[float, str]:
    """Compare outputs of a cut model with those of the masked one; see `half_tolerance`.

    Returns:
        The largest difference, relative to the largest value; and what the cut model does that the
        masked one does not, in words: "" where all agree but for rounding.
    """
    largest = 0.0
    for name in {**wanted, **found}:
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            shapes = [tuple(o[name].shape) if name in o else "none" for o in (found, wanted)]
            return math.inf, f"puts out {name or 'a tensor'} of {shapes[0]}, masked {shapes[1]}"
        apart, limit = difference(found[name], wanted[name], half=half)
        if not apart <= limit:  # catches nan too
            return apart, (
                f"puts out a {name or 'tensor'} that differs by {apart:.2g} of the largest "
                f"value from the masked model's (at most {limit:g} is accepted)"
            )
        largest = max(largest, apart)
    return largest, ""


def _not_usable(model: nn.Module, what: str) -> CutError:
    return CutError(
        f"{type(model).__name__}: after the cut it {what}. The model in memory is not usable and "
        "nothing was written: load it again. Report its class and config, and leave the modules in "
        "question out with rules (--exclude) until then."
    )


# --- outputs of a model, compared -----------------------------------------------------------------


Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a forward."""
UNIT_SIZED = ("attentions", "past_key_values")
"""Ends of the names of outputs that have entries per head, so that a cut changes their shapes."""

TOLERANCE = 1e-4
"""Largest difference of masked and cut outputs of 32 bits and more, relative to the largest."""
DEVICE_TOLERANCE = 1e-3
"""The same on an accelerator, which may multiply in TF32."""
HALF_TOLERANCE, MOST_HALF = 5e-2, 0.15
"""The same for 16 bits and less, as a ratio of norms; at most: wrong cuts were .3 apart or more."""

RELOADED_TOLERANCE = 1e-5
"""Largest difference of reloaded outputs of 32 bits and more, relative to max(1, largest)."""
RELOADED_HALF_STEPS = 8
"""The same for outputs of 16 bits and less, in steps of their type at 1."""


@torch.no_grad()
def outputs_of(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Floating-point outputs by path (``"logits"``, ``"hidden_states.1"``) of one forward.

    In eval mode, without autocast, and from a seed of its own, as some forwards draw numbers; the
    model's training flags and the state of random numbers are put back.
    """
    args, kwargs = call
    with evaluating(model), without_autocast(model), seeded(model):
        return dict(floating(model(*args, **kwargs)))


def floating(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in nested tuples, mappings and dataclasses, with its path."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = list(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        items = [(field.name, getattr(output, field.name)) for field in fields(output)]
    for name, value in items:
        if not str(name).endswith(UNIT_SIZED):
            yield from floating(value, f"{path}.{name}".lstrip("."))


def difference(
    found: Tensor, wanted: Tensor, *, half: float = HALF_TOLERANCE
) -> tuple[float, float]:
    """Relative difference of cut and masked outputs of one shape, and the largest accepted one."""
    apart, old = _apart(found, wanted), wanted.cpu().double()
    sizes = torch.where(old.isfinite(), old, torch.zeros_like(old))
    if torch.finfo(wanted.dtype).bits < torch.finfo(torch.float32).bits:
        scale, limit = sizes.norm().item(), half
        largest = apart.norm().item()
    else:
        scale = _largest(sizes.abs())
        limit = TOLERANCE if wanted.device.type == "cpu" else DEVICE_TOLERANCE
        largest = _largest(apart)
    return largest / max(scale, torch.finfo(torch.float64).tiny), limit


def half_tolerance(model: nn.Module) -> float:
    """Bound of `difference` for 16 bits: n matrices round by half a step, here and there: √(2n)."""
    matrices = sum(p.dim() > 1 for p in model.parameters())
    rounding = torch.finfo(torch.bfloat16).eps / 2 * math.sqrt(2 * matrices)
    return min(max(HALF_TOLERANCE, rounding), MOST_HALF)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape; NaN and infinity equal themselves."""
    return _largest(_apart(found, wanted))


def allowed_difference(wanted: Tensor) -> float:
    """Largest difference of a reloaded model's output from `wanted` that is rounding."""
    small = torch.finfo(wanted.dtype).bits < torch.finfo(torch.float32).bits
    tolerance = RELOADED_HALF_STEPS * torch.finfo(wanted.dtype).eps if small else RELOADED_TOLERANCE
    return tolerance * max(1.0, _largest(wanted[wanted.isfinite()].abs()))


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute difference of every entry."""
    new, old = found.cpu().double(), wanted.cpu().double()
    same = (new == old) | (new.isnan() & old.isnan())
    return torch.where(same, torch.zeros_like(new), (new - old).abs())


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


# --- heads that a generation config names ---------------------------------------------------------


# Key of pairs (layer, head), and the path of a layer's attention.
ROWS = (("alignment_heads", "model.decoder.layers.{}.encoder_attn"),)


def renumber_heads(
    model: PreTrainedModel, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]
) -> None:
    """Count the heads that a cut model's generation config names among those that are left.

    Args:
        model: The model, whose generation config is changed.
        axes: All its axes before the cut.
        kept: Kept units per axis name.

    Warns:
        GradNASWarning: Some of the heads are gone, or all that the key can be used with.
    """
    config = vars(model).get("generation_config")
    values = {} if config is None else vars(config)
    heads = {axis.module: axis for axis in axes if KINDS[axis.kind].attends}
    for key, path in ROWS:
        pairs: Any = values.get(key)
        if not _are_pairs(pairs):
            continue
        left = _left(pairs, path, heads, kept)
        gone = [list(pair) for pair, found in zip(pairs, left, strict=True) if found is None]
        found = [pair for pair in left if pair is not None]
        # Where an attention is gone, Transformers finds no probabilities of its layer.
        removed = [
            axis.module
            for axis in heads.values()
            if not kept.get(axis.name, range(axis.size)) and _layer_of(axis.module, path)
        ]
        if removed or not found:
            del values[key]
            why = f"{removed[0]} lost all its heads" if removed else "they were all cut"
            _warn(f"{key} is taken out of the generation config, since {why}: word timestamps")
            continue
        values[key] = found
        if gone:
            _warn(
                f"{key} of the generation config loses {gone} ([layer, head]), which were cut, and "
                f"keeps {len(found)} of {len(pairs)}: word timestamps may be less exact; those"
            )


def _are_pairs(pairs: Any) -> bool:
    if not pairs or not isinstance(pairs, list | tuple):
        return False
    return all(
        isinstance(pair, list | tuple) and [type(n) for n in pair] == [int, int] for pair in pairs
    )


def _left(
    pairs: Sequence[Sequence[int]],
    path: str,
    heads: Mapping[str, Axis],
    kept: Mapping[str, Sequence[int]],
) -> list[list[int] | None]:
    """Each pair as it is after the cut; None where its head is gone."""
    found: list[list[int] | None] = []
    for layer, head in pairs:
        axis = heads.get(path.format(layer))
        units = list(range(head + 1) if axis is None else kept.get(axis.name, range(axis.size)))
        found.append([layer, units.index(head)] if head in units else None)
    return found


def _layer_of(module: str, path: str) -> bool:
    """Whether a module is the attention of one of the layers."""
    start, end = path.split("{}")
    return module.startswith(start) and module.endswith(end)


def _warn(text: str) -> None:
    warnings.warn(
        f"{text} need heads that stay; keep them with rules={{'*encoder_attn*': None}}.",
        GradNASWarning,
        stacklevel=4,
    )
