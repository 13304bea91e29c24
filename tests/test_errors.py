"""What is said of an error of another library."""

import pytest

from hf_gradnas.errors import described, first_line


@pytest.mark.parametrize(
    ("error", "line", "in_words", "whole"),
    [
        (ValueError("one\n  two"), "one", "ValueError: one", "ValueError: one two"),
        (ValueError("\n  two\n"), "two", "ValueError: two", "ValueError: two"),
        (StopIteration(), "StopIteration", "StopIteration", "StopIteration"),
    ],
)
def test_an_error_is_said_in_one_line(error, line, in_words, whole):
    assert first_line(error) == line
    assert described(error) == in_words
    assert described(error, whole=True) == whole
