"""Attention kernels that nothing is proved with are named; flex_attention is tried on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from score_examples import examples_of, in_batches

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import GradNASWarning, StructureError
from hf_gradnas.running.kernels import untested_kernels, warn_of_kernels
from hf_gradnas.running.wrappers import uncompiled
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Kind
from hf_gradnas.verification import find_structure

HEADS_ALONE = {"*:neurons": None}
HEADS = (Kind.HEADS, Kind.KV_GROUPS)
SAID = r"Attention runs {}: what can go is proved with eager attention and sdpa, not with that\. "


@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_a_kernel_that_nothing_is_proved_with_is_named(kernel: str) -> None:
    model, _ = zoo.build("bert", dtype=torch.float32)
    model.config._attn_implementation_internal = kernel
    assert untested_kernels(model) == [kernel]
    with pytest.warns(GradNASWarning, match=SAID.format(kernel)):
        warn_of_kernels(model)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_nothing_is_said_of_others(kernel: str) -> None:
    model, _ = zoo.build("bert", dtype=torch.float32, attn=kernel)
    assert untested_kernels(model) == []
    warn_of_kernels(model)


def test_scores_of_flex_attention_on_the_cpu_are_refused_before_anything_runs() -> None:
    model, batch = zoo.build("bert", dtype=torch.float32)
    axes = find_structure(model, batch).axes
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StructureError, match=r"flex_attention, which PyTorch has no gradients of"):
        collect_scores(model, axes, [batch])
    assert collect_scores(model, axes, [], method="magnitude").values


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Transformers calls
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_masked_is_cut_with_flex_attention(family: str) -> None:
    """On the CPU, where PyTorch has no backward of it: scores come from another kernel."""
    model, _ = zoo.build(family, dtype=torch.float32)
    batches: list[Any] = in_batches(examples_of(family, 8), 4)
    pruner = GradNASPruner(model, score="fisher", rules=HEADS_ALONE)
    scores = pruner.score(batches)
    expected = pruner.structure
    model.set_attn_implementation("flex_attention")
    pruner = GradNASPruner(model, score="fisher", rules=HEADS_ALONE)
    with pytest.warns(GradNASWarning, match=SAID.format("flex_attention")):
        assert pruner.discover(batches[0]) == expected
    pruner.use_scores(scores)
    plan = pruner.plan({"params": "90%"})
    assert any(
        len(plan.kept[axis.name]) < axis.size for axis in expected.axes if axis.kind in HEADS
    )
    with uncompiled(), torch.no_grad():
        whole = model(**batches[0]).logits
        with pruner.masked(plan):
            masked = model(**batches[0]).logits
        cut = pruner.apply(plan)(**batches[0]).logits
    assert not torch.allclose(masked, whole, atol=1e-2)
    assert torch.allclose(cut, masked, rtol=0, atol=1e-6)
