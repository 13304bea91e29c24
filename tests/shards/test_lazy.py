"""Lazy tensors: what operations make of them is what they make of the numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from hf_gradnas.errors import CutError
from hf_gradnas.shards.lazy import LazyTensor
from hf_gradnas.shards.parts import Stored, Taken, picked

VALUES = torch.arange(4 * 6 * 8, dtype=torch.float64).reshape(4, 6, 8) ** 2
EACH = torch.tensor([[0, 2, 5], [1, 2, 3], [0, 4, 5], [2, 3, 4]])

CHOOSING = {
    "rows": lambda x: x.index_select(1, torch.tensor([5, 0, 2])),
    "no rows": lambda x: x.narrow(1, 0, 0).clone(),
    "rows of each matrix": lambda x: x.take_along_dim(EACH[..., None], 1),
    "columns of each matrix": lambda x: x.take_along_dim(EACH[:, None], 2),
    "rows of rows of each matrix": lambda x: x.take_along_dim(EACH[..., None], 1)[1:, 1],
    "chunks": lambda x: torch.chunk(x, 2, dim=1)[1],
    "splits": lambda x: torch.split(x, [1, 3, 2], dim=1)[1],
    "one of a list": lambda x: torch.chunk(x, 4, dim=0)[2].squeeze(0),
    "entries": lambda x: torch.unbind(x, 2)[3],
    "a column of rows of each matrix": lambda x: x.take_along_dim(EACH[..., None], 1)[..., 5],
    "a matrix of columns of each": lambda x: x[1:].take_along_dim(EACH[1:, None], 2)[1],
    "a matrix of chosen ones": lambda x: x.index_select(0, torch.tensor([3, 1]))[1],
    "a row of joined ones": lambda x: torch.cat([x, x[:, 1:3]], 1)[:, 7],
    "a matrix of joined ones": lambda x: torch.cat([x, x[:, 1:3]], 1)[2],
    "a place of turned ones": lambda x: x.permute(2, 0, 1)[3],
    "the last of turned ones": lambda x: x.permute(2, 0, 1)[:, :, 4],
    "the width that was given": lambda x: x.unsqueeze(1)[:, 0],
    "beside the width that was given": lambda x: x.unsqueeze(1)[2],
    "after the width that was given": lambda x: x.unsqueeze(1)[:, :, 4],
    "a matrix of another type": lambda x: x.to(torch.float16)[2],
    "stacked": lambda x: torch.stack([x, x + 0], 1)[:, 1, 2:],
    "joined, out of order": lambda x: torch.cat([x, x[:, 1:3]], 1).index_select(
        1, torch.tensor([7, 1, 6, 0])
    ),
    "turned": lambda x: x.transpose(1, 2)[:, ::2].permute(2, 0, 1),
    "a matrix": lambda x: nn.Parameter(x[1]).detach().t(),
    "another type": lambda x: x.to(torch.float16)[1:3],
    "a row of all": lambda x: x.flatten()[::7],
}
COMPUTING = {
    "folded": lambda x: x.view(4, 3, 2, 8).transpose(1, 2).reshape(24, 8)[3:9],
    "added": lambda x: (x * 2 + 1)[1],
    "of several results": lambda x: x.max(dim=1)[0],
    "zeros": lambda x: x.new_zeros(3),
}


def lazy(values: torch.Tensor) -> LazyTensor:
    return LazyTensor(Stored(lambda: values, tuple(values.shape), values.dtype))


@pytest.mark.parametrize("case", [*CHOOSING, *COMPUTING])
def test_an_operation_gives_the_same_numbers_once_they_are_read(case):
    run = {**CHOOSING, **COMPUTING}[case]
    wanted, found = run(VALUES), run(lazy(VALUES))
    assert isinstance(found, LazyTensor)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(found.part.whole(), wanted)
    if wanted.ndim and len(wanted) > 1:
        rest = [None] * (wanted.ndim - 1)
        assert torch.equal(found.part.read([torch.tensor([1]), *rest]), wanted[1:2])


@pytest.mark.parametrize("case", CHOOSING)
def test_choosing_reads_only_what_is_asked_for(case):
    if case not in ("stacked", "a row of all"):  # computes, and is read by outer slices
        assert CHOOSING[case](lazy(VALUES)).part.is_streamed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize(
    "rows", [[0, 1, 4, 5], [2, 3, 6, 7], [1, 2, 5, 6], [3], [0, 3, 4, 7], [], [6, 7, 0, 1], [2, 2]]
)
@pytest.mark.parametrize("long", [1, 64])
def test_rows_that_go_in_runs_are_the_same_rows(long, rows, dtype, monkeypatch):
    monkeypatch.setattr("hf_gradnas.shards.parts.LONG", long)
    index = torch.tensor(rows, dtype=torch.int64)
    values = VALUES.to(dtype)
    for dim in (1, 2):
        narrow = values.narrow(dim, 0, values.shape[dim])[..., :8]
        kept = index[index < narrow.shape[dim]]
        wanted = narrow.index_select(dim, kept)
        asked = [None] * dim + [kept] + [None] * (2 - dim)
        assert torch.equal(picked(narrow, asked), wanted)
        assert torch.equal(picked(narrow[1:, 1:3], [None, None, index]), narrow[1:, 1:3][..., rows])


def test_rows_of_a_stack_of_files_read_one_of_them():
    opened = []

    def part(number):
        def load():
            opened.append(number)
            return VALUES[number]

        return LazyTensor(Stored(load, (6, 8), torch.float64))

    stacks = [torch.stack([part(4 * n + i) for i in range(2)]) for n in range(1)]
    joined = torch.cat([*stacks, torch.stack([part(2), part(3)])], dim=1)
    row = torch.chunk(joined, 2, dim=1)[1].index_select(0, torch.tensor([1]))[0]
    assert opened == []
    assert torch.equal(row.part.read([torch.tensor([4]), None]), VALUES[3][4:5])
    assert opened == [3]


def test_an_expert_of_a_stack_is_found_once_and_not_for_every_row():
    """As a Mixtral is loaded, cut and saved: stacked, its experts and their columns chosen."""
    stored = [Stored(partial(VALUES.__getitem__, n), (6, 8), torch.float64) for n in range(4)]
    stack = torch.stack([LazyTensor(part) for part in stored])
    kept = stack.index_select(0, torch.tensor([0, 3])).take_along_dim(EACH[:2, None], 2)
    expert = torch.chunk(kept, 2, dim=0)[1].squeeze(0)
    assert torch.equal(expert.part.whole(), VALUES[3][:, EACH[1]])
    assert isinstance(expert.part, Taken)
    assert expert.part._base is stored[3]


def test_answers_that_are_no_tensors_come_from_the_numbers():
    assert lazy(VALUES).sum().item() == VALUES.sum().item()
    assert torch.equal(lazy(VALUES), VALUES)


def test_nothing_is_written_into_what_is_only_read():
    before = VALUES.clone()
    for write in (lambda x: x.zero_(), lambda x: x[0].fill_(1.0), lambda x: x.view(24, 8).zero_()):
        with pytest.raises(CutError, match=r"would write into .* only read .* in memory"):
            write(lazy(VALUES))
    assert torch.equal(VALUES, before)


def test_what_is_written_into_a_result_must_not_be_read():
    result = lazy(VALUES) * 2
    assert result.normal_() is result
    with pytest.raises(CutError, match=r"normal_.* wrote into a tensor .* cut it in memory"):
        result.part.whole()


# -- what is written under another name -----------------------------------------------------------

ALIASES = {
    "itself": lambda x: x,
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "parameter": lambda x: nn.Parameter(x).data,
    "a view of another shape": lambda x: x.view(-1),
    "a slice": lambda x: x[1],
    "expanded": lambda x: x.expand(2, *x.shape),
}


@pytest.mark.parametrize("case", ALIASES)
def test_a_result_that_is_written_into_under_another_name_is_not_read(case):
    result = lazy(VALUES) * 2
    refused = ALIASES[case](result)
    try:
        refused.mul_(3)
    except CutError:  # a view: refused at once, and nothing is changed
        assert torch.equal(result.part.whole(), VALUES * 2)
        assert case not in ("itself", "detached", "data", "parameter")
    else:
        with pytest.raises(CutError, match=r"mul_.* wrote into a tensor .* cut it in memory"):
            result.part.whole()


@pytest.mark.parametrize("case", ALIASES)
def test_another_name_of_what_is_written_into_is_not_read(case):
    result = lazy(VALUES) * 2
    alias = ALIASES[case](result)
    result.mul_(3)
    with pytest.raises(CutError, match=r"mul_.* wrote into a tensor"):
        alias.part.whole()


def test_a_result_that_is_written_as_out_is_the_one_that_is_not_read():
    source, result = lazy(VALUES) * 2, lazy(VALUES) * 3
    assert torch.mul(source, 5, out=result) is result
    assert torch.equal(source.part.whole(), VALUES * 2)
    with pytest.raises(CutError, match=r"mul.out: wrote into a tensor"):
        result.part.whole()
    with pytest.raises(CutError, match=r"mul.out: would write into"):
        torch.mul(source, 5, out=lazy(VALUES))


def test_arguments_that_change_before_the_result_is_read_are_noticed():
    scale, rows = torch.ones(8, dtype=torch.float64), torch.tensor([0, 1])
    result, chosen = lazy(VALUES) * scale, lazy(VALUES).index_select(1, rows)
    each = EACH[..., None].clone()
    taken = lazy(VALUES).take_along_dim(each, 1)
    for changed in (scale, rows, each):
        changed.zero_()
    assert torch.equal(chosen.part.whole(), VALUES[:, :2])
    assert torch.equal(taken.part.whole(), VALUES.take_along_dim(EACH[..., None], 1))
    with pytest.raises(CutError, match=r"mul.* has an argument that was written into later"):
        result.part.whole()


def test_data_that_is_set_is_what_is_read():
    parameter = nn.Parameter(lazy(VALUES))
    parameter.data = (parameter.data * 2)[1:3]
    assert parameter.shape == (2, 6, 8)
    assert torch.equal(parameter.part.whole(), VALUES[1:3] * 2)
    layer = nn.Linear(8, 6, bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(lazy(VALUES[0]))
    assert torch.equal(layer.half().weight.part.whole(), VALUES[0].half())
    with pytest.raises(CutError, match=r"data: would write into"):
        parameter.data = VALUES
    assert torch.equal(parameter.part.whole(), VALUES[1:3] * 2)


def test_arrays_and_other_libraries_cannot_write():
    before = VALUES.clone()
    with pytest.raises(ValueError, match="read-only"):
        lazy(VALUES).numpy()[0] = 1
    with pytest.raises(CutError, match="__dlpack__"):
        torch.from_dlpack(lazy(VALUES))
    assert torch.equal(VALUES, before)


def test_modules_hold_them_as_parameters():
    layer = nn.Linear(8, 6, bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(lazy(VALUES[0]))
    assert layer.weight.numel() == 48
    assert torch.equal(layer.state_dict()["weight"].part.whole(), VALUES[0])
