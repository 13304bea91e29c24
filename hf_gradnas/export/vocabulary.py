"""A tokenizer as llama.cpp runs it: tokens, their kinds, merges or scores, and how text is split.

Everything is read from the tokenizer that Transformers makes of the folder, so that what counts is
what it does. How a byte-level tokenizer splits text is compared by its patterns, not by a digest of
some outputs as in llama.cpp's own converter: so one with a vocabulary of its own is known too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import CheckpointError, described
from ..types import read_object

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""Files that a tokenizer of these families comes in."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in ``tokenizer.ggml.token_type``."""
NO_MERGE = -1e6
"""Score of a token of a SentencePiece vocabulary that no merge makes."""
SPECIAL = ("bos", "eos", "unk", "pad")

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUMBER = r"\p{N}"
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((_NUMBER, _WORDS), False): "smollm",
    ((_MODERN.replace("{DIGITS}", "{1,3}"),), True): "llama-bpe",
    ((_MODERN.replace("{DIGITS}", "{1,3}"),), False): "smaug-bpe",
    ((_MODERN.replace("{DIGITS}", ""),), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's names (``src/llama-vocab.cpp``) by patterns, and by whether merges are ignored."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` says.

    Attributes:
        model: ``gpt2``: byte-level pairs; ``llama``: SentencePiece.
        pre: How text is split.
        tokens: Every token, one for each row of the embedding.
        kinds: Kind of each.
        scores: Order of merges by the token that they make; for SentencePiece alone.
        merges: For byte-level pairs alone.
        special: Ids by name: ``bos``, ``eos``, ``unk``, ``pad``, ``eot``.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_space_prefix``.
        chat_template: Text, or a list of templates with their names.
        notes: What differs from Transformers, in sentences.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    chat_template: str | list[dict[str, str]] | None
    notes: tuple[str, ...]


def read_vocabulary(folder: Path, size: int, pre: str | None = None) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: Of the checkpoint.
        size: Rows of the embedding.
        pre: llama.cpp's name of how text is split; None: found from the tokenizer.

    Raises:
        CheckpointError: There is none, or llama.cpp has none that does the same.
    """
    tokenizer = _loaded(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{folder}: its tokenizer is a {model['type']}; only byte-pair tokenizers (BPE, with "
            "bytes or of SentencePiece) can be exported to GGUF."
        )
    tokens, kinds = _tokens(folder, state, size)
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    flags, notes = _added(tokenizer)
    is_pieces = bool(model.get("byte_fallback"))
    if is_pieces and pre is not None:
        raise CheckpointError(
            f"--pre-tokenizer {pre}: the tokenizer of {folder} is of SentencePiece, whose text is "
            "split in one way; leave it out."
        )
    if is_pieces:
        notes += _check_pieces(folder, state, pairs)
        flags["add_space_prefix"] = _has_prefix(state)
    elif pre is None:
        pre = _split(folder, state)
    known = {"Prepend", "Replace"} if is_pieces else set[str]()  # of SentencePiece: spaces
    others = sorted({str(step.get("type")) for step in _normalizers(state)} - known)
    if others:
        notes.append(
            f"The tokenizer normalizes text ({', '.join(others)}), and llama.cpp does not: give it "
            "text that is normalized already."
        )
    return Vocabulary(
        model="llama" if is_pieces else "gpt2",
        pre="default" if is_pieces else str(pre),
        tokens=tokens,
        kinds=kinds,
        scores=_scores(tokens, pairs) if is_pieces else (),
        merges=() if is_pieces else tuple(map(" ".join, pairs)),
        special=_special(folder, tokenizer),
        flags=flags,
        chat_template=_template(tokenizer),
        notes=tuple(notes),
    )


def _loaded(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(
            f"{folder}: holds no tokenizer ({', '.join(FILES)}), which a GGUF file carries; save "
            "it there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
        )
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its files are of many formats, and some are code
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({described(error)}); save it there again."
        ) from error
    if not hasattr(found, "backend_tokenizer"):
        raise CheckpointError(
            f"{folder}: its tokenizer is a {type(found).__name__}, needed is one with a "
            "tokenizer.json; save it as such."
        )
    return found


# --- tokens ---------------------------------------------------------------------------------------


def _tokens(
    folder: Path, state: Mapping[str, Any], size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    model = state["model"]
    is_pieces = bool(model.get("byte_fallback"))
    names = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    if is_pieces:
        bytes_of = (i for i, token in names.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token))
        kinds |= dict.fromkeys(bytes_of, BYTE)
    for added in state["added_tokens"]:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if is_pieces and unknown is not None:
        kinds[unknown] = UNKNOWN
    beyond = [index for index in names if index >= size]
    if beyond:
        raise CheckpointError(
            f"{folder}: its tokenizer has the token {max(beyond)} ({names[max(beyond)]!r}), and "
            f"the embedding has {size} rows; save the tokenizer of this model there."
        )
    rows, taken = range(size), set(names.values())  # llama.cpp dies of two tokens of one name
    unused = {index: f"[PAD{index}]" for index in rows if index not in names}
    names |= {index: f"{name}_" if name in taken else name for index, name in unused.items()}
    tokens = tuple(names[index] for index in rows)
    return tokens, tuple(kinds.get(index, UNUSED) for index in rows)


def _scores(tokens: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """The earlier the first merge that makes a token, the higher: SentencePiece's own order."""
    first: dict[str, float] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), -float(rank))
    return tuple(first.get(token, NO_MERGE) for token in tokens)


def _special(folder: Path, tokenizer: Any) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    found = {name: int(index) for name, index in ids.items() if index is not None}
    ends = read_object(folder / "generation_config.json").get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    more = [end for end in listed if end != found.get("eos")]
    return {**found, "eot": int(more[0])} if more else found


def _template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    found = tokenizer.chat_template
    if isinstance(found, Mapping):
        return [{"name": name, "template": text} for name, text in found.items()]
    return None if found is None else str(found)


def _added(tokenizer: Any) -> tuple[dict[str, bool], list[str]]:
    """What is put around a text: found by doing it."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    begins = bool(whole) and whole[0] == tokenizer.bos_token_id and whole != bare
    ends = len(whole) > 1 and whole[-1] == tokenizer.eos_token_id and whole != bare
    around = [tokenizer.bos_token_id] * begins, [tokenizer.eos_token_id] * ends
    flags = {"add_bos_token": begins, "add_eos_token": ends}
    if [*around[0], *bare, *around[1]] == whole:
        return flags, []
    return flags, ["The tokenizer puts other tokens than bos and eos around a text; llama.cpp not."]


# --- how text is split ----------------------------------------------------------------------------


def _split(folder: Path, state: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        CheckpointError: There is none.
    """
    steps = list(_steps(state["pre_tokenizer"]))
    normalizer = (state["normalizer"] or {}).get("type")
    known = SPLITS.get((tuple(steps), bool(state["model"].get("ignore_merges"))))
    if known is None or normalizer not in (None, "NFC"):
        found = " and ".join([*map(repr, steps), f"normalizer {normalizer}"])
        names = ", ".join(sorted(SPLITS.values()))
        raise CheckpointError(
            f"{folder}: its tokenizer splits text in a way that is not known here ({found:.200}), "
            f"known are llama.cpp's {names}; if you know that llama.cpp has the same, say its "
            "name: --pre-tokenizer NAME (pre_tokenizer=)."
        )
    return known


def _steps(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Patterns, one after the other; for what is no pattern its name."""
    kind = (step or {}).get("type")
    if step is None:
        yield "nothing"
    elif kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel":
        if step.get("add_prefix_space"):
            yield "a space before the text"
        if step.get("use_regex", True):
            yield _WORDS
    elif kind == "Digits" and step.get("individual_digits"):
        yield _NUMBER
    elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        yield step["pattern"].get("Regex", str(step["pattern"]))
    else:
        yield str(kind)


def _check_pieces(
    folder: Path, state: Mapping[str, Any], pairs: Sequence[tuple[str, ...]]
) -> list[str]:
    """Check that pieces are merged as SentencePiece does; what differs, in sentences.

    Raises:
        CheckpointError: Text is split before it is merged.
    """
    steps = _steps(state["pre_tokenizer"]) if state["pre_tokenizer"] else ()
    odd = [step for step in steps if step != "Metaspace"]
    if odd or (state["pre_tokenizer"] or {}).get("split"):
        raise CheckpointError(
            f"{folder}: its tokenizer splits text ({', '.join(odd) or 'at spaces'}) before it "
            "merges pieces, and llama.cpp's SentencePiece does not."
        )
    vocabulary, made = state["model"]["vocab"], {"".join(pair) for pair in pairs}
    splits = ((token[:at], token[at:]) for token in made for at in range(1, len(token)))
    possible = sum(left in vocabulary and right in vocabulary for left, right in splits)
    notes = []
    if possible != len(set(pairs)):
        notes.append(
            f"The tokenizer has {len(set(pairs))} merges, and SentencePiece would have {possible}: "
            "some texts may be other tokens in llama.cpp."
        )
    return notes


def _normalizers(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = state["normalizer"]
    return list(step.get("normalizers", [step])) if step else []


def _has_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a space comes before a text."""
    scheme = (state["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    return scheme != "never" or any(step["type"] == "Prepend" for step in _normalizers(state))
