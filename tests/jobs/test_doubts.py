"""Warnings about figures that are worse than guessing."""

import pytest
from transformers import BertConfig, T5Config

from hf_gradnas.data.tasks import Head
from hf_gradnas.jobs.measuring import Metrics, doubts

TWO = BertConfig(num_labels=2)


def test_an_accuracy_below_chance_names_the_order_of_the_labels():
    metrics = Metrics(examples=80, loss=2.0, accuracy=0.1)
    (said,) = doubts(metrics, Head.CLASS, TWO)
    assert "10.0% on 80 examples" in said
    assert "50.0%" in said
    assert "--label-map" in said


@pytest.mark.parametrize(
    ("examples", "accuracy", "config"),
    [
        (80, 0.5, TWO),
        (8, 0.25, TWO),  # too few to say
        (80, 0.1, BertConfig(num_labels=2, problem_type="multi_label_classification")),
        (80, 0.1, BertConfig(num_labels=10)),
        (80, None, BertConfig(num_labels=1)),
    ],
)
def test_what_guessing_reaches_too_is_not_told(examples, accuracy, config):
    assert doubts(Metrics(examples, 1.0, accuracy), Head.CLASS, config) == []


def test_a_perplexity_above_the_vocabulary_names_the_tokenizer():
    metrics = Metrics(examples=4, loss=9.0, perplexity=8000.0)
    (said,) = doubts(metrics, Head.SEQ2SEQ, T5Config(vocab_size=500))
    assert "8,000 on 4 examples" in said
    assert "the 500 tokens" in said
    assert "tokenizer" in said


def test_a_perplexity_of_the_vocabulary_is_that_of_an_untrained_model():
    metrics = Metrics(examples=4, loss=6.2, perplexity=503.0)
    assert doubts(metrics, Head.CAUSAL, BertConfig(vocab_size=500)) == []
