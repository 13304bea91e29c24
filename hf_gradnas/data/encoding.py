"""Encoders of text: one function per kind of head turns rows into examples with labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import DataError
from .examples import Example, Examples, Feed, limited, row_getter
from .files import text_lines
from .labels import IGNORED, Labels, class_labels, token_labels
from .tasks import Head

MASKED_SHARE = 0.15
_SHARE_MASKED, _SHARE_REPLACED = 0.8, 0.1
# Characters that are read per token wanted: more than any tokenizer's average.
_CHARACTERS_PER_TOKEN = 16
_SPAN = 3
_SHORTEST = 2


def encode_class(feed: Feed) -> Examples:
    """Texts or pairs of texts, with a label per example if the data has it."""
    texts = _texts(feed)
    labels: Labels | None = None
    if feed.labelled and feed.columns.label is not None:
        count = limited(feed, len(feed.rows.dataset))
        labels = class_labels(
            feed.rows.dataset.select(range(count)),
            feed.columns.label,
            feed.source.config,
            origin=feed.rows.origin,
            label_map=feed.label_map,
        )

    def encode(index: int) -> Example:
        example = _tokenize(feed, texts[index])
        if labels is not None:
            example["labels"] = labels.values[index]
        return example

    if labels is None:
        return Examples(len(texts), encode)
    return Examples(len(texts), encode, labels.note, labels.names)


def encode_masked(feed: Feed) -> Examples:
    """Texts with 15 % of their tokens to be guessed: 80 % masked, 10 % replaced, 10 % kept.

    As in BERT (Devlin et al. 2019, section 3.1); the choice depends on seed and index only.

    Raises:
        DataError: The tokenizer has no mask token.
    """
    tokenizer = feed.source.tokenizer
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__}: has no mask token, which fill-mask needs; set "
            "tokenizer.mask_token and save it, or give another --task."
        )
    texts, special = _texts(feed), set(tokenizer.all_special_ids)

    def encode(index: int) -> Example:
        example = _tokenize(feed, texts[index])
        draw = _draw(feed, index)
        ids = list(example["input_ids"])
        free = [place for place, token in enumerate(ids) if token not in special]
        chosen = draw.sample(free, min(len(free), max(1, round(MASKED_SHARE * len(free)))))
        example["labels"] = [IGNORED] * len(ids)
        for place in chosen:
            example["labels"][place] = ids[place]
            kind = draw.random()
            if kind < _SHARE_MASKED:
                ids[place] = tokenizer.mask_token_id
            elif kind < _SHARE_MASKED + _SHARE_REPLACED:
                ids[place] = draw.randrange(len(tokenizer))
        example["input_ids"] = ids
        return example

    return Examples(len(texts), encode)


def encode_causal(feed: Feed) -> Examples:
    """Running text cut into blocks of `max_length` tokens, nothing padded, in order.

    Rows are joined by the end token; a last shorter block is left out unless it is the only one.

    Raises:
        DataError: The text has fewer than two tokens.
    """
    length = feed.max_length
    wanted = None if feed.limit is None or feed.shuffle else feed.limit * length
    ids = _stream(feed, wanted)
    starts = list(range(0, len(ids) - length + 1, length)) or [0]
    if len(ids) < _SHORTEST:
        raise DataError(
            f"{feed.rows.origin}: holds {len(ids)} tokens, needed at least 2 to predict one; give "
            "a longer text."
        )
    if feed.shuffle:
        random.Random(feed.seed).shuffle(starts)

    def encode(index: int) -> Example:
        block = ids[starts[index] : starts[index] + length]
        return {"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)}

    return Examples(limited(feed, len(starts)), encode)


def encode_seq2seq(feed: Feed) -> Examples:
    """Texts with their targets; without targets, texts to be restored (see `corrupt`)."""
    texts, target = _texts(feed), feed.columns.target
    tokenizer = feed.source.tokenizer
    row = row_getter(feed, [target]) if target else None

    def encode(index: int) -> Example:
        example = _tokenize(feed, texts[index])
        if row is None or target is None:
            ids, labels = corrupt(example["input_ids"], tokenizer, _draw(feed, index))
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        value = row(index)[target]
        if not isinstance(value, str):
            raise DataError(
                f"{feed.rows.origin}: column {target!r} holds {value!r} in row {index}, needed "
                "text; check --target-column."
            )
        example["labels"] = tokenizer(
            text_target=value, truncation=True, max_length=feed.max_length
        )["input_ids"]
        return example

    return Examples(len(texts), encode)


def encode_tokens(feed: Feed) -> Examples:
    """Words with a label each; the first piece of a word bears it, the others are ignored.

    Raises:
        DataError: The tokenizer cannot say which word a piece belongs to.
    """
    column = feed.columns.label
    if column is None:
        return encode_class(feed)
    tokenizer = feed.source.tokenizer
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__}: is a slow tokenizer, which cannot tell the words of its "
            "pieces; save a fast one beside the model."
        )
    count = limited(feed, len(feed.rows.dataset))
    labels = token_labels(
        feed.rows.dataset.select(range(count)),
        column,
        feed.source.config,
        origin=feed.rows.origin,
        label_map=feed.label_map,
    )
    row = row_getter(feed, feed.columns.text)

    def encode(index: int) -> Example:
        words = row(index)[feed.columns.text[0]]
        _check_text(words, feed, feed.columns.text[0], index, words=True)
        if len(words) != len(labels.values[index]):
            raise DataError(
                f"{feed.rows.origin}: row {index} has {len(words)} words in "
                f"{feed.columns.text[0]!r} and {len(labels.values[index])} labels in {column!r}, "
                "needed one label per word; mend the row, or check --label-column."
            )
        encoding = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=feed.max_length
        )
        of_word = encoding.word_ids()
        example: Example = dict(encoding)
        example["labels"] = [
            labels.values[index][word] if word is not None and word != before else IGNORED
            for word, before in zip(of_word, [None, *of_word], strict=False)
        ]
        return example

    return Examples(count, encode, labels.note, labels.names)


def encode_span(feed: Feed) -> Examples:
    """Questions with contexts, and where the first answer is (0 if it was cut off)."""
    column = feed.columns.target
    if feed.prose or column is None:
        return encode_class(feed)
    tokenizer = feed.source.tokenizer
    question, context = feed.columns.text
    row = row_getter(feed, (question, context, column))

    def encode(index: int) -> Example:
        values = row(index)
        for name in (question, context):
            _check_text(values[name], feed, name, index)
        encoding = tokenizer(
            values[question],
            values[context],
            truncation="only_second",
            max_length=feed.max_length,
            return_offsets_mapping=True,
        )
        first, last = _answer_characters(values[column], feed, index, values[context])
        places = [
            place
            for place, (begin, end) in enumerate(encoding["offset_mapping"])
            if encoding.sequence_ids()[place] == 1 and begin < last and end > first
        ]
        example = {key: value for key, value in encoding.items() if key != "offset_mapping"}
        example["start_positions"] = places[0] if places else 0
        example["end_positions"] = places[-1] if places else 0
        return example

    return Examples(limited(feed, len(feed.rows.dataset)), encode)


ENCODERS: Mapping[Head, Callable[[Feed], Examples]] = {
    Head.CLASS: encode_class,
    Head.BASE: encode_class,
    Head.TOKENS: encode_tokens,
    Head.SPAN: encode_span,
    Head.MASKED: encode_masked,
    Head.CAUSAL: encode_causal,
    Head.SEQ2SEQ: encode_seq2seq,
}


def corrupt(tokens: list[int], tokenizer: Any, draw: random.Random) -> tuple[list[int], list[int]]:
    """Make a task for a sequence-to-sequence model out of plain text.

    With sentinel tokens, spans of 15 % are cut out and asked for (T5, Raffel et al. 2020, section
    3.1.4); with a mask token, spans of 30 % become one mask each and the whole text is asked for
    (BART, Lewis et al. 2020, section 2.2, with spans of 3); else the second half is asked for.

    Returns:
        Input tokens and labels.
    """
    special = set(tokenizer.all_special_ids)
    inside = [place for place, token in enumerate(tokens) if token not in special]
    if not inside:
        return tokens, list(tokens)
    head, tail = tokens[: inside[0]], tokens[inside[-1] + 1 :]
    body = tokens[inside[0] : inside[-1] + 1]
    sentinels = _sentinels(tokenizer)
    if sentinels:
        spans = _spans(len(body), 0.15, draw)[: len(sentinels) - 1]
        labels = []
        for sentinel, (begin, end) in zip(sentinels, spans, strict=False):
            labels += [sentinel, *body[begin:end]]
        marks = [[sentinel] for sentinel in sentinels]
        labels += [sentinels[len(spans)], *tail]
        return head + _replace(body, spans, marks) + tail, labels
    if tokenizer.mask_token_id is not None:
        spans = _spans(len(body), 0.3, draw)
        marks = [[tokenizer.mask_token_id]] * len(spans)
        return head + _replace(body, spans, marks) + tail, list(tokens)
    half = max(1, len(body) // 2)
    return head + body[:half] + tail, head + (body[half:] or body) + tail


def _sentinels(tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    names = (f"<extra_id_{index}>" for index in range(100))
    return [vocabulary[name] for name in names if name in vocabulary]


def _spans(length: int, share: float, draw: random.Random) -> list[tuple[int, int]]:
    """Spans of up to 3 tokens, one in each of equal segments, never touching one another."""
    count = max(1, round(length * share / _SPAN))
    spans = []
    for index in range(count):
        begin, end = length * index // count, length * (index + 1) // count
        width = min(_SPAN, max(1, end - begin - 1))
        start = begin + draw.randrange(max(1, end - begin - width))
        spans.append((start, min(start + width, length)))
    return spans


def _replace(body: list[int], spans: list[tuple[int, int]], marks: list[list[int]]) -> list[int]:
    replaced: list[int] = []
    done = 0
    for (begin, end), mark in zip(spans, marks, strict=False):
        replaced += [*body[done:begin], *mark]
        done = end
    return replaced + body[done:]


def _texts(feed: Feed) -> list[tuple[str, ...]]:
    """Texts of the examples, one or two each; running text as passages of `max_length`."""
    if feed.prose and feed.rows.text is not None:
        passages: list[tuple[str, ...]] = []
        for passage in _passages(feed):
            passages.append((passage,))
            if not feed.shuffle and feed.limit is not None and len(passages) >= feed.limit:
                break
        if feed.shuffle:
            random.Random(feed.seed).shuffle(passages)
        return passages[: feed.limit]
    count = limited(feed, len(feed.rows.dataset))
    names = feed.columns.text
    columns = [list(feed.rows.dataset.select(range(count))[name]) for name in names]
    texts = list(zip(*columns, strict=True))
    for row, values in enumerate(texts):
        for name, value in zip(names, values, strict=True):
            words = isinstance(value, list) and feed.source.task.head is Head.TOKENS
            _check_text(value, feed, name, row, words=words)
    return texts


def _check_text(value: Any, feed: Feed, name: str, row: int, *, words: bool = False) -> None:
    """Refuse what is no text; or no list of words."""
    is_right = isinstance(value, list) and all(isinstance(word, str) for word in value)
    if not (is_right if words else isinstance(value, str)):
        raise DataError(
            f"{feed.rows.origin}: column {name!r} holds {value!r:.80} in row {row}, needed "
            f"{'a list of words' if words else 'text'}; check --text-column."
        )


def _passages(feed: Feed) -> Iterator[str]:
    """Lines joined for as long as they fit into one example; a line is never cut in two."""
    tokenizer = feed.source.tokenizer
    room = max(1, feed.max_length - tokenizer.num_special_tokens_to_add())
    lines = text_lines(feed.rows.text or "")
    passage: list[str] = []
    used = 0
    for start in range(0, len(lines), 1000):
        part = lines[start : start + 1000]
        encoded = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for line, ids in zip(part, encoded, strict=True):
            if passage and used + len(ids) > room:
                yield "\n".join(passage)
                passage, used = [], 0
            passage.append(line)
            used += len(ids) + 1
    if passage:
        yield "\n".join(passage)


def _stream(feed: Feed, wanted: int | None) -> list[int]:
    """Tokens of all texts in order, or of as much as `wanted` tokens need."""
    tokenizer = feed.source.tokenizer
    if feed.rows.text is not None:
        text = feed.rows.text
        size = len(text) if wanted is None else _CHARACTERS_PER_TOKEN * wanted
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if wanted is not None and len(ids) <= wanted and size < len(text):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if wanted is None else ids[:wanted]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = []
    column = feed.columns.text[0]
    for start in range(0, len(feed.rows.dataset), 1000):
        texts = [text for text in feed.rows.dataset[start : start + 1000][column] if text]
        for row, text in enumerate(texts):
            _check_text(text, feed, column, start + row)
        if texts:
            for part in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                ids += [*part, *end]
        if wanted is not None and len(ids) >= wanted:
            return ids[:wanted]
    return ids


def _tokenize(feed: Feed, texts: tuple[Any, ...]) -> Example:
    words = isinstance(texts[0], list)
    return dict(
        feed.source.tokenizer(
            *texts, truncation=True, max_length=feed.max_length, is_split_into_words=words
        )
    )


def _answer_characters(answers: Any, feed: Feed, index: int, context: str) -> tuple[int, int]:
    """First and one past the last character of the first answer; (0, 0) without one."""
    try:
        texts, starts = answers["text"], answers["answer_start"]
        if not texts and isinstance(texts, list):
            return 0, 0
        text, start = texts[0], starts[0]
        is_known = isinstance(texts, list) and isinstance(text, str) and type(start) is int
    except (TypeError, KeyError, IndexError):
        is_known = False
    if not is_known or not 0 <= start <= len(context) - len(text):
        raise DataError(
            f"{feed.rows.origin}: column {feed.columns.target!r} holds {answers!r:.80} in row "
            f"{index}, needed {{'text': [...], 'answer_start': [...]}} inside a context of "
            f"{len(context)} characters; check --target-column."
        )
    return start, start + len(text)


def _draw(feed: Feed, index: int) -> random.Random:
    """Random numbers that depend on seed and example only, in every process."""
    return random.Random(f"{feed.seed}:{index}")
