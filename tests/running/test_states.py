"""States that are put back, and numbers that are drawn again."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_gradnas.running import states
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


def test_numbers_are_seeded_where_an_offloaded_model_runs(monkeypatch):
    seen = []
    monkeypatch.setattr(states, "device_of", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(states, "seed", lambda number, devices: seen.append(devices))
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: nullcontext())
    with seeded(nn.Linear(2, 2, device="meta")):
        pass
    assert seen == [{torch.device("cuda", 0)}]
