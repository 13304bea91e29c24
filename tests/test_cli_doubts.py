"""Warnings about figures that are worse than guessing."""

import pytest
from transformers import BertConfig, T5Config

from hf_gradnas.cli.doubts import warn_of_doubts
from hf_gradnas.cli.evaluate import Metrics
from hf_gradnas.cli.tasks import Head
from hf_gradnas.errors import GradNASWarning

TWO = BertConfig(num_labels=2)


def test_an_accuracy_below_chance_names_the_order_of_the_labels():
    metrics = Metrics(examples=80, loss=2.0, accuracy=0.1)
    with pytest.warns(GradNASWarning, match=r"10.0% on 80 examples.*50.0%.*--label-map"):
        warn_of_doubts(metrics, Head.CLASS, TWO)


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
    warn_of_doubts(Metrics(examples, 1.0, accuracy), Head.CLASS, config)


def test_a_perplexity_above_the_vocabulary_names_the_tokenizer():
    metrics = Metrics(examples=4, loss=9.0, perplexity=8000.0)
    with pytest.warns(GradNASWarning, match=r"8,000 on 4 examples.*the 500 tokens.*tokenizer"):
        warn_of_doubts(metrics, Head.SEQ2SEQ, T5Config(vocab_size=500))


def test_a_perplexity_of_the_vocabulary_is_that_of_an_untrained_model():
    metrics = Metrics(examples=4, loss=6.2, perplexity=503.0)
    warn_of_doubts(metrics, Head.CAUSAL, BertConfig(vocab_size=500))
