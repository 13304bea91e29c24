"""Loads a checkpoint in a process of its own and runs its reference inputs.

Run as a script, by its path, with one job file and one result file as arguments; hf_gradnas may be
blocked there, so this file imports none of it. `reference` takes the format of tensors from here.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import get_max_memory
from torch import Tensor

COMPARED = 256
"""Most entries of an output that are kept and compared."""


# --- tensors in JSON ------------------------------------------------------------------------------


def encode(tensor: Tensor) -> dict[str, Any]:
    """A tensor for JSON: type, shape and, in base64, its little-endian bytes."""
    array = tensor.detach().cpu().contiguous().numpy()
    data = base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data.decode("ascii")}


def encode_uniform(shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """A tensor for JSON that is made from its seed, see `decode`."""
    return {"dtype": "float32", "shape": list(shape), "uniform_seed": seed}


def decode(spec: Mapping[str, Any]) -> Any:
    """Inverse of `encode` and `encode_uniform`; ``{"value": …}`` is no tensor but that value.

    Uniform ones are drawn from [-1, 1) by NumPy's ``RandomState``, whose numbers never change.
    """
    if "value" in spec:
        return spec["value"]
    shape = tuple(spec["shape"])
    if "uniform_seed" in spec:
        drawn = np.random.RandomState(spec["uniform_seed"]).random_sample(shape)
        return torch.from_numpy((2 * drawn - 1).astype(np.float32))
    dtype = np.dtype(spec["dtype"])
    array = np.frombuffer(base64.b64decode(spec["data"]), dtype.newbyteorder("<"))
    return torch.from_numpy(array.astype(dtype).reshape(shape))


# --- forwards -------------------------------------------------------------------------------------


def first_output(outputs: Any) -> tuple[str, Tensor] | None:
    """Name and value of the first floating-point output that is not the loss."""
    values = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in values:
        if name != "loss" and isinstance(value, Tensor) and value.is_floating_point():
            return str(name), value
    return None


def run(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model in eval mode makes of encoded inputs; None without a floating-point output.

    Returns:
        Name and shape of the output, its largest absolute value, and up to `COMPARED` entries that
        are spread evenly over it, the first and the last among them.
    """
    batch = {name: decode(spec) for name, spec in inputs.items()}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            real = value.is_floating_point()
            batch[name] = value.to(_device_of(model), model.dtype if real else value.dtype)
    others = [] if _device_of(model).type == "cpu" else [_device_of(model)]
    kind = _device_of(model).type if others else "cuda"
    with torch.no_grad(), torch.random.fork_rng(others, device_type=kind):
        torch.manual_seed(0)  # some forwards draw numbers, in eval mode too
        found = first_output(model(**batch))
    if found is None:
        return None
    name, output = found
    flat = output.detach().cpu().flatten()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    places = np.linspace(0, max(len(flat) - 1, 0), min(COMPARED, len(flat))).round()
    finite = flat[flat.isfinite()]
    return {
        "name": name,
        "shape": list(output.shape),
        "largest": finite.abs().max().item() if len(finite) else 0.0,
        "values": encode(flat[torch.from_numpy(places.astype(np.int64))]),
    }


def load(job: Mapping[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The model of a job, and what its checkpoint lacked or had too much, by kind."""
    model, info = getattr(transformers, job["loader"]).from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        trust_remote_code=job["trust_remote_code"],
        output_loading_info=True,
        **({"attn_implementation": "eager"} if job["attention"] == "eager" else {}),
        **_placement(job),
    )
    wrong = {kind: [str(item) for item in info[kind]] for kind in info if info[kind]}
    if job["room"] is not None:
        return model.eval(), wrong
    device = torch.device(job["device"])
    if not job["device_is_required"] and not _has(device):
        device = torch.device("cpu")
    return model.to(device).eval(), wrong


def _placement(job: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that let Accelerate load what has no room when its layer runs, and drop it then."""
    if job["room"] is None:
        return {}
    device = torch.device(job["device"])
    most = get_max_memory() if device.type != "cpu" and _has(device) else {}
    most["cpu"] = int(job["room"])
    return {"device_map": "auto", "max_memory": most, "offload_folder": "offloaded"}


def _device_of(model: Any) -> torch.device:
    """Where a model takes its inputs; Accelerate moves them itself where weights are elsewhere."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def _has(device: torch.device) -> bool:
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device.type == "cpu" or (current is not None and current.type == device.type)


def main(job_file: str, result_file: str) -> None:
    """Load the model that the job names, run it, and write what came out."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, wrong = load(job)
    result = {
        "module": type(model).__module__,
        "device": _device_of(model).type,
        "wrong": wrong,
        "is_offloaded": job["room"] is not None,
        "output": None if job["inputs"] is None else run(model, job["inputs"]),
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[-2:])
