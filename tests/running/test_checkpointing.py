"""Layers that run again in the backward give the same scores in less memory, in eval mode."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
import zoo
from score_examples import build, examples_of, in_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import GradNASWarning, StructureError
from hf_gradnas.running.checkpointing import FLAG, checkpointed, layers_of
from hf_gradnas.scores import collect_scores

OWN = ("training", FLAG, "_gradient_checkpointing_func")


def _states(model: nn.Module) -> list[dict[str, object]]:
    return [{k: v for k, v in vars(m).items() if k in OWN} for m in model.modules()]


def _runs(model: nn.Module) -> tuple[list[int], list[bool]]:
    """How often each layer's forward runs, and the training flags that its parts have."""
    layers = layers_of(model)
    counts, flags = [0] * len(layers), []

    def note(number: int, module: nn.Module, args: object) -> None:
        counts[number] += 1
        flags.extend(part.training for part in layers[number].modules())

    for number, layer in enumerate(layers):
        first = next(m for m in layer.modules() if isinstance(m, nn.Linear))
        first.register_forward_pre_hook(partial(note, number))
    return counts, flags


@pytest.mark.leaves_state
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "vit", "whisper", "opt"])
def test_scores_are_the_same_to_the_last_bit(family: str) -> None:
    with zoo.float64_throughout():
        model, axes, batch = build(family)
        plain = collect_scores(model, axes, [batch], also=["tempered"])
        before = _states(model)
        counts, flags = _runs(model)
        again = collect_scores(model, axes, [batch], also=["tempered"], checkpointing=True)
    for axis in axes:
        assert np.array_equal(plain.values[axis.name], again.values[axis.name])
        assert np.array_equal(plain.also["tempered"][axis.name], again.also["tempered"][axis.name])
    once = collect_runs(model, axes, batch, counts)
    assert all(run > single for run, single in zip(counts, once, strict=True))
    assert not any(flags)
    assert _states(model) == before


def collect_runs(model: nn.Module, axes, batch, counts: list[int]) -> list[int]:
    """How often each layer runs without checkpointing."""
    before = list(counts)
    collect_scores(model, axes, [batch], checkpointing=False)
    found = [after - earlier for after, earlier in zip(counts, before, strict=True)]
    counts[:] = before
    return found


@pytest.mark.leaves_state
def test_it_is_honoured_where_it_is_on_and_dropout_stays_off() -> None:
    model, axes, _ = build("bart")
    model.config.dropout = 0.5
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5  # of functional.dropout, which asks the layer's own flag
    batches = in_batches(examples_of("bart", 4), 4)
    plain = collect_scores(model, axes, batches)
    function = partial(checkpoint, use_reentrant=True)  # which would need inputs with gradients
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    counts, flags = _runs(model)
    model.train()
    honoured = collect_scores(model, axes, batches)
    assert all(np.array_equal(plain.values[a.name], honoured.values[a.name]) for a in axes)
    assert not any(flags)
    assert all(module.training for module in model.modules())
    several = list(counts)
    counts[:] = [0] * len(counts)
    collect_scores(model, axes, batches, checkpointing=False)
    assert all(a < b for a, b in zip(counts, several, strict=True))


def test_all_is_restored_after_an_exception() -> None:
    model, axes, batch = build("llama")
    before = _states(model)

    def fail(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    handle = layers_of(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, [batch], checkpointing=True)
    handle.remove()
    assert _states(model) == before

    def fail_again(module: nn.Module, args: object) -> None:
        if torch._C._current_graph_task_id() != -1:  # in a backward
            raise ZeroDivisionError

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail_again)
    with pytest.raises(ZeroDivisionError):
        collect_scores(model, axes, [batch], checkpointing=True)
    handle.remove()
    assert _states(model) == before


def test_what_an_out_projection_reads_is_not_kept() -> None:
    model, axes, batch = build("llama")
    seen: list[weakref.ref[torch.Tensor]] = []
    projection = model.model.layers[0].mlp.down_proj

    def note(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(weakref.ref(args[0].untyped_storage()))

    handle = projection.register_forward_pre_hook(note)
    alive = []
    end = model.lm_head.register_forward_pre_hook(
        lambda module, args: alive.append(sum(one() is not None for one in seen))
    )
    try:
        collect_scores(model, axes, [batch], checkpointing=True)
    finally:
        handle.remove()
        end.remove()
    assert alive
    assert not alive[-1]


def test_a_model_without_such_layers_is_refused_with_a_remedy() -> None:
    model, axes, batch = build("albert")
    with pytest.raises(StructureError, match=r"checkpointing: Albert.* has no layers .* omit it"):
        collect_scores(model, axes, [batch], checkpointing=True)
    model.albert.encoder.gradient_checkpointing = True
    with pytest.warns(GradNASWarning, match="Gradient checkpointing is on, but Albert"):
        collect_scores(model, axes, [batch])


def test_the_pruner_takes_it() -> None:
    model, _, batch = build("bert")
    pruner = GradNASPruner(model, score="fisher")
    scores = pruner.score([batch], checkpointing=True)
    plain = collect_scores(model, pruner.structure.axes, [batch])
    assert all(np.array_equal(plain.values[n], scores.values[n]) for n in plain.values)


def test_some_layers_can_be_left_out() -> None:
    model, _, batch = build("llama")
    layers = layers_of(model)
    layers[1].gradient_checkpointing = True
    with checkpointed(model):
        assert [layer.training for layer in layers] == [False, True, False]
        model(**batch).loss.backward()
    model.zero_grad()
    assert layers[1].gradient_checkpointing
    del layers[1].gradient_checkpointing
