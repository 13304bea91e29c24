"""The repair of a model on a disk, beside that of the same model in memory.

The model is a synthetic Llama in float32, and the plan keeps every other head and neuron. Each way
runs in a process of its own, on one thread; time is that of its CPU. Memory is what the process has
beyond mapped files, which the system takes back whenever it needs to, at its peak, less what it has
before the model is loaded, when a small one was repaired, so that all code is there.

    python examples/benchmarks/repair_offloaded.py --layers 24 --examples 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader

from hf_gradnas import GradNASPruner, Plan, Repair
from hf_gradnas.batches.batch import tensor_bytes
from hf_gradnas.running.lending import largest_layer

MIB = 1 << 20
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def anonymous_bytes() -> int:
    """What this process has beyond mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks at the memory every few milliseconds until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._stopped = 0, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.005):
            self.most = max(self.most, anonymous_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.most


def repair_model(model: Any, examples: int) -> tuple[Repair, float]:
    """Repair a model, and what it took."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZES["vocab_size"], (examples, 1, 256), generator=generator)
    pruner = GradNASPruner(model)
    pruner.discover({"input_ids": ids[0]})
    sizes = {axis.name: axis.size for axis in pruner.structure.axes}
    is_pruned = {name: name.endswith((":heads", ":kv_groups", ":neurons")) for name in sizes}
    kept = {name: tuple(range(0, size, 1 + is_pruned[name])) for name, size in sizes.items()}
    began = time.process_time()
    plan = Plan(kept, sizes, "per_layer")
    found = pruner.repair(plan, [{"input_ids": row} for row in ids])
    return found, time.process_time() - began


def repair(folder: Path, examples: int, *, is_away: bool) -> dict[str, Any]:
    """Repair the model in a folder one way."""
    torch.set_num_threads(1)
    loads, own = [0], OffloadedWeightsLoader.__getitem__

    def load(self: Any, name: str) -> Any:
        tensor = own(self, name)
        loads[0] += tensor.nbytes
        return tensor

    OffloadedWeightsLoader.__getitem__ = load
    small = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**small)
    repair_model(cpu_offload(transformers.LlamaForCausalLM(config)), 2)
    before = anonymous_bytes()
    place: dict[str, Any] = {}
    if is_away:
        place = {"device_map": {"": "disk"}, "offload_folder": folder / "away"}
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, **place).eval()
    for parameter in () if is_away else model.parameters():
        parameter.data = parameter.data.clone()  # the files were mapped
    loads[0], peak = 0, Peak()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peak.start()
    found, seconds = repair_model(model, examples)
    state = hashlib.sha256()
    for name in sorted(found.tensors):
        state.update(tensor_bytes(found.tensors[name]))
    return {
        "digest": state.hexdigest(),
        "seconds": seconds,
        "peak": peak.stop() - before,
        "loads": loads[0] / weights,
        "weights": weights,
        "layer": largest_layer(model),
        "kl": [found.kl_before, found.kl_after],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--examples", type=int, default=20, help="of 256 tokens, one a batch")
    parser.add_argument("--one", choices=["memory", "disk"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        is_away = arguments.one == "disk"
        print(json.dumps(repair(arguments.folder, arguments.examples, is_away=is_away)))
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, num_hidden_layers=arguments.layers)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        found = {}
        for way in ("memory", "disk"):
            command = [sys.executable, __file__, "--one", way, "--folder", folder]
            command += ["--examples", str(arguments.examples)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way] = json.loads(ran.stdout.splitlines()[-1])
    memory, disk = found["memory"], found["disk"]
    print(f"weights {memory['weights'] / MIB:,.0f} MiB, a layer {memory['layer'] / MIB:,.1f} MiB")
    for way, one in found.items():
        print(f"{way}: {one['peak'] / MIB:,.0f} MiB, {one['seconds']:.1f} CPU seconds")
    print(f"time: {disk['seconds'] / memory['seconds']:.2f} ×")
    print(f"read from the disk: {disk['loads']:.1f} × the weights")
    print(f"the same weights: {disk['digest'] == memory['digest']}, KL {memory['kl']}")


if __name__ == "__main__":
    main()
