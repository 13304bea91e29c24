"""Ridge regression from streamed sums: the same as from all rows at once."""

import pytest
import torch

from hf_gradnas.repair import ridge
from hf_gradnas.repair.ridge import NormalEquations


def rows(count, columns, outputs, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator, dtype=dtype) + 0.5
    weight = torch.randn(columns, outputs, generator=generator, dtype=dtype)
    noise = torch.randn(count, outputs, generator=generator, dtype=dtype)
    return x, x @ weight + 0.1 * noise + 2.0


def summed(x, residual, parts=4):
    sums = NormalEquations.empty(x.shape[1], residual.shape[1], x)
    for part, right in zip(x.chunk(parts), residual.chunk(parts), strict=True):
        sums.add(part, right)
    return sums


@pytest.mark.parametrize("columns", [1, 7, 700])  # more than one block of the product
@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_the_solution_is_that_of_the_penalised_problem(columns, ridge):
    x, residual = rows(400, columns, 5)
    found, intercept = summed(x, residual).solve(ridge, centred=False)
    gram = x.t() @ x
    penalty = ridge * gram.diagonal().mean() * torch.eye(columns, dtype=x.dtype)
    wanted = torch.linalg.solve(gram + penalty, x.t() @ residual)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert not intercept.any()


@pytest.mark.parametrize("columns", [1, 300])
def test_an_intercept_centres_inputs_and_residuals(columns):
    x, residual = rows(400, columns, 5)
    found, intercept = summed(x, residual).solve(0.1, centred=True)
    left, right = x - x.mean(0), residual - residual.mean(0)
    gram = left.t() @ left
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(columns, dtype=x.dtype)
    wanted = torch.linalg.solve(gram + penalty, left.t() @ right)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(intercept, residual.mean(0) - x.mean(0) @ found)


def test_solving_leaves_the_sums_as_they_were_so_that_more_rows_may_come():
    x, residual = rows(400, 300, 5)
    sums = summed(x[:200], residual[:200])
    first = sums.solve(0.3, centred=True)
    for again in (0.01, 0.3):
        found = sums.solve(again, centred=True)
    torch.testing.assert_close(found, first, rtol=0, atol=0)
    sums.add(x[200:], residual[200:])
    torch.testing.assert_close(
        sums.solve(0.1, centred=True), summed(x, residual).solve(0.1, centred=True)
    )


@pytest.mark.parametrize("centred", [True, False])
def test_some_outputs_are_solved_for_as_all_are(centred):
    x, residual = rows(400, 30, 11)
    sums = summed(x, residual)
    whole, intercept = sums.solve(0.1, centred=centred)
    found, own = sums.solve(0.1, centred=centred, every=3)
    torch.testing.assert_close(found, whole[:, ::3])
    torch.testing.assert_close(own, intercept[::3])


@pytest.mark.parametrize("columns", [0, 30])
def test_the_last_solution_takes_the_place_of_its_sums(columns):
    x, residual = rows(400, 30, 1100)  # more than one block of outputs
    sums = summed(x[:, :columns], residual)
    wanted = sums.solve(0.1, centred=True)
    found = sums.solve(0.1, centred=True, is_last=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert found[0].data_ptr() == sums.cross.data_ptr()  # in float64 there is no copy


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_a_pull_towards_weights_is_the_fit_of_what_they_leave(centred, every):
    x, wanted = rows(400, 30, 11)
    present = torch.randn(30, 11, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    change, shift = summed(x, wanted - x @ present).solve(0.1, centred=centred, every=every)
    found, intercept = summed(x, wanted).solve(
        0.1,
        centred=centred,
        every=every,
        towards=lambda part: present[:, part.start : part.stop : part.step],
    )
    torch.testing.assert_close(found, present[:, ::every] + change)
    torch.testing.assert_close(intercept, shift)


@pytest.mark.parametrize("room", [0, 5000, 1 << 24])  # rows of none, some and all calls at once
def test_rows_may_be_written_to_once_they_were_added(room, monkeypatch):
    monkeypatch.setattr(ridge, "_WAITING", room)
    x, residual = rows(400, 30, 5)
    sums = NormalEquations.empty(30, 5, x)
    for part, right in zip(x.clone().chunk(9), residual.clone().chunk(9), strict=True):
        sums.add(part, right)
        part.zero_(), right.zero_()
    assert sums.rows == 400
    torch.testing.assert_close(
        sums.solve(0.1, centred=True), summed(x, residual, 1).solve(0.1, centred=True)
    )


def test_without_inputs_only_the_intercept_is_left():
    x, residual = rows(40, 3, 5)
    sums = summed(x[:, :0], residual)
    found, intercept = sums.solve(1.0, centred=True)
    assert found.shape == (0, 5)
    torch.testing.assert_close(intercept, residual.mean(0))


def test_inputs_that_are_all_zero_have_no_solution():
    sums = summed(torch.zeros(10, 3, dtype=torch.float64), torch.ones(10, 2, dtype=torch.float64))
    assert sums.solve(0.1, centred=False) is None


def test_fewer_rows_than_inputs_are_solved_by_the_ridge():
    x, residual = rows(5, 40, 3)
    found, _ = summed(x, residual, parts=1).solve(1e-3, centred=False)
    assert torch.isfinite(found).all()
    assert (residual - x @ found).norm() < 0.2 * residual.norm()


def test_sums_are_cleared():
    x, residual = rows(20, 3, 2)
    sums = summed(x, residual)
    sums.clear()
    assert sums.rows == 0
    sums.add(x, residual)
    torch.testing.assert_close(
        sums.solve(0.1, centred=True), summed(x, residual).solve(0.1, centred=True)
    )
