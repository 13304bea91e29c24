"""Score and prune on this process's share of the batches, and write down what came out.

Arguments: a folder. Every process writes ``<processes>-<rank>.json`` there, a case each.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import zoo
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from overflows import marked, overflowing
from repair_by_hand import repair_by_hand
from score_examples import IGNORED, build, examples_of, in_batches
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, IterableDataset, Sampler

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import CheckpointError, DataError, GradNASWarning, StructureError
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import collect_scores

COUNT, SIZE, WIDTH = 101, 8, 16
TEXT = ("input_ids", "attention_mask")
BUDGET = {"flops": "60%"}
OVERFLOWS = ((4, 13), (4, 5, 13))


class Stream(IterableDataset):
    """The examples, one after the other."""

    def __init__(self, examples: list[dict[str, torch.Tensor]]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.examples)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return in_batches(examples, len(examples))[0]


def collate_wide(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All of one length, which Accelerate needs to send them."""
    batch = collate(examples)
    ids, mask = (nn.functional.pad(batch[key], (0, WIDTH - batch[key].shape[1])) for key in TEXT)
    return {**batch, "input_ids": ids, "attention_mask": mask}


def loader(examples: Any, size: int = SIZE, **options: Any) -> DataLoader:
    return DataLoader(examples, batch_size=size, collate_fn=collate, **options)


def accelerator_of(steps: int = 1, **options: Any) -> Accelerator:
    """An Accelerator with its own settings; all share one group of processes."""
    return Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(**options),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
    )


def lists(scores: Any) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in scores.values.items()}


Case = Callable[[Path], Any]
EXAMPLES = examples_of("bert", COUNT)


def scored(batches: Any, accelerator: Accelerator, family: str = "bert", **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float64)
    model, axes, _ = build(family, dtype=dtype)
    found = collect_scores(model, axes, batches, accelerator=accelerator, **options)
    return {**lists(found), "examples": found.metadata["examples"]}


def plain(folder: Path) -> Any:
    """A plain loader is as it was afterwards, and so is the Accelerator."""
    accelerator = accelerator_of()
    batches = loader(EXAMPLES, shuffle=True)
    before = batches.batch_sampler, batches.sampler, batches.sampler.generator
    found = scored(batches, accelerator)
    assert before == (batches.batch_sampler, batches.sampler, batches.sampler.generator)
    assert not accelerator._dataloaders
    assert accelerator.gradient_state.active_dataloader is None
    return found


def prepared(folder: Path) -> Any:
    """A prepared loader is used as it is, and goes back to repeating examples."""
    accelerator = accelerator_of()
    batches = accelerator.prepare(loader(EXAMPLES))
    found = scored(batches, accelerator, method="taylor")
    assert batches.batch_sampler.even_batches
    assert batches.iteration == 0
    assert accelerator.gradient_state.active_dataloader is None
    assert sum(len(batch["labels"]) for batch in batches) > COUNT / 2
    return found


def single_precision(folder: Path) -> Any:
    return scored(loader(EXAMPLES), accelerator_of(), dtype=torch.float32)


def of_a_list(folder: Path) -> Any:
    return scored(in_batches(EXAMPLES, SIZE), accelerator_of())


def of_a_stream(folder: Path) -> Any:
    return scored(loader(Stream(EXAMPLES)), accelerator_of())


def dispatched(folder: Path) -> Any:
    """The main process reads for all; the last five examples are three for each."""
    accelerator = accelerator_of(dispatch_batches=True, split_batches=True)
    batches = DataLoader(Stream(EXAMPLES), batch_size=SIZE, collate_fn=collate_wide)
    return scored(accelerator.prepare(batches), accelerator)


def sampled_labels(folder: Path) -> Any:
    return scored(loader(EXAMPLES), accelerator_of(), labels="model", seed=5, num_examples=37)


def global_batches(folder: Path) -> Any:
    """The same batches of 8: split, of 4 per process, and of 2 per process in two steps."""
    split = accelerator_of(split_batches=True)
    prepared = split.prepare(loader(EXAMPLES))
    return [
        scored(prepared, split, method="gradnas"),
        scored(loader(EXAMPLES), split, method="gradnas"),
        scored(loader(EXAMPLES, SIZE // 2), accelerator_of(), method="gradnas"),
        scored(loader(EXAMPLES, SIZE // 4), accelerator_of(steps=2), method="gradnas"),
        scored(in_batches(EXAMPLES, SIZE // 2), accelerator_of(), method="gradnas"),
    ]


def grouped_heads(folder: Path) -> Any:
    with zoo.float64_throughout():
        return scored(loader(examples_of("llama", COUNT)), accelerator_of(), family="llama")


def rows_of_equal_weight(folder: Path) -> Any:
    """Beside another method; rows of examples, and of positions."""
    options = {"method": "balanced", "also": ("fisher",)}
    with zoo.float64_throughout():
        long = loader(examples_of("llama", COUNT, longest=40))
        return [
            scored(loader(EXAMPLES), accelerator_of(), **options),
            scored(long, accelerator_of(), family="llama", **options),
        ]


def rows_of_tempered_weight(folder: Path) -> Any:
    """As they are, or tempered: a choice that comes from the rows of all processes."""
    with zoo.float64_throughout():
        model, axes, _ = build("llama", dtype=torch.float64)
        long = loader(examples_of("llama", COUNT, longest=40))
        found = collect_scores(model, axes, long, method="tempered", accelerator=accelerator_of())
    ratio, sums = found.metadata["effective_ratio"], found.sums["tempered"].tolist()
    return {**lists(found), "ratio": ratio, "sums": sums}


def chosen(folder: Path) -> Any:
    """The plan of the score that is closer to the original on rows held out."""
    model, _, _ = build("bert", dtype=torch.float64)
    pruner = GradNASPruner(model, score="auto", accelerator=accelerator_of())
    pruner.score(loader(EXAMPLES))
    plan = pruner.plan(BUDGET)
    return {"kept": {n: list(u) for n, u in plan.kept.items()}, "tried": dict(plan.tried)}


def swapped(folder: Path) -> Any:
    """Neurons chosen on the batches of all processes, and the progress of this one."""
    model, _, _ = build("bert", dtype=torch.float64)
    told: list[int] = []
    pruner = GradNASPruner(model, score="fisher", accelerator=accelerator_of())
    pruner.score(loader(EXAMPLES))
    plan = pruner.plan(BUDGET)
    found = pruner.swap(plan, loader(EXAMPLES), progress=lambda done, total: told.append(done))
    return {"kept": {n: list(u) for n, u in found.kept.items()}, "told": len(told)}


def weights(folder: Path) -> Any:
    accelerator = accelerator_of()
    file = folder / f"magnitude-{accelerator.num_processes}"
    return scored((), accelerator, method="magnitude", file=file)


def resumed(folder: Path) -> Any:
    """Interrupted after four steps, and gone on from there."""
    accelerator = accelerator_of()
    file = folder / f"resumed-{accelerator.num_processes}.safetensors"
    model, axes, _ = build("bert")
    batches = in_batches(EXAMPLES, SIZE)
    options = {"file": file, "accelerator": accelerator}

    def broken() -> Iterator[Any]:
        yield from batches[: 4 * accelerator.num_processes]
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        collect_scores(model, axes, broken(), save_every_s=0, **options)
    calls = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        found = collect_scores(model, axes, batches, **options)
        done = len(calls)
        again = collect_scores(model, axes, batches, **options)
    assert lists(again) == lists(found)
    assert len(calls) == done  # complete scores are read, not measured
    written = sorted(path.name for path in folder.glob("resumed-*"))
    return {"scores": lists(found), "calls": done, "files": written}


def failures(folder: Path) -> list[list[str]]:
    """What every process raises where one of them has a fault."""
    accelerator = accelerator_of()
    rank = accelerator.process_index
    batches = in_batches(EXAMPLES, SIZE)
    texts = [dict(batch) for batch in batches]
    texts[3] = {"text": ["a"]}
    other, _ = zoo.build("bert", seed=rank)
    model, axes, _ = build("bert")
    score = partial(collect_scores, accelerator=accelerator)

    def broken_model() -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("out of luck")

        with model.register_forward_hook(fail if rank else lambda *_: None):
            score(model, axes, batches)

    def report(done: int, total: int | None) -> None:
        raise ValueError("a broken bar")

    cases = {
        "progress": lambda: score(model, axes, batches, progress=report),
        "batch": lambda: score(model, axes, texts),
        "order": lambda: score(model, axes, batches[:: 1 - 2 * rank]),
        "weights": lambda: score(other, axes, batches),
        "settings": lambda: score(model, axes, batches, num_examples=20 + rank),
        "model": broken_model,
        "interrupt": lambda: score(model, axes, stopping(batches, rank)),
    }
    found = []
    for name, case in cases.items():
        try:
            case()
        except (Exception, KeyboardInterrupt) as error:
            found.append([name, type(error).__name__, str(error)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    return found


def stopping(batches: list[Any], rank: int) -> Iterator[Any]:
    yield from batches[:5]
    if rank == 1:
        raise KeyboardInterrupt
    yield from batches[5:]


def pruned(folder: Path) -> Any:
    """A model inside DDP is pruned to one plan, and the main process writes it."""
    accelerator = accelerator_of()
    model, _ = zoo.build("bert", dtype=torch.float32, seed=accelerator.process_index)
    wrapped = accelerator.prepare(model)  # gives all processes the weights of the first
    pruner = GradNASPruner(wrapped, score="fisher", accelerator=accelerator)
    plan = pruner.prune(loader(EXAMPLES), BUDGET)
    output = folder / f"pruned-{accelerator.num_processes}"
    saved = pruner.save_pretrained(output, report=False)
    found = []
    for directory in (output, output):  # it is there already
        with contextlib.suppress(CheckpointError):
            pruner.save_pretrained(directory)
            found.append("written")
    shapes = [list(parameter.shape) for parameter in pruner.model.parameters()]
    kept = {name: list(units) for name, units in plan.kept.items()}
    return {"kept": kept, "shapes": shapes, "saved": str(saved), "again": found}


def trained_afterwards(folder: Path) -> Any:
    """Scoring leaves DDP as it was: it still averages gradients over the processes."""
    accelerator = accelerator_of()
    model, axes, _ = build("bert", dtype=torch.float32)
    wrapped = accelerator.prepare(model)
    batches = in_batches(EXAMPLES, SIZE)
    collect_scores(model, axes, batches[:2], accelerator=accelerator)
    wrapped.train()
    wrapped(**batches[accelerator.process_index]).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    wrapped.eval()
    return [float(gradient.double().abs().sum()) for gradient in gradients]


def sharded(folder: Path) -> Any:
    """FSDP2: found before sharding, scored as shards, cut with gathered weights."""

    def shard(model: Any) -> None:
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)

    return pruned_as_shards(folder / "sharded", shard)


def without_labels(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The second batch, which is another process's, loses its labels."""
    labels = torch.full_like(batches[1]["labels"], IGNORED)
    return [batches[0], {**batches[1], "labels": labels}, *batches[2:]]


def sharded_without_labels(folder: Path) -> Any:
    """A process runs shards for the others' sake where it has nothing to add."""
    model, axes, _ = build("llama", dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batches = without_labels(in_batches(examples_of("llama", 40), SIZE))
    return lists(collect_scores(model, axes, batches, accelerator=accelerator_of()))


def overflowed(folder: Path) -> Any:
    """Examples of one process that overflow: two of 24, and three, which are too many."""
    model, axes, _ = build("bert", dtype=torch.float16)
    accelerator, found = accelerator_of(), []
    with overflowing(model), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GradNASWarning)
        for bad in OVERFLOWS:
            batches = in_batches(marked(24, bad=bad), 4)
            try:
                scores = collect_scores(
                    model, axes, batches, accelerator=accelerator, also=("tempered", "gradnas")
                )
                also = {name: lists(scores.of(name)) for name in ("tempered", "gradnas")}
                keys = ("skipped_examples", "labels_scored", "loss_sum", "examples")
                said = {key: scores.metadata[key] for key in keys}
                found.append({"fisher": lists(scores), **also, "said": said})
            except DataError as error:
                found.append(str(error))
    return {"found": found, "told": len(told)}


def by_host(folder: Path) -> Any:
    """Sums where the processes' own group is of devices alone: another one is made for hosts."""
    accelerator = accelerator_of()
    found, nowhere = [], SimpleNamespace(device=torch.device("meta"))
    made, new_group = [], distributed.new_group
    with (
        patch.object(distributed, "get_backend_config", lambda _: "cuda:nccl"),
        patch.object(distributed, "new_group", lambda **_: made.append(1) or new_group(**_)),
    ):
        for _ in range(2):
            processes = Processes(accelerator)
            processes.accelerator = nowhere
            rank = processes.index
            found.append(processes.gather([rank, 2.0**53 - 1]).tolist())
            found.append(processes.sum(np.array([0.1, rank])).tolist())
    return {"found": found, "made": len(made)}


def unseeded(folder: Path) -> str:
    """Processes that shuffle in orders of their own."""
    accelerator = accelerator_of()

    class Shuffled(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            order = np.random.default_rng(accelerator.process_index).permutation(COUNT)
            return iter(order.tolist())

        def __len__(self) -> int:
            return COUNT

    batches = loader(EXAMPLES, sampler=Shuffled())
    messages = []
    for prepares in (False, True):
        try:
            scored(accelerator.prepare(batches) if prepares else batches, accelerator)
        except DataError as error:
            messages.append(str(error))
    return " ".join(messages)


def partitioned(folder: Path) -> Any:
    """The same with ZeRO-3; only where DeepSpeed is installed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    accelerator_of()  # makes the group of processes
    deepspeed.init_distributed(dist_backend="gloo")
    settings = {
        "train_micro_batch_size_per_gpu": SIZE,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }

    def shard(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    return pruned_as_shards(folder / "partitioned", shard)


def train(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """One step."""
    loss = model(**inputs).loss
    if hasattr(model, "step"):  # an engine
        model.backward(loss)
        model.step()
    else:
        loss.backward()


def pruned_as_shards(output: Path, shard: Callable[[Any], Any]) -> Any:
    """Found before sharding, scored as shards, cut with gathered weights."""
    accelerator = accelerator_of()
    model, inputs = zoo.build("bert", dtype=torch.float32)
    pruner = GradNASPruner(model, score="fisher", accelerator=accelerator)
    pruner.discover(inputs)
    engine = shard(model)
    scores = pruner.score(loader(EXAMPLES))  # a batch more for one of the processes
    plan, refused = pruner.plan(BUDGET), []
    for call in (lambda: pruner.discover(inputs), lambda: pruner.repair(plan, loader(EXAMPLES))):
        try:
            call()
        except StructureError as error:
            refused.append(str(error))
    twin = GradNASPruner(zoo.build("bert", dtype=torch.float32)[0], score="fisher")
    twin.discover(inputs)
    cut = pruner.apply(plan, repair_by_hand(twin, plan))
    train(model if engine is None else engine, inputs)  # it still can be
    assert cut is pruner.model is not model
    return {
        "scores": lists(scores),
        "model": scores.metadata["model_fingerprint"],
        "refused": refused,
        "kept": {name: list(units) for name, units in plan.kept.items()},
        "logits": cut(**inputs).logits.tolist(),
        "saved": str(pruner.save_pretrained(output, report=False)),
        "is_plain": not isinstance(cut, FSDPModule),
    }


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        plain,
        prepared,
        single_precision,
        of_a_list,
        of_a_stream,
        dispatched,
        sampled_labels,
        global_batches,
        grouped_heads,
        rows_of_equal_weight,
        rows_of_tempered_weight,
        chosen,
        swapped,
        weights,
        resumed,
        failures,
        pruned,
        trained_afterwards,
        sharded,
        sharded_without_labels,
        unseeded,
        overflowed,
        by_host,
    )
}
OPTIONAL: dict[str, Case] = {"partitioned": partitioned}


def main() -> None:
    """Run all cases, or those named after the folder."""
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    found = {name: {**CASES, **OPTIONAL}[name](folder) for name in names or CASES}
    accelerator = accelerator_of()
    file = folder / f"{accelerator.num_processes}-{accelerator.process_index}.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main()
