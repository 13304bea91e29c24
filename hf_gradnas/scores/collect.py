"""Score every unit of a model in one pass over calibration data; resume a pass that broke off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from .._compat import configs_of
from ..batches.batch import digest
from ..batches.steps import HELD_OUT_EVERY, HeldOut, Step, hold_out, number_of, read_steps
from ..config.defaults import GLOBAL_METHODS
from ..errors import DataError, GradNASWarning, ScoresError, check_choice
from ..running.checkpointing import check_checkpointing, checkpointed
from ..running.kernels import check_backward
from ..running.offloading import is_offloaded, loading_again
from ..running.processes import Processes
from ..running.states import frozen
from ..running.wrappers import check_parameters, uncompiled
from ..types import Axis, Basis, Scores, is_integer
from ..types.plans import POWERS
from .fingerprints import axes_fingerprint, check_same_everywhere, model_fingerprint
from .gradients import GradientRecorder
from .losses import DataLoss, Objective, SampledLoss
from .measure import GlobalBatch, Measure, Part
from .methods import GRADIENT_METHODS, METHODS, ROW_METHODS, WEIGHT_METHODS
from .state import Record, State, continued, kept

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Progress = Callable[[int, "int | None"], None]
MOST_SKIPPED = 0.1
"""Share of the examples whose gradients in float16 may overflow; nothing of these counts."""


def collect_scores(  # noqa: PLR0913 - the settings of one step, all with defaults
    model: nn.Module,
    structure_axes: Iterable[Axis],
    batches: Iterable[Any],
    *,
    method: str = "fisher",
    also: Sequence[str] = (),
    labels: str = "data",
    num_examples: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    save_every_s: float = 30.0,
    progress: Progress | None = None,
    resume: bool = True,
    held_out: HeldOut | None = None,
    accelerator: Accelerator | PartialState | None = None,
    checkpointing: bool | None = None,
    basis: Basis | None = None,
) -> Scores:
    """Measure how much the loss is hurt when a unit goes, for every unit, in one pass.

    Parameters are frozen, modules in eval mode and compiled code off; all is restored at any end.
    All processes of an `accelerator` must call this; each scores its share, all get the same.

    Args:
        model: A Transformers model; its class tells which columns are labels.
        structure_axes: Axes to score.
        batches: Dicts for ``model(**batch)``, not read by `magnitude` and `random`. For several
            processes: a prepared or plain ``DataLoader``, or the same iterable on all of them.
        method: A key of `METHODS`.
        also: Further methods that come from gradients, for `Scores.also`, in the same pass.
        labels: ``"data"`` (the batches'), or ``"model"`` (drawn from the model's own predictions).
        num_examples: Score the first so many examples, over all processes; None: all.
        seed: For drawn labels and for `random`.
        file: Safetensors file to keep the scores in, also unfinished ones.
        save_every_s: Seconds between such writes; see `keeping.kept`.
        progress: Called on the main process: examples done and the total (None: not known).
        resume: Go on from `file` where model, settings and data are the same; else it is not read.
        held_out: Takes every fifth batch, which is then not scored; None: all are scored.
        accelerator: For several processes, or to accumulate gradients.
        checkpointing: Whether layers run again in the backward; None: those with that flag on.
        basis: Kept with the scores, for plans without a model.

    Raises:
        DataError: No batch, no labels, no loss, or gradients that are not finite or all zero.
        ScoresError: An unknown choice, a `file` of no use, or processes with different models.
        StructureError: An axis does not fit the model, or no layer can be checkpointed.
    """
    axes, processes = tuple(structure_axes), Processes(accelerator)
    check_arguments(seed, file, progress)
    check_checkpointing(model, asked=checkpointing)
    methods = check_methods(method, also)
    settings = settings_of(axes, methods, labels, num_examples, seed, processes, held_out=held_out)
    record = _open(model, axes, settings, file, processes, basis=basis, resume=resume)
    if method in WEIGHT_METHODS:
        return _from_weights(record, model, method, seed)
    options: dict[str, Any] = {"progress": progress, "resume": resume, "held_out": held_out}
    options |= {"num_examples": num_examples, "save_every_s": save_every_s}
    with scored(model, checkpointing):
        return _run(record, _objective(model, methods, labels, seed, batches), batches, **options)


def _objective(
    model: nn.Module, methods: Sequence[str], labels: str, seed: int, batches: Iterable[Any]
) -> Objective:
    check_backward(model)
    if labels == "model":
        return SampledLoss(model, seed, partial(number_of, batches))
    return DataLoss(model, "", by_batch=set(methods) <= set(GLOBAL_METHODS))


def _run(
    record: Record,
    objective: Objective,
    batches: Iterable[Any],
    *,
    num_examples: int | None,
    save_every_s: float,
    progress: Progress | None,
    resume: bool,
    held_out: HeldOut | None,
) -> Scores:
    """Score the batches that the record's file does not hold yet, and write all."""
    processes = record.processes

    def read() -> Generator[Step]:
        steps = read_steps(batches, objective.model, num_examples, processes)
        return steps if held_out is None else hold_out(steps, held_out, processes)

    with ExitStack() as stack:
        state, stream = _begin(stack, record, batches, read, resume=resume)
        keep = stack.enter_context(kept(record, state, save_every_s))
        latest = state
        for latest in stack.enter_context(closing(_states(record, state, stream, objective))):
            keep(latest)
            with processes.joint():
                if progress is not None and processes.is_main:
                    kept_back = 0 if held_out is None else held_out.examples
                    progress(latest.examples + kept_back, num_examples)
        return _finish(record, latest)


def _open(
    model: nn.Module,
    axes: Sequence[Axis],
    settings: Mapping[str, object],
    file: str | Path | None,
    processes: Processes,
    *,
    basis: Basis | None,
    resume: bool,
) -> Record:
    """What stays the same during the pass, after checks that it is so on all, and can be kept."""
    check_parameters(model, "score", shards=True, offloaded=is_offloaded(model))
    path = None if file is None else Path(file)
    record = Record(axes, settings, model_fingerprint(model), path, processes, basis)
    check_same_everywhere(record.model, settings, processes)
    processes.from_main(partial(record.check_writable, resume=resume))
    return record


def _from_weights(record: Record, model: nn.Module, method: str, seed: int) -> Scores:
    found = WEIGHT_METHODS[method](model, record.axes, seed)
    totals = np.concatenate([found[axis.name] for axis in record.axes])
    return record.write(record.scores(State(totals, normaliser="none"), complete=True))


def _begin(
    stack: ExitStack,
    record: Record,
    batches: Iterable[Any],
    read: Callable[[], Generator[Step]],
    *,
    resume: bool,
) -> tuple[State, Iterator[Step]]:
    """State to start from and the steps that are left, closed with the stack."""
    stream = stack.enter_context(closing(read()))
    empty = State(np.zeros(sum(record.sizes)))
    earlier = record.processes.from_main(record.earlier) if resume else None
    if earlier is None:
        return empty, stream
    joint, complete = earlier
    state = continued(stream, joint, record.processes, complete=complete)
    if state is not None:
        return state, stream
    stream.close()
    record.log_restart("of other data")
    if isinstance(batches, Iterator):
        raise ScoresError(
            f"{record.file}: holds scores of other data, and the batches that were compared are "
            f"gone, since a {type(batches).__name__} can be read only once; give a list or a "
            "DataLoader, or remove the file."
        )
    return empty, stack.enter_context(closing(read()))


def _states(
    record: Record, state: State, stream: Iterator[Step], objective: Objective
) -> Generator[State]:
    """Score the steps of a stream, and yield the state at the end of every global batch.

    Raises:
        DataError: A loss or a gradient is not finite, on any process.
    """
    methods, processes, model = record.methods, record.processes, objective.model
    objective.normaliser = state.normaliser or objective.normaliser
    recorder = GradientRecorder(model, record.axes)
    measure = Measure(model, record.axes, recorder, objective, methods)
    batch = GlobalBatch(methods, record.units, processes)
    latest = state
    with recorder.attached():
        for step in stream:
            measure.agree(step, processes)
            with processes.joint():
                part = measure(step)
                batch.add(part)
                latest = _after(latest, step, part, objective.normaliser)
            if batch.is_complete:
                state = latest = replace(latest, totals=state.totals + batch.scores())
                yield state
        if latest is not state:  # the data ended within a global batch
            yield replace(latest, totals=state.totals + batch.scores())


def _after(state: State, step: Step, part: Part, normaliser: str) -> State:
    """State with a step more, apart from its scores."""
    batch = step.batch
    return State(
        totals=state.totals,
        examples=state.examples + step.examples,
        batches=state.batches + step.batches,
        steps=state.steps + 1,
        data=state.data if batch is None else digest(state.data, batch.columns),
        normaliser=normaliser,
        labels=state.labels + part.labels,
        loss=state.loss + part.loss,
        skipped=state.skipped + part.skipped,
    )


@contextmanager
def scored(model: nn.Module, checkpointing: bool | None = None) -> Iterator[None]:
    """Frozen parameters, eval mode per module, no cache, gradients on; all restored after.

    Args:
        model: The model.
        checkpointing: As of `collect_scores`.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
        for config in configs_of(model):
            # Transformers guesses it from the labels of the first batch, for good.
            if hasattr(config, "problem_type"):
                stack.callback(setattr, config, "problem_type", config.problem_type)
            if hasattr(config, "use_cache"):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        stack.enter_context(loading_again(model))
        stack.enter_context(checkpointed(model, every=checkpointing))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _finish(record: Record, state: State) -> Scores:
    """Scores of all processes, written.

    Raises:
        DataError: They are all zero, or too many gradients were not finite.
    """
    found = record.joined(state)
    if found.skipped:
        share = found.skipped / max(found.examples, 1)
        said = f"gradients of {found.skipped} of {found.examples} examples overflow in float16"
        if share > MOST_SKIPPED:
            raise DataError(
                f"{said}, more than {MOST_SKIPPED:.0%}; load the model in bfloat16 or float32."
            )
        if record.processes.is_main:
            warnings.warn(
                f"{said}, and were skipped; bfloat16 and float32 skip none.",
                GradNASWarning,
                stacklevel=2,
            )
    if not found.totals.any():
        raise DataError(
            f"All scores are zero after {state.examples} examples: the loss depends on no axis; "
            "check that labels are not all ignored (-100) and that the head is trained."
        )
    return record.write(record.scores(found, complete=True))


# --- what a pass is asked for ---------------------------------------------------------------------


LABELS = ("data", "model")
MASK_PLACES = {
    "input": "out_projection_input",
    "output": "producer_output",
    "choice": "weights_of_chosen_experts",
    "every": "outputs_of_experts",
    "stack": "out_projection_input_of_experts",
    "outputs": "outputs_of_experts_in_a_list",
    "inputs": "out_projection_input_of_experts_in_a_list",
}


def check_arguments(seed: object, file: object, progress: object) -> None:
    """Check what would fail only after the first batch was scored."""
    is_seed = is_integer(seed) and cast(int, seed) >= 0
    for name, is_right, found, needed in (
        ("seed", is_seed, seed, "a whole number of 0 or more"),
        ("file", isinstance(file, str | PathLike | None) and file != "", file, "a path or None"),
        ("progress", progress is None or callable(progress), progress, "a function or None"),
    ):
        if not is_right:
            raise ScoresError(f"{name}={found!r:.80}: needed {needed}; give that, or omit it.")


def check_methods(method: str, also: Sequence[str]) -> tuple[str, ...]:
    """All methods of a pass, checked.

    Raises:
        ScoresError: One is unknown, named twice, or needs no pass.
    """
    check_choice("method", method, METHODS, ScoresError)
    if isinstance(also, str) or not isinstance(also, Sequence):
        raise ScoresError(
            f"also={also!r:.80}: needed a list of methods; give also=[…], or omit it."
        )
    if not also:
        return (method,)
    methods = (method, *also)
    for name in methods:
        check_choice("also", name, GRADIENT_METHODS, ScoresError)
    if len(set(methods)) < len(methods):
        raise ScoresError(f"method={method!r}, also={also!r}: found one twice; name each once.")
    return methods


def settings_of(
    axes: Sequence[Axis],
    methods: Sequence[str],
    labels: str,
    num_examples: int | None,
    seed: int,
    processes: Processes,
    *,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Everything that scores depend on besides model and data; the seed only where it is used.

    Raises:
        ScoresError: An unknown choice.
    """
    check_choice("labels", labels, LABELS, ScoresError)
    method, *also = methods
    is_global = any(name in GLOBAL_METHODS for name in methods)
    return {
        "accumulation_steps": processes.accumulation_steps if is_global else 1,
        "also": also,
        "axes": axes_fingerprint(axes),
        "held_out_every": None if held_out is None else HELD_OUT_EVERY,
        "labels": labels,
        "mask_place": _mask_place(axes),
        "method": method,
        "num_examples": num_examples,
        POWERS: _powers(methods),
        "processes": 1 if method in WEIGHT_METHODS else processes.count,
        "seed": seed if labels == "model" or method == "random" else None,
    }


def _powers(methods: Iterable[str]) -> dict[str, list[float]] | None:
    """Between which powers of norms methods choose; None where none does, as in files of 0.1."""
    powers = {name: list(ROW_METHODS[name]) for name in methods if name in ROW_METHODS}
    return {name: found for name, found in powers.items() if len(found) > 1} or None


def _mask_place(axes: Iterable[Axis]) -> str:
    """Where the masks of the axes are, in the order of `MASK_PLACES`."""
    sides = {tap.side for axis in axes for tap in axis.taps}
    return ",".join(place for side, place in MASK_PLACES.items() if side in sides)
