"""Cuts a large checkpoint from its files to new ones, beside a plain copy of the files.

The checkpoint is synthetic: random numbers under the names of a Llama in bfloat16, or of a Mixtral
whose experts are stored one by one. Both are timed in turn with the files in the page cache, to the
moment when all is on the disk, and the median of the rounds counts. Anonymous memory is what the
process has beyond mapped files, which the system takes back whenever it needs to.

    python examples/benchmarks/apply.py --gib 3 --model llama
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_gradnas._files import sync
from hf_gradnas.blueprint import find_blueprint
from hf_gradnas.checkpoint.prunable import trial_plan
from hf_gradnas.shards import apply_to_checkpoint
from hf_gradnas.shards.lazy import LazyTensor
from hf_gradnas.shards.parts import Stored
from hf_gradnas.shards.writing import weights_of, write_shard

GIB, SHARD = 1 << 30, 500_000_000
COMMON = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
CONFIGS: Mapping[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**COMMON, "intermediate_size": 8192},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {**COMMON, "intermediate_size": 7168, "num_local_experts": 8},
    ),
}


def config_of(name: str, gib: float) -> tuple[Any, type[Any]]:
    """The config of a model of about that size, and its class."""
    config_class, cls, values = CONFIGS[name]
    for layers in range(1, 200):
        config = config_class(**values, num_hidden_layers=layers)
        with torch.device("meta"):
            model = cls(config)
        if model.num_parameters() * 2 > gib * GIB:
            break
    config.architectures = [cls.__name__]
    return config, cls


def write_checkpoint(folder: Path, config: Any, cls: type[Any]) -> int:
    """Write random weights under the names of a checkpoint; their bytes."""
    config.save_pretrained(folder)
    noise = torch.randn(1 << 24).bfloat16()

    @lru_cache(maxsize=1)  # it is read a few rows at a time
    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(count // len(noise) + 1)[:count].reshape(shape)

    with torch.device("meta"):
        model = cls(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = tuple(parameter.shape)
                part = Stored(partial(drawn, shape), shape, torch.bfloat16)
                module._parameters[name] = torch.nn.Parameter(LazyTensor(part))
    weights = weights_of(model, SHARD)
    for file, names in weights.shards.items():
        write_shard(
            folder / file, {name: weights.parts[name] for name in names}, lambda count: None
        )
    (folder / "model.safetensors.index.json").write_text(str(weights.index))
    return weights.total_size


def find_axes(config: Any, cls: type[Any]) -> Any:
    """What can be pruned in the model, from its config alone."""
    ids = torch.arange(32).reshape(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return find_blueprint(cls, config, lambda config, model: batch, layout="per_layer").prunable


def copied(source: Path, target: Path) -> None:
    """Copy all files to the disk."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        sync(target / path.name)


class Watch:
    """Wall and CPU seconds of a block, and the most anonymous memory that it added."""

    def __enter__(self) -> Watch:
        self.started, self.cpu = time.perf_counter(), time.process_time()
        self.least = self.most = anonymous()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ends.wait(0.005):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.cpu = time.process_time() - self.cpu
        self._ends.set()
        self._thread.join()


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if "RssAnon" in line).split()[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=CONFIGS, default="llama")
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="Where the files are for the while.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    config, cls = config_of(options.model, options.gib)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        source = Path(place) / "source"
        size = write_checkpoint(source, config, cls)
        found = find_axes(config, cls)
        plan = trial_plan(found.axes, found.space, "per_layer", removals=True)
        copies, cuts = [], []
        for number in range(options.rounds):
            with Watch() as copy:
                copied(source, Path(place) / "copy")
            shutil.rmtree(Path(place) / "copy")
            with Watch() as cut:
                target = apply_to_checkpoint(
                    plan, source, Path(place) / "cut", prunable=found, report=False
                )
            written = sum(path.stat().st_size for path in target.iterdir())
            shutil.rmtree(target)
            copies.append(copy)
            cuts.append(cut)
            sys.stdout.write(
                f"round {number}: copy {copy.seconds:.2f} s ({copy.cpu:.2f} CPU), "
                f"cut {cut.seconds:.2f} s ({cut.cpu:.2f} CPU), anonymous memory "
                f"{cut.least >> 20} + {(cut.most - cut.least) >> 20} MiB\n"
            )
    ratio = statistics.median(cut.seconds for cut in cuts) / statistics.median(
        copy.seconds for copy in copies
    )
    added = max(cut.most - cut.least for cut in cuts) >> 20
    most = max(cut.most for cut in cuts) >> 20
    sys.stdout.write(
        f"{options.model}: {size / GIB:.2f} -> {written / GIB:.2f} GiB, {ratio:.2f} x the time of "
        f"copying, {added} MiB of anonymous memory more, {most} MiB in all\n"
    )


if __name__ == "__main__":
    main()
