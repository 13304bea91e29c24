"""Make small inputs from a batch: for the probe, and for counting FLOPs.

Knows which tensors of a batch follow its tokens. Labels are dropped, so that no loss is computed; a
decoder gets them as its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    longest = max((t.shape[1] for t in _token_tensors(inputs, decoder=decoder).values()), default=0)
    return _sample(inputs, 1, length or longest, decoder=decoder)


def _sample(
    inputs: Mapping[str, Any], examples: int, length: int | None, *, decoder: bool
) -> dict[str, Any]:
    tokens = _token_tensors(inputs, decoder=decoder)
    ends = _last_tokens(inputs)
    sample: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "labels":
            continue
        is_batched = isinstance(value, Tensor) and value.ndim > 0
        sample[name] = value[:examples] if is_batched and name not in tokens else value
    for name, value in tokens.items():
        wanted = length or min(max(value.shape[1], MIN_PROBE_TOKENS), PROBE_TOKENS)
        own = ends if ends is not None and value.shape[1] == inputs["input_ids"].shape[1] else None
        rows = _varied(value) if name.endswith("input_ids") else value
        resized = _resize(rows[:examples], wanted, None if own is None else own[:examples])
        sample[name] = torch.ones_like(resized) if "mask" in name else resized
    return sample


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
