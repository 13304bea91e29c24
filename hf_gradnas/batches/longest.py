"""Choose and check the batch that is taken for the calibration data before anything is scored."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_labels

from ..errors import DataError
from ..running.processes import Processes
from .batch import check_batch, check_ids, read_batches
from .loaders import deal
from .steps import check_end, is_none_or_positive, read_steps

Batch = Mapping[str, Any]


def reiterable(
    batches: Iterable[Batch], model: nn.Module, num_examples: int | None
) -> Iterable[Batch]:
    """What can be read again: a loader as it is, of an iterator a list of what will be used.

    Discovery and scoring both read it. An iterator is read no further than `num_examples`, so that
    it may be endless.

    Raises:
        DataError: One of its batches is not a dict of tensors, or it cannot end.
    """
    if not isinstance(batches, Iterator):
        return batches
    check_end(batches, num_examples)
    return [batch.columns for batch in read_batches(batches, model, num_examples)]


def longest_batch(batches: Iterable[Batch], model: nn.Module, num_examples: int | None) -> Batch:
    """The batch with the longest sequences among those that will be scored.

    Raises:
        DataError: There is no batch, or one is not a dict.
    """
    check_end(batches, num_examples)
    known = find_labels(type(model))
    longest: Batch | None = None
    length, examples = -1, 0
    with closing(_columns(batches)) as stream:
        for index, batch in enumerate(stream):
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"dataloader: batch {index} is a {type(batch).__name__}, but the model is "
                    "called as model(**batch); yield dicts of tensors."
                )
            examples += check_batch(index, batch, known, brings=False).examples
            here = _length(batch)
            if here > length:
                longest, length = batch, here
            if num_examples is not None and examples >= num_examples:
                break
    if longest is None:
        raise DataError("dataloader: it yields no batch; give it at least one example.")
    return longest


def _columns(batches: Iterable[Batch]) -> Generator[Batch]:
    """Batches of a single process; a prepared loader that is left early is as before at the end."""
    with deal(batches, Processes()) as share:
        for dealt in share.batches:
            if dealt.rows != 0:
                yield dealt.columns


def longest_of_all(
    batches: Iterable[Batch], model: nn.Module, num_examples: int | None, processes: Processes
) -> Batch:
    """The longest batch of all processes, the same one on each: their plans must be the same.

    Raises:
        DataError: There is no batch, or one is not a dict.
    """
    if processes.count == 1:
        return longest_batch(batches, model, num_examples)
    longest: Batch | None = None
    length = place = -1
    with closing(read_steps(batches, model, num_examples, processes)) as steps:
        for index, step in enumerate(steps):
            here = -1 if step.batch is None else _length(step.batch.columns)
            if step.batch is not None and here > length:
                longest, length, place = step.batch.columns, here, index
    # The longest, the first of several, as a single process would find it.
    found = processes.gather([-length, place])
    owner = min(range(processes.count), key=lambda index: (*found[index], index))
    return processes.from_process(owner, _on_cpu(longest or {}))


def from_main(batch: Batch, processes: Processes) -> Batch:
    """The main process's batch, on all of them."""
    return batch if processes.count == 1 else processes.from_main(lambda: _on_cpu(batch))


def _on_cpu(batch: Batch) -> Batch:
    return {key: v.cpu() if isinstance(v, torch.Tensor) else v for key, v in batch.items()}


def _length(batch: Batch) -> int:
    """Length of the longest sequences of a batch, its second dimension."""
    shapes = [v.shape for v in batch.values() if isinstance(v, torch.Tensor)]
    return max((shape[1] for shape in shapes if len(shape) > 1), default=0)


def check_inputs(batch: Batch, model: PreTrainedModel, flops_length: int | None) -> None:
    """Check the batch that structure and costs are found with, before the model runs it.

    Raises:
        DataError: It is no batch of the model, its sequences are longer than the position table,
            or the length that FLOPs are counted for is no length.
    """
    columns = check_batch(0, batch, find_labels(type(model))).columns
    check_ids(0, columns, model)
    _check_positions(columns, model.config)
    if not is_none_or_positive(flops_length):
        raise DataError(
            f"flops_length={flops_length!r}: found no number of tokens; give 1 or more, or None "
            "for the batch's own."
        )
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    if "input_ids" in columns and flops_length and flops_length > positions > 0:
        raise DataError(
            f"flops_length={flops_length}: the model has {positions} positions, so that longer "
            f"sequences cannot run; give {positions} or less (--flops-length {positions})."
        )


def _check_positions(batch: Batch, config: PreTrainedConfig) -> None:
    """Refuse sequences that the position table cannot hold, before torch fails inside it."""
    tokens, positions = batch.get("input_ids"), getattr(config, "max_position_embeddings", None)
    if tokens is not None and positions and tokens.shape[1] > positions > 0:  # XLNet: -1 is none
        given = batch.get("position_ids")  # packed sequences begin anew in the midst of a row
        if isinstance(given, Tensor) and given.max() < positions:
            return
        raise DataError(
            f"dataloader: sequences of {tokens.shape[1]} tokens, but {type(config).__name__} has "
            f"max_position_embeddings={positions}; truncate them to {positions}."
        )


# --- small inputs from a batch: to find structure, and to count FLOPs -----------------------------


PROBE_EXAMPLES = 2
PROBE_TOKENS = 16
MIN_PROBE_TOKENS = 4


def probe_inputs(inputs: Mapping[str, Any], *, decoder: bool = False) -> dict[str, Any]:
    """The first two examples, sixteen tokens each, none of them padding.

    Sequences of one to three tokens get more of them, all different: among equal tokens the output
    is the same whatever queries and keys are, so that neither would show.

    Args:
        inputs: A batch, as a dataloader yields it.
        decoder: The model is an encoder-decoder.
    """
    return _sample(inputs, PROBE_EXAMPLES, None, decoder=decoder)


def flops_inputs(
    inputs: Mapping[str, Any], length: int | None, *, decoder: bool = False
) -> dict[str, Any]:
    """One example of `length` tokens without padding; images and audio keep their size.

    Args:
        inputs: A batch, as a dataloader yields it.
        length: Tokens, of the decoder too; None keeps the batch's own length.
        decoder: The model is an encoder-decoder.
    """
    return _sample(inputs, 1, length or longest_of(inputs, decoder=decoder), decoder=decoder)


def longest_of(inputs: Mapping[str, Any], *, decoder: bool = False) -> int:
    """Tokens of the longest sequences of a batch, a decoder's too; 0 where there are none."""
    return max((t.shape[1] for t in _token_tensors(inputs, decoder=decoder).values()), default=0)


def _sample(
    inputs: Mapping[str, Any], examples: int, length: int | None, *, decoder: bool
) -> dict[str, Any]:
    tokens = _token_tensors(inputs, decoder=decoder)
    ends = _last_tokens(inputs)
    batched = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    ids = batched.get("input_ids")
    count = min((len(v) for v in batched.values()), default=0) if ids is None else len(ids)
    sample: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "labels":
            continue
        alone = name not in batched or name in tokens
        sample[name] = value if alone else _first(value, examples, count)
    for name, value in tokens.items():
        wanted = length or min(max(value.shape[1], MIN_PROBE_TOKENS), PROBE_TOKENS)
        own = ends if ids is not None and value.shape[:2] == ids.shape[:2] else None
        rows = _first(_varied(value) if name.endswith("input_ids") else value, examples, count)
        resized = _resize(rows, wanted, None if own is None else own[:examples])
        is_whole = name.endswith("attention_mask")
        sample[name] = torch.ones_like(resized) if is_whole else resized
    return sample


def _first(value: Tensor, examples: int, count: int) -> Tensor:
    """The rows of the first of `count` examples, which may have several; all where they do not."""
    rows, rest = divmod(len(value), max(count, 1))
    return value if rest else value[: rows * examples]


def _token_tensors(inputs: Mapping[str, Any], *, decoder: bool) -> dict[str, Tensor]:
    """Tensors with one entry per token: those as long as ``input_ids``, and a decoder's."""
    ids = inputs.get("input_ids")
    found = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and name != "labels"
        and (is_token_aligned(value, ids) or name.startswith("decoder_"))
    }
    labels = inputs.get("labels")
    if (
        decoder
        and isinstance(labels, Tensor)
        and labels.ndim == 2  # noqa: PLR2004 - (batch, tokens)
        and not labels.is_floating_point()
    ):
        found.setdefault("decoder_input_ids", labels.clamp(min=0))
    return found


def is_token_aligned(value: Tensor, tokens: Tensor | None) -> bool:
    """Whether a tensor of a batch holds one entry per token (and is no image)."""
    if tokens is None or value.ndim < 2 or value.shape[:2] != tokens.shape[:2]:  # noqa: PLR2004
        return False
    return value.ndim == tokens.ndim or not value.is_floating_point()


def _last_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Index of the last token of each row that is not padding."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or not is_token_aligned(mask, inputs.get("input_ids")):
        return None
    if mask.ndim != 2:  # noqa: PLR2004 - one of queries and keys tells no ends
        return None
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places * (mask != 0)).argmax(dim=1)


def _varied(ids: Tensor) -> Tensor:
    """Token ids; short rows are continued with their successors among the ids of the batch."""
    missing = MIN_PROBE_TOKENS - ids.shape[1]
    if missing <= 0:
        return ids
    more = ids[:, -1:] + torch.arange(1, missing + 1, device=ids.device)
    return torch.cat([ids, more % (ids.max() + 1).clamp(min=MIN_PROBE_TOKENS)], dim=1)


def _resize(rows: Tensor, length: int, ends: Tensor | None) -> Tensor:
    """Rows repeated or cut to `length`; the last token stays last, as some heads look for it."""
    times = -(-length // max(rows.shape[1], 1))
    repeated = rows.repeat(1, times, *[1] * (rows.ndim - 2))
    if ends is None:
        last = rows[:, -1:]
    else:
        last = rows[torch.arange(len(rows), device=rows.device), ends].unsqueeze(1)
    return torch.cat([repeated[:, : length - 1], last], dim=1).contiguous()
