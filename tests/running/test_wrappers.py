"""Models as other libraries wrap them, and Accelerate on a single process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from distributed_scores import Stream, loader
from score_examples import assert_equal, build, examples_of, in_batches
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.loaders import deal
from hf_gradnas.errors import DataError, StructureError
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Scores

EXAMPLES = examples_of("bert", 101)
BATCHES = in_batches(EXAMPLES, 8)
BUDGET = {"flops": "60%"}


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def scored(model: Any, axes: Any, batches: Any = None, **options: Any) -> dict[str, np.ndarray]:
    found = collect_scores(model, axes, BATCHES[:3] if batches is None else batches, **options)
    return dict(found.values)


# -- a single process -----------------------------------------------------------------------------


def test_accumulated_batches_are_one_global_batch() -> None:
    model, axes, inputs = build("bert")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    small = in_batches(EXAMPLES, 2)
    for method in ("gradnas", "fisher"):
        expected = collect_scores(model, axes, BATCHES, method=method)
        found = collect_scores(model, axes, small, method=method, accelerator=accelerator)
        assert_equal(found, dict(expected.values))
    plans = []
    for batches, chosen in ((BATCHES, None), (small, accelerator)):
        pruner = GradNASPruner(zoo.build("bert")[0], score="gradnas", accelerator=chosen)
        pruner.discover(inputs)
        pruner.score(batches)
        plans.append(pruner.plan(BUDGET).kept)
    assert plans[0] == plans[1]


def test_only_whole_global_batches_are_kept(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    options = {"method": "gradnas", "accelerator": Accelerator(cpu=True)}
    options["accelerator"].gradient_accumulation_steps = 4
    small = in_batches(EXAMPLES, 2)
    file = tmp_path / "scores.safetensors"

    def broken() -> Iterator[Any]:
        yield from small[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, broken(), file=file, **options)
    assert Scores.load(file).metadata["batches"] == "4"
    found = collect_scores(model, axes, small, file=file, **options)
    assert_equal(found, scored(model, axes, small, **options), rtol=0)


def test_an_older_file_that_knows_no_processes_is_gone_on_from(tmp_path: Path, caplog) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    found = collect_scores(model, axes, BATCHES[:3], file=file)
    older = dict(found.metadata)
    older["settings"] = older["settings"].replace('"accumulation_steps": 1, ', "")
    older["settings"] = older["settings"].replace('"processes": 1, ', "")
    del older["steps"]
    Scores(found.values, older).save(file)
    with model.register_forward_hook(lambda *_: pytest.fail("the model ran")):
        again = collect_scores(model, axes, BATCHES[:3], file=file)
    assert_equal(again, dict(found.values), rtol=0)
    assert not caplog.records


def test_a_prepared_loader_that_is_left_early_is_as_before() -> None:
    model, axes, _ = build("bert")
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare(loader(EXAMPLES, shuffle=True))
    scored(model, axes, batches, num_examples=20, accelerator=accelerator)
    assert batches.iteration == 0
    assert accelerator.gradient_state.active_dataloader is None


def test_loaders_whose_examples_could_not_be_counted_once() -> None:
    model, axes, _ = build("bert")
    half = prepare_data_loader(loader(EXAMPLES), num_processes=2, process_index=0)
    with pytest.raises(DataError, match="prepared for 2 processes, but 1 score; pass"):
        collect_scores(model, axes, half)
    stream = prepare_data_loader(
        loader(Stream(EXAMPLES)), num_processes=2, process_index=0, dispatch_batches=False
    )
    two = SimpleNamespace(count=2, index=0, splits_batches=False)
    own = DistributedSampler(EXAMPLES, num_replicas=2, rank=0)
    for batches, message in (
        (stream, "an IterableDataset repeats examples to fill"),
        (loader(EXAMPLES, sampler=own), "its DistributedSampler shares and repeats"),
        (DataLoader(EXAMPLES, batch_size=None, shuffle=True), "with batch_size=None and shuffle"),
    ):
        with pytest.raises(DataError, match=message), deal(batches, two):
            pass


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="it cannot compile this BERT")
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_code_is_measured_and_masked(in_place: bool) -> None:
    model, axes, inputs = build("bert")
    expected = scored(model, axes)
    if in_place:
        model.compile(backend="eager")
    outer = model if in_place else torch.compile(model, backend="eager")
    outer(**inputs)  # compiled before any hook is there
    pruner = GradNASPruner(outer, score="fisher")
    assert pruner.model is model
    pruner.discover(inputs)
    assert_equal(pruner.score(BATCHES[:3]), expected)
    plan = pruner.plan(BUDGET)
    plain = zoo.build("bert")[0]
    other = GradNASPruner(plain, score="fisher")
    other.discover(inputs)
    with pruner.masked(plan), other.masked(plan), torch.no_grad():
        masked = outer(**inputs).logits
        torch.testing.assert_close(masked, plain(**inputs).logits, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert not torch.allclose(masked, outer(**inputs).logits)
    torch.compiler.reset()


def test_parts_that_are_compiled_on_their_own_are_named() -> None:
    model, _, inputs = build("bert")
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    pruner = GradNASPruner(model, score="fisher")
    with pytest.raises(StructureError, match=r"discover: bert\.encoder\.layer\.1 is compiled"):
        pruner.discover(inputs)


def test_an_accelerate_that_takes_such_a_model_for_a_compiled_one(monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("_orig_mod")

    model, _, _ = build("bert")
    monkeypatch.setattr("hf_gradnas._compat.extract_model_from_parallel", fail)
    assert GradNASPruner(nn.DataParallel(model), score="fisher").model is model


# -- placed by Accelerate -------------------------------------------------------------------------


# Transformers takes "cpu" in a device map for offloading; the message is of no consequence here.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    "parts", [[""], ["bert.embeddings", "bert.encoder", "bert.pooler", "classifier"]], ids=len
)
def test_a_dispatched_model_is_pruned_like_any_other(parts: list[str], tmp_path: Path) -> None:
    plain = GradNASPruner(zoo.build("bert", dtype=torch.float32)[0], score="fisher")
    plan = plain.prune(BATCHES[:3], BUDGET)
    model, inputs = zoo.build("bert", dtype=torch.float32)
    places = dict.fromkeys(parts, "cpu")
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    pruner = GradNASPruner(model, score="fisher")
    assert pruner.prune(BATCHES[:3], BUDGET).kept == plan.kept
    with torch.no_grad():
        expected = plain.model(**inputs).logits
        torch.testing.assert_close(pruner.model(**inputs).logits, expected, rtol=0, atol=1e-6)
    pruner.save_pretrained(tmp_path / "pruned")


def test_offloaded_weights_are_named_where_all_are_needed() -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(StructureError, match=r"prune: bert.embeddings.* is offloaded"):
        GradNASPruner(model).prune(BATCHES, BUDGET)
    model, axes, _ = build("bert", dtype=torch.float32)
    model.to("meta")  # nobody loads them
    with pytest.raises(StructureError, match=r"score: bert.embeddings.* is offloaded"):
        collect_scores(model, axes, BATCHES)


def test_weights_partitioned_by_zero_are_named() -> None:
    model, _, _ = build("bert")
    vars(model.classifier.weight)["ds_id"] = 1
    message = (
        r"discover: classifier.weight is partitioned by ZeRO-3.* call discover\(batch\) before"
    )
    with pytest.raises(StructureError, match=message):
        GradNASPruner(model).discover(BATCHES[0])


def test_the_older_sharding_is_named() -> None:
    model, _, _ = build("bert")
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)  # its constructor needs a group of processes
    wrapped._modules["_fsdp_wrapped_module"] = model  # add_module asks for it first
    with pytest.raises(StructureError, match="wrapped by FSDP1, which merges parameters"):
        GradNASPruner(wrapped, score="fisher")


def test_a_forward_with_mixed_precision_is_scored_in_it() -> None:
    model, axes, _ = build("bert", dtype=torch.float32)
    expected = scored(model, axes)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    found = scored(accelerator.prepare(model), axes, accelerator=accelerator)
    for name, values in expected.items():
        error = np.abs(found[name] - values).max() / values.max()
        assert 1e-7 < error < 0.1, name


def test_a_model_prepared_for_mixed_precision_is_saved_as_it_is(tmp_path: Path) -> None:
    model, _, _ = build("bert", dtype=torch.float32)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    pruner = GradNASPruner(accelerator.prepare(model), score="fisher", accelerator=accelerator)
    pruner.prune(BATCHES[:2], BUDGET)
    forward = vars(pruner.model)["forward"]
    pruner.save_pretrained(tmp_path / "saved")
    assert vars(pruner.model)["forward"] is forward


def test_a_prepared_loader_that_is_not_read_to_its_end_is_as_before() -> None:
    model, _, _ = build("bert")
    accelerator = Accelerator(cpu=True)
    batches = accelerator.prepare(loader(EXAMPLES[:8], 2))
    pruner = GradNASPruner(model, score="magnitude", accelerator=accelerator)
    pruner.prune(batches, BUDGET, num_examples=4)
    assert accelerator.gradient_state.active_dataloader is None
    assert batches.iteration == 0


def test_layers_whose_forward_runs_again_in_the_backward_count_once(monkeypatch) -> None:
    model, axes, _ = build("bert")
    expected = scored(model, axes)
    for layer in model.bert.encoder.layer:
        again = partial(checkpoint, layer.forward, use_reentrant=False)
        monkeypatch.setattr(layer, "forward", again)
    assert_equal(collect_scores(model, axes, BATCHES[:3]), expected)


def test_half_precision_with_an_accelerator() -> None:
    model, axes, _ = build("bert", dtype=torch.bfloat16)
    found = scored(model, axes, accelerator=Accelerator(cpu=True))
    assert_equal(collect_scores(model, axes, BATCHES[:3]), found, rtol=0)


def test_something_else_inside_a_wrapper() -> None:
    with pytest.raises(StructureError, match="found a Linear, needed a Transformers"):
        GradNASPruner(torch.compile(nn.Linear(2, 2), backend="eager"))
