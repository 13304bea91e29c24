"""Repair by least squares: what waits at the gates is what the new weights do in the model."""

import dataclasses
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
import zoo

from hf_gradnas import GradNASPruner
from hf_gradnas.masks import masked
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.repair.repairs import repaired


@pytest.fixture(autouse=True)
def _few_rows():
    """Tiny models have fewer positions than inputs, which is said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "repair: .* was fitted on")
        yield


def planned(family, *, flops="70%", layout="per_layer"):
    """A tiny float64 model with its batch, pruner and plan."""
    model, batch = zoo.build(family)
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(batch)
    pruner.score([batch])
    return model, batch, pruner, pruner.plan({"flops": flops})


@contextmanager
def trial(model, axes, plan, repair=None):
    """The model as the plan and its repair leave it."""
    with ExitStack() as stack:
        stack.enter_context(masked(model, axes, plan.kept))
        if repair is not None:
            stack.enter_context(repaired(model, repair))
        yield


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_divergences_are_those_of_the_model_with_the_new_weights(family):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned(family)
        axes = pruner.structure.axes
        before = {name: p.clone() for name, p in model.named_parameters()}
        repair = find_repair(model, axes, plan, [batch] * 5)
        found = divergences(
            model,
            [batch],
            [lambda: trial(model, axes, plan), lambda: trial(model, axes, plan, repair)],
        )
    assert found[0] == pytest.approx(repair.kl_before, rel=1e-7)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert repair.is_accepted
    if family == "albert":  # its layers share their weights; the head does not
        shared = [site.reason for site in repair.sites if "albert_layers" in site.module]
        assert set(shared) == {"it runs 3 times in a forward"}
        return
    assert any(site.ridge for site in repair.sites)
    assert found[1] == pytest.approx(repair.kl_after, rel=1e-7, abs=1e-12)
    assert repair.kl_after < 0.5 * repair.kl_before
    assert all(site.error_after < site.error_before for site in repair.sites if not site.reason)


def test_what_does_not_fit_into_memory_waits_on_disk(tmp_path):
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("llama")
        axes = pruner.structure.axes
        wide = {name: value.repeat(8, 1) for name, value in batch.items()}
        wanted = find_repair(model, axes, plan, [wide] * 5)
        seen = []
        found = find_repair(
            model,
            axes,
            plan,
            [wide] * 5,
            memory_bytes=0,
            spill=tmp_path,
            progress=lambda done, total: seen.append(len(list(tmp_path.rglob("*")))),
        )
    assert max(seen) > 5  # a folder, and a file for each that waits
    assert not list(tmp_path.iterdir())
    assert found.summary() == wanted.summary()
    for name, tensor in wanted.tensors.items():
        assert torch.equal(tensor, found.tensors[name])


def test_nothing_depends_on_the_order_of_calls_or_the_size_of_batches():
    with zoo.float64_throughout():
        model, batch, pruner, plan = planned("bert")
        axes = pruner.structure.axes
        first = find_repair(model, axes, plan, [batch] * 5)
        again = find_repair(model, axes, plan, [batch] * 5)
    assert first.summary() == again.summary()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
    assert dataclasses.is_dataclass(first)
