"""Calibration examples of a repair: which are held out, both forwards on them, and their rows.

Knows batches and which positions are padding; knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ..batches.batch import Batch, run_model
from ..batches.steps import read_steps
from ..errors import RepairError
from ..running.precision import wide
from ..running.processes import Processes
from ..scores.losses import inputs_to_sample
from .closeness import at_least_float32, prediction_of
from .paused import Conductor, Forward
from .readers import Feed, Gate, Reader

HELD_OUT = 5
"""Every so many batches, one is held out."""
LEAST_SCALE = 1e-3
"""Outputs that are multiplied by less than this share of the largest factor are left alone."""
POSITIONS = 256
"""Positions of a convolution's output that are fitted per example, evenly spaced."""


class Part(NamedTuple):
    """A batch of this process, or a piece of one.

    Attributes:
        batch: Its examples.
        is_held_out: Whether ridges are chosen by it, and a repair is judged by it. No neurons are,
            and weights are fitted to it only once their ridge is chosen.
        number: Among those that are not held out, over all processes.
    """

    batch: Batch
    is_held_out: bool
    number: int


Masks = tuple[Tensor | None, Tensor | None]
"""Real positions ``(examples, seq)`` of the encoder, or of the model, and of a decoder."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What something is fitted on.

    Attributes:
        x: Inputs ``(rows, columns)``.
        residual: What is missing, before it is scaled ``(rows, outputs)``.
        wanted: What the original has, scaled ``(rows, outputs)``; None: no longer needed.
        scale: What outputs are multiplied by before they are compared, a number or ``(outputs,)``.
    """

    x: Tensor
    residual: Tensor
    wanted: Tensor | None
    scale: Tensor | float = 1.0


@dataclass(eq=False)
class Piece:
    """Some examples, and the forwards of the original and the pruned model on them.

    Attributes:
        batch: The examples.
        is_held_out: Whether nothing is fitted on them but in the end.
        original: Forward without masks.
        pruned: Forward with masks.
        masks: Real positions ``(examples, seq)`` of the encoder, or of the model, and of a decoder.
    """

    batch: Batch
    is_held_out: bool
    original: Forward
    pruned: Forward
    masks: Masks

    def is_at(self, number: int, reader: Reader | Feed) -> bool:
        """Whether both forwards wait at a gate, with as many rows, and ran a reader before it."""
        forwards = (self.original, self.pruned)
        if any(forward.is_done or forward.gate != number for forward in forwards):
            return False
        shapes = {cast(Tensor, forward.tensor).shape for forward in forwards}
        if isinstance(reader, Feed):
            return len(shapes) == 1
        return reader.path in self.pruned.inputs and (reader.alone or len(shapes) == 1)

    def fed_rows(self, gate: Gate, decoder: str | None) -> Rows:
        """What the map of a feed is fitted on: its inputs, and what the original's are beside."""
        wanted, found = cast(Tensor, self.original.tensor), cast(Tensor, self.pruned.tensor)
        feed = cast(Feed, gate.readers[0])  # a decoder reads states that the encoder made
        real = real_positions(wanted, feed.maker or feed.path, masks=self.masks, decoder=decoder)
        wanted, found = (
            at_least_float32(wanted.flatten(0, -2)),
            at_least_float32(found.flatten(0, -2)),
        )
        if real is not None:
            places = real.to(found.device)
            wanted, found = wanted[places], found[places]
        return Rows(found, wanted - found, wanted)

    def rows(self, gate: Gate, reader: Reader, scale: Tensor | float, decoder: str | None) -> Rows:
        """What a reader is fitted on: all real positions at a gate that both forwards wait at.

        Args:
            gate: The gate.
            reader: One of its readers.
            scale: What the reader's output is multiplied by before it is seen at the gate.
            decoder: Path of an encoder-decoder's decoder.
        """
        x = flat_inputs(reader, self.pruned.inputs[reader.path])
        tensor = cast(Tensor, self.original.tensor)
        if reader.alone:
            tensor = self.pruned.losses[reader.path]
        wanted = residual = at_least_float32(flat_outputs(reader, tensor)).to(x.device)
        if not reader.alone:
            found = flat_outputs(reader, cast(Tensor, self.pruned.tensor))
            residual = wanted - at_least_float32(found).to(x.device)
        real = None
        if not reader.is_conv:
            real = real_positions(tensor, gate.place.path, masks=self.masks, decoder=decoder)
        if real is not None:
            places = real.to(x.device)
            x, wanted, residual = x[places], wanted[places], residual[places]
        if reader.outputs is not None:
            outputs = list(reader.outputs)
            wanted, residual = wanted[:, outputs], residual[:, outputs]
            scale = scale[outputs] if isinstance(scale, Tensor) else scale
        if not (reader.alone or isinstance(scale, Tensor)) and scale == 1:
            return Rows(at_least_float32(x), residual, wanted)
        scale = torch.as_tensor(scale, device=residual.device, dtype=residual.dtype)
        # What is all but switched off cannot make up for anything, whatever its weights.
        scale = scale.where(scale.abs() > LEAST_SCALE * scale.abs().max(), 0)
        residual = (residual / scale).where(scale != 0, 0)
        return Rows(at_least_float32(x), residual, wanted, scale)


def some_outputs(rows: Rows, every: int) -> Rows:
    """The same rows with every so many outputs."""
    if every == 1:
        return rows
    scale = rows.scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[::every]
    residual, wanted = rows.residual[:, ::every], cast(Tensor, rows.wanted)[:, ::every]
    return replace(rows, residual=residual.contiguous(), wanted=wanted, scale=scale)


def squares(values: Tensor) -> float:
    """``Σ v²`` over rows ``(rows, values)``, those of a row in their own type, rows in float64."""
    return float(wide(values.square().sum(1)).sum())


def read_parts(
    model: PreTrainedModel, batches: Iterable[Any], limit: int | None, processes: Processes
) -> list[Part]:
    """This process's batches, each with whether it is held out.

    Where all processes together have fewer than five, they are split.

    Raises:
        DataError: A batch is not a dict of tensors, or there is none.
        RepairError: There is one example only.
    """
    with closing(read_steps(batches, model, limit, processes)) as steps:
        own = [
            (number * processes.count + processes.index, step.batch)
            for number, step in enumerate(steps)
            if step.batch is not None
        ]
    last = int(processes.gather([max((number for number, _ in own), default=0)]).max())
    if last + 1 >= HELD_OUT:  # numbered over all processes, so that their number changes nothing
        parts = [
            Part(batch, number % HELD_OUT == HELD_OUT - 1, number - number // HELD_OUT)
            for number, batch in own
        ]
    else:
        parts = [part for number, batch in own for part in _split(batch, number, last)]
    held = [part.is_held_out for part in parts]
    counts = processes.sum(np.array([held.count(True), held.count(False)], dtype=np.float64))
    if not counts.all():
        raise RepairError(
            "repair: found one example, needed at least two, of which one is held out; give more "
            "calibration data, or repair nothing."
        )
    return parts


def _split(batch: Batch, number: int, last: int) -> Iterator[Part]:
    """A batch in up to five pieces, the last held out; of one example if it is the last batch.

    A piece has every fifth example: where they are in order of length, it has some of all lengths.
    """
    count = min(HELD_OUT, batch.examples)
    for place in range(count):
        rows = np.arange(place, batch.examples, count)
        piece = Batch(batch.index, batch.select(rows.tolist()), len(rows), batch.labels)
        is_held_out = place == count - 1 and (count > 1 or number == last)
        yield Part(piece, is_held_out, number * (HELD_OUT - 1) + place)


def make_piece(conductor: Conductor, batch: Batch, *, is_held_out: bool) -> Piece:
    """Both forwards of some examples, not begun; of what is held out, they return predictions."""
    model = cast(PreTrainedModel, conductor.model)
    inputs, mask = inputs_to_sample(model, batch)
    run: Callable[[], Any] = partial(run_model, model, batch.index, inputs)
    if is_held_out:
        run = partial(prediction_of, model, batch)
    original = conductor.start(run, is_pruned=False)
    pruned = conductor.start(run, is_pruned=True)
    return Piece(batch, is_held_out, original, pruned, masks_of(inputs, mask))


def masks_of(inputs: Mapping[str, Any], mask: Tensor | None) -> Masks:
    """Which positions of a forward are real: those of its attention mask, and of its output."""
    own = inputs.get("attention_mask")
    return own.cpu() != 0 if isinstance(own, Tensor) else None, mask


def real_positions(
    tensor: Tensor, path: str, *, masks: Masks, decoder: str | None
) -> Tensor | None:
    """Real positions ``(rows,)`` of a tensor ``(examples, seq, features)``; None: all.

    Args:
        tensor: Its rows may also be flat, ``(examples · seq, features)``.
        path: Of the module that reads or makes it.
        masks: Of the forward.
        decoder: Path of an encoder-decoder's decoder.
    """
    in_decoder = decoder is not None and f"{path}.".startswith(f"{decoder}.")
    shape = tuple(tensor.shape[:-1])
    for mask in masks[::-1] if in_decoder else masks:
        if mask is not None and shape in (tuple(mask.shape), (mask.numel(),)):
            return mask.flatten()
    return None


def decoder_path(model: PreTrainedModel) -> str | None:
    """Path of the decoder of an encoder-decoder; None for any other model."""
    if not model.config.is_encoder_decoder:
        return None
    decoder = model.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), None)


def flat_inputs(reader: Reader, x: Tensor) -> Tensor:
    """Rows ``(rows, columns)`` of a layer's inputs; of a convolution what each position sees."""
    module = reader.module
    if not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        return x.flatten(0, -2)
    sizes: list[Any] = [module.kernel_size, module.dilation, module.padding, module.stride]
    if isinstance(module, torch.nn.Conv1d):
        x, before = x[:, :, None], (1, 1, 0, 1)
        sizes = [(first, *size) for first, size in zip(before, sizes, strict=True)]
    kernel, dilation, padding, stride = sizes
    patches = functional.unfold(x, kernel, dilation, padding, stride)  # (batch, columns, positions)
    return _spaced(patches).transpose(1, 2).flatten(0, 1)


def flat_outputs(reader: Reader, y: Tensor) -> Tensor:
    """Rows ``(rows, outputs)`` of a layer's outputs, in the order of `flat_inputs`."""
    if not reader.is_conv:
        return y.flatten(0, -2)
    return _spaced(y.flatten(2)).transpose(1, 2).flatten(0, 1)


def _spaced(values: Tensor) -> Tensor:
    """At most `POSITIONS` positions of ``(batch, features, positions)``, evenly spaced."""
    step = -(-values.shape[2] // POSITIONS)
    return values[:, :, ::step]
