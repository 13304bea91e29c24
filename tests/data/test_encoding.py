"""Examples for every kind of head, and how they are padded."""

import random

import pytest
import torch
import transformers as tf
from cli_cases import BERT_TOKENS, VOCABULARY, save_bert, save_whisper, sentences, word_tokenizer
from datasets import Dataset

from hf_gradnas.data.columns import Columns
from hf_gradnas.data.encoding import ENCODERS, corrupt
from hf_gradnas.data.examples import Collator, Feed
from hf_gradnas.data.files import Rows
from hf_gradnas.data.loading import Source
from hf_gradnas.data.tasks import TASKS, Head
from hf_gradnas.errors import DataError

MASK, EOS = 4, 5


def _source(head, tokenizer=None, **config):
    task = next(task for task in TASKS.values() if task.head is head)
    tokenizer = tokenizer or word_tokenizer(**BERT_TOKENS)
    return Source(tf.BertConfig(**config), None, task, "text", tokenizer, tokenizer)


def _feed(head, data, columns, *, tokenizer=None, max_length=8, labelled=True, config=None, **more):
    rows = Rows(Dataset.from_dict(data), "data")
    if isinstance(data.get("text"), str):
        raise AssertionError
    source = _source(head, tokenizer, **(config or {}))
    return Feed(rows, columns, source, max_length, labelled=labelled, **more)


def _prose(head, text, *, tokenizer=None, max_length=8, **more):
    rows = Rows(Dataset.from_dict({"text": text.splitlines()}), "data", text=text)
    source = _source(head, tokenizer)
    return Feed(rows, Columns(("text",)), source, max_length, labelled=True, prose=True, **more)


def _encode(feed):
    return ENCODERS[feed.source.task.head](feed)


def test_texts_are_truncated_and_labelled():
    data = {"text": ["film " * 20, "bad"], "label": [1, 0]}
    examples = _encode(_feed(Head.CLASS, data, Columns(("text",), label="label")))
    assert [len(example["input_ids"]) for example in examples] == [8, 3]
    assert [example["labels"] for example in examples] == [1, 0]


def test_pairs_share_the_length():
    data = {"a": ["film " * 20], "b": ["bad " * 20]}
    examples = _encode(_feed(Head.CLASS, data, Columns(("a", "b")), labelled=False))
    ids = examples[0]["input_ids"]
    assert len(ids) == 8
    assert ids.count(word_tokenizer(**BERT_TOKENS).sep_token_id) == 2
    assert "labels" not in examples[0]


def test_the_limit_takes_the_first():
    data = {"text": sentences(9), "label": [0, 1, 1, 0, 1, 0, 0, 0, 0]}
    examples = _encode(_feed(Head.CLASS, data, Columns(("text",), label="label"), limit=4))
    assert [example["labels"] for example in examples] == [0, 1, 1, 0]


def test_masked_tokens_are_the_same_every_time_and_never_special():
    feed = _prose(Head.MASKED, "\n".join(sentences(60)), max_length=32)
    examples, again = _encode(feed), _encode(feed)
    masked = guessed = 0
    for index in range(len(examples)):
        example = examples[index]
        assert example == again[index]
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            if label != -100:
                assert label > EOS
                guessed += 1
                masked += token == MASK
            else:
                assert token != MASK
    tokens = sum(len(example["input_ids"]) - 2 for example in examples)
    assert guessed / tokens == pytest.approx(0.15, abs=0.02)
    assert masked / guessed == pytest.approx(0.8, abs=0.15)


def test_another_seed_masks_other_tokens():
    text = "\n".join(sentences(60))
    one = _encode(_prose(Head.MASKED, text, seed=0))
    other = _encode(_prose(Head.MASKED, text, seed=1))
    assert any(one[index] != other[index] for index in range(len(one)))


def test_passages_hold_whole_lines():
    feed = _prose(Head.CLASS, "good film\nbad film\n\nthe plot of the film was bad bad bad bad\na")
    lengths = [len(example["input_ids"]) for example in _encode(feed)]
    assert lengths == [6, 8, 3]


def test_blocks_are_the_text_in_order():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    text = "\n".join(sentences(30))
    ids = tokenizer(text)["input_ids"]
    examples = _encode(_prose(Head.CAUSAL, text, tokenizer=tokenizer))
    assert [token for example in examples for token in example["input_ids"]] == ids[
        : len(ids) // 8 * 8
    ]
    assert all(example["labels"] == example["input_ids"] for example in examples)
    first = _encode(_prose(Head.CAUSAL, text, tokenizer=tokenizer, limit=3))
    assert [first[i] for i in range(len(first))] == [examples[i] for i in range(3)]
    mixed = _encode(_prose(Head.CAUSAL, text, tokenizer=tokenizer, limit=3, shuffle=True))
    assert [mixed[i] for i in range(3)] != [examples[i] for i in range(3)]


def test_rows_are_joined_by_the_end_token():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    data = {"text": ["good film", "", "bad"]}
    examples = _encode(
        _feed(Head.CAUSAL, data, Columns(("text",)), tokenizer=tokenizer, max_length=5)
    )
    (only,) = examples
    film = tokenizer("good film bad")["input_ids"]
    assert only["input_ids"] == [*film[:2], EOS, film[2], EOS]


def test_a_text_shorter_than_a_block_is_one_example():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    assert len(_encode(_prose(Head.CAUSAL, "good film", tokenizer=tokenizer))[0]["labels"]) == 2


def test_targets_are_labels():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    data = {"text": ["good film"], "sum": ["good"]}
    columns = Columns(("text",), target="sum")
    (example,) = _encode(_feed(Head.SEQ2SEQ, data, columns, tokenizer=tokenizer))
    assert example["labels"] == tokenizer("good")["input_ids"]


def test_spans_are_cut_out_for_sentinels():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    tokens = [*range(12, 32), EOS]
    ids, labels = corrupt(tokens, tokenizer, random.Random(0))
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    place = ids.index(first)
    span = labels[1:-2]
    assert labels == [first, *span, first + 1, EOS]
    assert ids[:place] + span + ids[place + 1 :] == tokens


def test_spans_become_one_mask_each_without_sentinels():
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(**BERT_TOKENS).backend_tokenizer, mask_token="[MASK]"
    )
    tokenizer.get_vocab = dict
    tokens = list(range(12, 32))
    ids, labels = corrupt(tokens, tokenizer, random.Random(0))
    assert labels == tokens
    assert ids.count(MASK) == 2
    assert len(ids) == 16


def test_the_second_half_is_asked_for_without_either():
    tokenizer = word_tokenizer(pair=False, eos_token="</s>")
    tokenizer.get_vocab = dict
    assert corrupt([20, 21, 22, 23, EOS], tokenizer, random.Random(0)) == (
        [20, 21, EOS],
        [22, 23, EOS],
    )


def test_the_first_piece_of_a_word_bears_its_label():
    data = {"tokens": [["good", "film-plot"]], "tags": [[0, 1]]}
    columns = Columns(("tokens",), label="tags")
    (example,) = _encode(_feed(Head.TOKENS, data, columns))
    assert example["labels"] == [-100, 0, 1, -100, -100, -100]


def test_answers_become_places():
    data = {
        "question": ["the plot"] * 2,
        "context": ["a good long film", "a good long film"],
        "answers": [
            {"text": ["good long"], "answer_start": [2]},
            {"text": [], "answer_start": []},
        ],
    }
    columns = Columns(("question", "context"), target="answers")
    examples = _encode(_feed(Head.SPAN, data, columns, max_length=16))
    places = [(example["start_positions"], example["end_positions"]) for example in examples]
    assert places == [(5, 6), (0, 0)]


def test_batches_are_padded_on_the_right(tmp_path):
    model = tf.AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path))
    collate = Collator(_source(Head.TOKENS), model)
    batch = collate(
        [
            {"input_ids": [2, 3], "labels": [1, 1], "unknown": 1},
            {"input_ids": [2, 9, 3], "labels": [0, 0, 0], "unknown": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[2, 3, 0], [2, 9, 3]]
    assert batch["labels"].tolist() == [[1, 1, -100], [0, 0, 0]]
    assert set(batch) == {"input_ids", "labels"}


def test_other_shapes_than_one_are_refused(tmp_path):
    model = tf.WhisperForConditionalGeneration.from_pretrained(save_whisper(tmp_path))
    collate = Collator(_source(Head.SEQ2SEQ), model.half())
    features = [{"input_features": torch.zeros(2, length)} for length in (3, 3)]
    assert collate(features)["input_features"].dtype == torch.float16
    with pytest.raises(DataError, match=r"input_features: .*shapes.*--batch-size 1"):
        collate([*features, {"input_features": torch.zeros(2, 4)}])


def test_a_tokenizer_without_mask_is_refused():
    tokenizer = word_tokenizer(pair=False)
    with pytest.raises(DataError, match="has no mask token"):
        _encode(_prose(Head.MASKED, "good", tokenizer=tokenizer))


def test_too_short_a_text_is_refused():
    with pytest.raises(DataError, match="holds 1 tokens, needed at least 2"):
        _encode(_prose(Head.CAUSAL, "good"))


def test_what_is_not_text_is_refused():
    data = {"text": ["good", None]}
    with pytest.raises(DataError, match="holds None in row 1, needed text"):
        _encode(_feed(Head.CLASS, data, Columns(("text",)), labelled=False))
    data = {"text": ["good"], "sum": [None]}
    with pytest.raises(DataError, match="column 'sum' holds None in row 0"):
        _encode(_feed(Head.SEQ2SEQ, data, Columns(("text",), target="sum")))[0]


def test_other_answers_are_refused():
    data = {"question": ["a"], "context": ["b"], "answers": ["b"]}
    columns = Columns(("question", "context"), target="answers")
    with pytest.raises(DataError, match=r"needed {'text'"):
        _encode(_feed(Head.SPAN, data, columns))[0]


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["b"], "answer_start": [-1]},
        {"text": ["b"], "answer_start": [9]},
        {"text": ["b"], "answer_start": [0.5]},
        {"text": ["b"], "answer_start": ["x"]},
        {"text": ["b"], "answer_start": []},
        {"text": [1], "answer_start": [0]},
    ],
)
def test_answers_outside_their_context_are_refused(answers):
    data = {"question": ["a"], "context": ["b c"], "answers": [answers]}
    columns = Columns(("question", "context"), target="answers")
    with pytest.raises(DataError, match="inside a context of 3 characters"):
        _encode(_feed(Head.SPAN, data, columns))[0]


def test_a_question_that_is_missing_is_refused():
    data = {"question": ["a", None], "context": ["b", "c"], "answers": [None, None]}
    columns = Columns(("question", "context"), target="answers")
    with pytest.raises(DataError, match="'question' holds None in row 1, needed text"):
        _encode(_feed(Head.SPAN, data, columns))[1]


@pytest.mark.parametrize(
    ("tokens", "labels", "match"),
    [
        (["a", "b"], [0], "row 0 has 2 words in 'tokens' and 1 labels in 'tags'"),
        (["a"], [0, 1], "needed one label per word"),
        (["a", None], [0, 1], "needed a list of words"),
    ],
)
def test_words_without_a_label_each_are_refused(tokens, labels, match):
    data = {"tokens": [tokens], "tags": [labels]}
    columns = Columns(("tokens",), label="tags")
    with pytest.raises(DataError, match=match):
        _encode(_feed(Head.TOKENS, data, columns))[0]


def test_examples_end():
    examples = _encode(_prose(Head.CLASS, "good"))
    assert len(list(examples)) == 1
    assert len(word_tokenizer()) <= VOCABULARY
