"""Labels that meet in products, and operations without a rule, which are measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_gradnas.structure.labels import NOBODY, Labels, nobody, varying
from hf_gradnas.structure.measuring import measured


def rows_of(*groups: list[Tensor]) -> Tensor:
    """One row a product, padded with nobody."""
    rows = [torch.cat(group) for group in groups]
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, nobody([width - len(row)])]) for row in rows])


def test_entries_that_meet_in_the_same_products_go_together() -> None:
    labels = Labels()
    queries, keys = labels.fresh(6).view(2, 3), labels.fresh(6).view(2, 3)
    finest = labels.meet(
        rows_of(*([q, k] for q, k in zip(queries, keys, strict=True))), 0, "", record=True
    )
    assert finest.tolist() == [0, 3]
    for head in range(2):
        assert set(labels.roots(queries[head])) == set(labels.roots(keys[head])) == {3 * head}
    assert labels.standing() == {}


def test_heads_stand_in_the_group_whose_keys_they_share() -> None:
    labels = Labels()
    queries, keys, values = labels.fresh(8).view(4, 2), labels.fresh(4).view(2, 2), labels.fresh(2)
    rows = rows_of(*([queries[h], keys[h // 2]] for h in range(4)))
    scores = labels.meet(rows, 0, "", record=True)
    assert scores.tolist() == [0, 2, 4, 6]
    rows = rows_of(*([scores[h : h + 1], values[h // 2 : h // 2 + 1]] for h in range(4)))
    assert labels.meet(rows, 1, "", record=True).tolist() == [0, 2, 4, 6]
    groups = [labels.roots(keys[group, :1])[0] for group in range(2)]
    assert labels.roots(values) == groups  # what heads stand in with keys and with values is one
    assert labels.standing() == {0: groups[0], 2: groups[0], 4: groups[1], 6: groups[1]}


def test_entries_whose_products_only_overlap_go_together() -> None:
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    labels.meet(rows_of([a[:1], b[:1]], [a[:1], b[1:2]], [a[1:2], b[1:2]]), 0, "", record=True)
    assert labels.roots(torch.stack([a[0], b[1]])) == [0, 0]
    assert labels.standing() == {1: 0, 3: 0}  # the others meet in some of the same only


def test_what_keeps_its_size_along_one_dimension_ties_along_it() -> None:
    labels = Labels()
    heads = labels.fresh(6).view(1, 2, 3)
    labels.fix(heads, [2], "a constant")
    assert labels.roots(heads.flatten()) == [0, 0, 0, 3, 3, 3]
    assert not labels.reasons()
    labels.fix(labels.settled(heads), [1], "a constant")
    assert set(labels.reasons()) == {0, 3}


OPERATIONS = {
    "flip": (lambda x: x.flip(2), [2, 1, 0]),
    "gather": (lambda x: x[:, :, [1, 2, 0]], [1, 2, 0]),
    "pad": (lambda x: torch.nn.functional.pad(x, (1, 0)), [NOBODY, 0, 1, 2]),
    "cumulative sum": (lambda x: x.cumsum(1), [0, 1, 2]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_without_a_rule_moves_labels_as_it_moves_gradients(name: str) -> None:
    operation, wanted = OPERATIONS[name]
    labels = Labels()
    x = labels.fresh(3).expand(2, 4, 3)
    out = operation(torch.rand(2, 4, 3, requires_grad=True) + 0.5)
    (found,) = measured(out.grad_fn, [x], [tuple(out.shape)], labels, "")
    assert found.shape == out.shape
    assert varying(found) == (2,)
    assert found[0, 0].tolist() == wanted
    assert not labels.reasons()


def test_an_operation_that_sums_over_units_ties_them() -> None:
    labels = Labels()
    out = (torch.rand(2, 3, requires_grad=True) + 0.5).cumsum(1)
    measured(out.grad_fn, [labels.fresh(3).expand(2, 3)], [(2, 3)], labels, "")
    assert labels.roots(torch.arange(3)) == [0, 0, 0]
