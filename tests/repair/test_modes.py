"""What torch keeps for a thread is each waiting forward's own."""

from functools import partial

import pytest
import torch
import zoo
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from hf_gradnas import Plan
from hf_gradnas.masks import masked
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.repair.modes import Modes
from hf_gradnas.verification import find_structure


class Counting(TorchFunctionMode):
    """Counts the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_are_put_back():
    first, second = Counting(), Counting()
    with first:
        outside = Modes.now()
        second.__enter__()
        torch.set_grad_enabled(False)
        inside = Modes.now()
        outside.set()
        assert _get_current_function_mode_stack() == [first]
        assert torch.is_grad_enabled()
        before = first.count, second.count
        torch.zeros(1).add(1)
        assert (first.count, second.count) == (before[0] + 2, before[1])
        inside.set()
        assert _get_current_function_mode_stack() == [first, second]
        second.__exit__(None, None, None)
        outside.set()
    assert _get_current_function_mode_stack() == []


@pytest.mark.filterwarnings("ignore:repair")
def test_a_masked_router_is_not_that_of_other_forwards_that_wait_in_the_block():
    with zoo.float64_throughout():
        model, batch = zoo.build("dots1")  # its shared experts are fitted within the block
        axes = find_structure(model, batch).axes
        kept = {axis.name: tuple(range(axis.size)) for axis in axes}
        for axis in axes:
            if axis.name.endswith(("mlp:experts", "shared_experts:neurons")):
                kept[axis.name] = tuple(range(axis.size))[axis.size // 3 :]
        plan = Plan(kept, {axis.name: axis.size for axis in axes}, layout="per_layer")
        repair = find_repair(model, axes, plan, [batch] * 11)
        (wanted,) = divergences(model, [batch], [partial(masked, model, axes, kept)])
    assert any("shared_experts.down_proj" in site.module for site in repair.sites)
    assert repair.kl_before == pytest.approx(wanted, rel=1e-9)
