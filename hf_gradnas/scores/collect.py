"""Score every unit of a model in one pass over calibration data; resume a pass that broke off."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._compat import configs_of
from ..batches.batch import digest
from ..batches.ordering import number_of
from ..batches.steps import HeldOut, Step, hold_out, read_steps
from ..config.defaults import GLOBAL_METHODS
from ..errors import DataError, ScoresError
from ..running.processes import Processes
from ..running.wrappers import check_parameters, uncompiled
from ..types import Axis, Scores
from .fingerprints import check_same_everywhere, model_fingerprint
from .gradients import GradientRecorder
from .keeping import kept
from .losses import DataLoss, Objective, SampledLoss
from .measure import GlobalBatch, Measure, Part
from .methods import WEIGHT_METHODS
from .settings import check_arguments, check_methods, settings_of
from .state import Record, State, continued

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Progress = Callable[[int, "int | None"], None]


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

    Raises:
        DataError: No batch, no labels, no loss, or gradients that are not finite or all zero.
        ScoresError: An unknown choice, a `file` of no use, or processes with different models.
        StructureError: An axis does not fit the model.
    """
    axes, processes = tuple(structure_axes), Processes(accelerator)
    check_arguments(seed, file, progress)
    methods = check_methods(method, also)
    is_held = held_out is not None
    settings = settings_of(axes, methods, labels, num_examples, seed, processes, held_out=is_held)
    record = _open(model, axes, settings, file, processes)
    processes.from_main(partial(record.check_writable, resume=resume))
    if method in WEIGHT_METHODS:
        state = _from_weights(model, axes, method, seed)
        return record.write(record.scores(state, complete=True))
    objective: Objective = DataLoss(model, "", by_batch=set(methods) <= set(GLOBAL_METHODS))
    if labels == "model":
        objective = SampledLoss(model, seed, partial(number_of, batches))
    options: dict[str, Any] = {"progress": progress, "resume": resume, "held_out": held_out}
    return _run(record, objective, batches, num_examples, save_every_s=save_every_s, **options)


def _run(
    record: Record,
    objective: Objective,
    batches: Iterable[Any],
    num_examples: int | None,
    *,
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
) -> Record:
    """What stays the same during the pass, after a check that it is so on all processes."""
    check_parameters(model, "score", shards=True)
    path = None if file is None else Path(file)
    record = Record(axes, settings, model_fingerprint(model), path, processes)
    check_same_everywhere(record.model, settings, processes)
    return record


def _from_weights(model: nn.Module, axes: Iterable[Axis], method: str, seed: int) -> State:
    found = WEIGHT_METHODS[method](model, axes, seed)
    return State(np.concatenate([found[axis.name] for axis in axes]), normaliser="none")


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
    with _quiet(model), recorder.attached():
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
    )


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Frozen parameters, eval mode per module, no cache, gradients on; all restored after."""
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
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
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _finish(record: Record, state: State) -> Scores:
    """Scores of all processes, written.

    Raises:
        DataError: They are all zero.
    """
    found = record.joined(state)
    if not found.totals.any():
        raise DataError(
            f"All scores are zero after {state.examples} examples: the loss depends on no axis; "
            "check that labels are not all ignored (-100) and that the head is trained."
        )
    return record.write(record.scores(found, complete=True))
