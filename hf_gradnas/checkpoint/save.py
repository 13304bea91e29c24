"""Writes a pruned model so that the target folder is never half written, and proves that it loads.

Knows folders and files; the config's values come from `checkpoint.rewrite`, and the classes that
load a per-layer checkpoint from `structure.modeling_gradnas`. Both layouts are written alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..report import FOLDER
from ..scores.batches import to_device
from ..scores.wrappers import without_autocast
from ..structure.modeling_gradnas import auto_class_name
from ..types import Plan
from .reference import Reference, file_digests, make_reference
from .replay import first_output

DOCUMENT = "gradnas.json"
FORMAT_VERSION = 1
CHECKPOINT_SUFFIXES = frozenset(
    [".json", ".safetensors", ".py", ".txt", ".model", ".yaml", ".md", ".jinja"]
)
"""Suffixes of files that a checkpoint folder may hold and still be replaced."""
REPORT_SUFFIXES = frozenset([".json", ".md", ".csv", ".png", ".svg"])
"""The same for its one sub-folder, that of the report."""
TOLERANCE = 1e-5
"""Largest difference of reloaded float32 or float64 outputs, relative to max(1, largest output)."""
HALF_TOLERANCE_EPS = 8
"""The same for 16-bit and smaller outputs, in steps of their type at 1."""


def save_pruned(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    plan: Plan,
    document: Mapping[str, Any],
    processing_class: Any = None,
    sample: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write model, tokenizer or processor and ``gradnas.json``, reload, compare, then rename.

    Everything is written to ``.<name>.tmp-<pid>`` beside the target and reloaded from there with
    the model's own class. All tensors must be equal bit by bit, and outputs on `sample` agree to
    `TOLERANCE` (float32, float64) or `HALF_TOLERANCE_EPS` (16 bits and less). For
    ``verify``, ``gradnas.json`` keeps digests of weights and code, and outputs on random inputs.

    Args:
        model: A cut model, its config rewritten.
        directory: Target folder.
        plan: What was cut; kept in ``gradnas.json``.
        document: More to keep in ``gradnas.json``, ready for JSON.
        processing_class: Tokenizer, image processor or processor to save beside the model.
        sample: Batch for ``model(**sample)``.
        files: Further files by path, e.g. ``recipe.yaml``; text, or bytes of a picture.
        overwrite: Replace a checkpoint that stands there.

    Returns:
        The target folder.

    Raises:
        CheckpointError: The target cannot be written, or the checkpoint does not load back as it
            was. The target is then as it was before.
    """
    target = check_target(directory, overwrite=overwrite)
    with _temporary_sibling(target) as written:
        model.save_pretrained(written)
        if processing_class is not None:
            processing_class.save_pretrained(written)
        content = {**document, "plan": plan.to_dict(), "versions": versions()}
        content["format_version"] = FORMAT_VERSION
        for name, data in (files or {}).items():
            (written / name).parent.mkdir(exist_ok=True)
            (written / name).write_bytes(data.encode() if isinstance(data, str) else data)
        reference = _check_reload(model, written, sample)
        content |= {"sha256": file_digests(written), "reference": reference.to_dict()}
        (written / DOCUMENT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        _put_in_place(written, target)
    return target


def check_target(directory: str | Path, overwrite: bool) -> Path:
    """Check that a checkpoint can be written to a folder, before any work is done.

    Returns:
        The folder's absolute path, links resolved.

    Raises:
        CheckpointError: It exists and `overwrite` is false, it is not a checkpoint, or the folder
            above it is not writable.
    """
    target = Path(directory).resolve()
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target}: the output folder exists; pass --overwrite (overwrite=True) to replace the "
            "checkpoint in it, or choose another folder."
        )
    foreign = _foreign(target)
    if foreign:
        raise CheckpointError(
            f"{target}: {foreign}, but only a checkpoint or an empty folder is replaced, as "
            "everything in it is deleted; choose another folder."
        )
    above = next(parent for parent in target.parents if parent.exists())
    try:
        Path(tempfile.mkdtemp(dir=above, prefix=".hf_gradnas-")).rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{target}: {above} is not a folder that this user can write to "
            f"({error.strerror}); choose another folder, or change its permissions."
        ) from error
    return target


def _foreign(target: Path) -> str:
    """What shows that a target is no checkpoint, in words; "" when it may be replaced."""
    if not target.exists():
        return ""
    if not target.is_dir():
        return "is a file"
    content = sorted(target.iterdir())
    if content and not (target / "config.json").is_file():
        return "is a folder without config.json"
    others = [p.name for p in content if not _is_own(p)]
    return f"holds more than a checkpoint ({', '.join(others[:4])})" if others else ""


def _is_own(path: Path) -> bool:
    """Whether something in a folder is what a checkpoint has there."""
    if not path.is_dir():
        return path.suffix in CHECKPOINT_SUFFIXES
    inside = path.iterdir() if path.name == FOLDER else [path]
    return all(p.is_file() and p.suffix in REPORT_SUFFIXES for p in inside)


@contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A new hidden folder beside the target; what is left of it at the end is deleted."""
    folder = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of a process with our number that was killed
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot make a folder beside it ({error}); choose another output folder."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(written: Path, target: Path) -> None:
    """Rename the finished folder to the target; what stood there is deleted only afterwards."""
    if target.exists() and _exchange(written, target):
        return  # the old checkpoint now has the temporary name, and goes with it
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.rename(old)
        written.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot (not Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    paths = [ctypes.c_char_p(os.fsencode(path)) for path in (first, second)]
    return bool(libc.renameat2(here, paths[0], here, paths[1], exchange) == 0)


def versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    packages = (__name__.split(".", maxsplit=1)[0], "transformers", "torch")
    return {package: sys.modules[package].__version__ for package in packages}


# --- does it load? --------------------------------------------------------------------------------


def _check_reload(
    model: PreTrainedModel, folder: Path, sample: Mapping[str, Any] | None
) -> Reference:
    """Load what was written with the model's own class, compare, and run it for later checks."""
    reloaded, info = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        output_loading_info=True,
    )
    wrong = {kind: sorted(info[kind])[:4] for kind in info if info[kind]}
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__}: the written checkpoint does not load back whole ({wrong}); "
            "the target is unchanged. Report it with the model's class and config."
        )
    reloaded = reloaded.to(model.device)
    _compare_tensors(model, reloaded)
    reference = make_reference(reloaded, sample)
    if sample is not None:
        _copy_derived(model, reloaded)
        sample = to_device(sample, model)
        _compare_outputs(_output(model, sample), _output(reloaded, sample))
    return reference


def _compare_tensors(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    before, after = model.state_dict(), reloaded.state_dict()
    for name in before.keys() | after.keys():
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise CheckpointError(
                f"{name}: the reloaded tensor differs from the one in memory; the target is "
                "unchanged. Report it with the model's class and config."
            )


def _copy_derived(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Give the reloaded model the buffers that no checkpoint holds.

    A model that was cast with ``.half()`` has rounded its rotary frequencies, which a fresh one
    computes in float32: a difference of the cast, not of the checkpoint.
    """
    saved, buffers = model.state_dict().keys(), dict(reloaded.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved and name in buffers and buffers[name].shape == buffer.shape:
            buffers[name].data = buffer.detach().clone()


def _compare_outputs(before: Tensor, after: Tensor) -> None:
    if torch.equal(before, after):
        return
    small = torch.finfo(before.dtype).bits < torch.finfo(torch.float32).bits
    tolerance = HALF_TOLERANCE_EPS * torch.finfo(before.dtype).eps if small else TOLERANCE
    limit = tolerance * max(1.0, before.abs().max().item())
    difference = float("nan")
    if before.shape == after.shape:
        difference = (before.double() - after.double()).abs().max().item()
    if not difference <= limit:  # catches nan too
        raise CheckpointError(
            f"outputs of the reloaded checkpoint differ by {difference:.3g} from those in memory "
            f"(at most {limit:.3g} is accepted); the target is unchanged. Report it with the "
            "model's class and config."
        )


def _output(model: PreTrainedModel, sample: Mapping[str, Any]) -> Tensor:
    """First floating-point output that is not the loss, of a forward in eval mode."""
    flags = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), without_autocast(model):
            outputs = model.eval()(**sample)
    finally:
        for module, training in flags.items():
            module.training = training
    found = first_output(outputs)
    if found is None:
        names = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
        raise CheckpointError(
            f"{type(model).__name__}: has no floating-point output on the sample (found {names}), "
            "so that reloading cannot be checked; pass sample=None."
        )
    return found[1]


def loading_snippet(model: PreTrainedModel, layout: str, directory: str | Path) -> str:
    """Python lines that load the checkpoint with plain Transformers, for users to copy."""
    stock = stock_class(model)
    name = auto_class_name(stock) or stock.__name__
    lines = [f"from transformers import {name}", f'model = {name}.from_pretrained("{directory}")']
    if layout == "per_layer":
        note = "  # or pass trust_remote_code=True to from_pretrained"
        lines = [f"import hf_gradnas{note}", *lines]
    return "\n".join(lines)


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of Transformers that a model is one of, per-layer or not."""
    found: type[PreTrainedModel] = vars(type(model)).get("_gradnas_stock_class", type(model))
    return found
