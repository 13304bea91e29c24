"""States that are put back, and numbers that are drawn again."""

import pytest
import torch
from torch import nn

from hf_gradnas.running.states import seeded


def test_numbers_are_the_same_in_every_block_and_those_outside_go_on():
    model = nn.Linear(2, 2)
    torch.manual_seed(7)
    expected = torch.randn(2)
    torch.manual_seed(7)
    with seeded(model):
        first = torch.randn(3)
    with seeded(model):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.randn(2), expected)


def test_on_the_cpu_no_other_backend_is_asked(monkeypatch):
    # Each that has not started would keep the call's stack, which takes milliseconds.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    with seeded(nn.Linear(2, 2)):
        torch.randn(3)
