"""A checkpoint cut from its files is the one that the model in memory would have written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_gradnas import GradNASPruner, _files
from hf_gradnas._files import lock_folder
from hf_gradnas.checkpoint.fingerprints import fingerprints_of
from hf_gradnas.checkpoint.prunable import trial_plan
from hf_gradnas.errors import CheckpointError, PlanError, RepairError
from hf_gradnas.shards import apply as applying
from hf_gradnas.shards import apply_to_checkpoint, comparing, writing
from hf_gradnas.shards.resuming import record_of, unfinished_name
from hf_gradnas.types import Basis

# Model with its repeated sizes: tied tables, Conv1D, experts one by one, channels, whole layers.
CASES = (
    ("bert", "stock", False),
    ("bert", "per_layer", True),
    ("llama", "stock", True),
    ("llama", "per_layer", False),
    ("t5", "per_layer", False),
    ("mixtral", "stock", True),
    ("switch", "stock", False),  # lists of experts
    ("switch", "per_layer", True),
    ("resnet", "per_layer", False),
    ("whisper", "per_layer", False),
    ("wav2vec2", "per_layer", False),  # _init_weights writes into a computed weight
    *(
        pytest.param(name, "per_layer", False, marks=pytest.mark.long)
        for name in ("gpt2", "mixtral", "dbrx")
    ),
)
TIED = {"llama": {"tie_word_embeddings": True}}
UNLIKE = {"reference", "sha256_of_this"}
"""Keys of gradnas.json: the model in memory was run, and the digest of the rest."""


def saved(folder: Path, name: str, **overrides: Any) -> tuple[Path, Any]:
    """A tiny model in several files, and its batch."""
    model, inputs = zoo.build(name, dtype=torch.float32, **TIED.get(name, {}), **overrides)
    if model.can_generate():
        model.generation_config.max_new_tokens = 7
    source = folder / "source"
    model.save_pretrained(source, max_shard_size="60KB")
    (source / "LICENSE").write_text("ours")
    return source, inputs


def loaded(source: Path, inputs: Any, layout: str, *, layers: bool = False) -> GradNASPruner:
    config = tf.AutoConfig.from_pretrained(source)
    model = getattr(tf, config.architectures[0]).from_pretrained(source)
    pruner = GradNASPruner(model, layout=layout, layers=layers)
    pruner.discover(inputs)
    return pruner


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def check_equal(found: Path, wanted: Path, *, unlike: frozenset[str] = frozenset()) -> None:
    """Check that two folders hold the same, but for the names that are given."""
    names = [{f.relative_to(d).as_posix() for f in d.rglob("*")} for d in (found, wanted)]
    assert names[0] - unlike == names[1] - unlike
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    for name in sorted(names[0] - unlike - {"gradnas.json"}):
        if (found / name).is_file():
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    records = [json.loads((d / "gradnas.json").read_text("utf-8")) for d in (found, wanted)]
    keys = records[0].keys() | records[1].keys()
    assert {key for key in keys if records[0].get(key) != records[1].get(key)} <= UNLIKE
    digests = {name: hashlib.sha256((found / name).read_bytes()).hexdigest() for name in names[0]
               if (found / name).is_file() and name != "gradnas.json"}  # fmt: skip
    assert records[0]["files"] == digests


@pytest.mark.parametrize(("name", "layout", "layers"), CASES)
def test_it_equals_what_the_model_in_memory_writes(name, layout, layers, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK", 4096)
    source, inputs = saved(tmp_path, name)
    pruner = loaded(source, inputs, layout, layers=layers)
    found = pruner.prunable
    plan = trial_plan(found.axes, found.space, layout, removals=True)
    pruner.apply(plan)
    wanted = pruner.save_pretrained(tmp_path / "memory" / "out", report=False)
    written = apply_to_checkpoint(
        plan, source, tmp_path / "files" / "out", prunable=found, report=False
    )
    check_equal(written, wanted)


@pytest.fixture
def llama(tmp_path):
    """A checkpoint, a plan with its basis, and where it is cut to."""
    source, inputs = saved(tmp_path, "llama")
    pruner = loaded(source, inputs, "per_layer")
    found = pruner.prunable
    plan = trial_plan(found.axes, found.space, "per_layer", removals=True)
    basis = Basis.of([found], {"model": "source", **fingerprints_of(source)})
    return source, replace(plan, basis=basis), tmp_path / "out", pruner, inputs


def cut(case, **options):
    return apply_to_checkpoint(case[1], case[0], case[2], report=False, **options)


def nothing_was_written(case):
    left = sorted(path.name for path in case[2].parent.iterdir())
    return left == ["source"]


def test_a_repair_is_cut_along(llama, tmp_path):
    source, plan, _, pruner, inputs = llama
    repair = pruner.repair(plan, [inputs, inputs, inputs, inputs, inputs])
    repair = replace(repair, tensors=repair.tensors or _halved(pruner, plan))
    pruner.apply(plan, repair)
    wanted = pruner.save_pretrained(tmp_path / "memory" / "out", report=False)
    written = apply_to_checkpoint(plan, source, tmp_path / "out", repair=repair, report=False)
    check_equal(written, wanted)
    changed = tensors_of(cut((source, plan, tmp_path / "plain")))
    assert any(not torch.equal(t, changed[name]) for name, t in tensors_of(written).items())


def _halved(pruner, plan):
    name = next(
        s.tensor for axis in pruner.structure.axes for s in axis.slices if s.role == "reads"
    )
    return {name: dict(pruner.model.named_parameters())[name].detach() / 2}


def test_a_repair_of_other_weights_is_refused(llama):
    repair = llama[3].repair(llama[1], [llama[4]] * 5)
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = dict(llama[3].model.named_parameters())[name].detach()
    other = replace(repair, model="0" * 64, tensors={name: tensor})
    with pytest.raises(RepairError, match="made from other weights"):
        cut(llama, repair=other)
    assert nothing_was_written(llama)


def test_shards_and_index_are_those_of_transformers(llama, tmp_path):
    llama[3].apply(llama[1])
    llama[3].model.save_pretrained(tmp_path / "upstream", max_shard_size="40KB")
    written = cut(llama, max_shard_size="40KB")
    name = "model.safetensors.index.json"
    assert (written / name).read_text() == (tmp_path / "upstream" / name).read_text()
    files = sorted(path.name for path in written.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:  # to the last byte
        assert (written / file).read_bytes() == (tmp_path / "upstream" / file).read_bytes()


def test_it_loads_and_runs_as_the_model_in_memory(llama):
    llama[3].apply(llama[1])
    model = tf.LlamaForCausalLM.from_pretrained(cut(llama)).eval()
    assert torch.equal(model(**llama[4]).logits, llama[3].model(**llama[4]).logits)


def test_the_disk_begins_while_the_next_rows_are_made(llama, monkeypatch):
    wanted = tensors_of(cut(llama, max_shard_size="40KB"))
    flushed, made = [], []
    real, pieces = os.fsync, writing._pieces

    def note(parts):
        for piece in pieces(parts):
            made.append(len(flushed))
            yield piece

    monkeypatch.setattr(writing, "CHUNK", 4096)
    monkeypatch.setattr(writing, "FLUSHED", 1)
    monkeypatch.setattr(writing, "_pieces", note)
    monkeypatch.setattr(writing, "sync", lambda path: None)
    monkeypatch.setattr(writing.os, "fsync", lambda file: (flushed.append(file), real(file)))
    found = tensors_of(cut(llama, max_shard_size="40KB", overwrite=True))
    assert len({*made}) > 3
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("fails_at", ["while writing", "at the end"])
def test_a_file_that_the_disk_lost_is_not_complete(llama, monkeypatch, fails_at):
    files = {"while writing": writing.os, "at the end": _files.os}
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 1:  # the system says it once
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(writing, "FLUSHED", 1 if fails_at == "while writing" else 1 << 40)
    monkeypatch.setattr(files[fails_at], "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left"):
        cut(llama)
    assert not llama[2].exists()


@pytest.mark.parametrize(
    ("name", "module", "is_in"),
    [
        ("lm_head.weight", "lm_head", True),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj", True),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.10.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj", False),
        ("model.embed_tokens.weight", "lm_head", False),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj", False),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj", False),
    ],
)
def test_what_a_repair_may_have_changed(name, module, is_in):
    readers = {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
    assert comparing._is_in(name, [module], readers) is is_in


def test_of_a_tensor_in_two_files_the_one_that_loading_takes_is_cut(llama):
    source, name = llama[0], "model.norm.weight"
    index = json.loads((source / "model.safetensors.index.json").read_text("utf-8"))
    first, *_, last = sorted({*index["weight_map"].values()})
    norm = llama[3].model.model.norm.weight.detach()
    for file, value in ((first, 2.0), (last, 3.0)):
        held = load_file(source / file)
        held[name] = torch.full_like(norm, value)
        save_file(held, source / file, {"format": "pt"})
    placed = index["weight_map"]
    turned = dict(sorted(placed.items(), key=lambda item: item[1], reverse=True))
    index["weight_map"] = {**turned, name: last}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    upstream = tf.LlamaForCausalLM.from_pretrained(source).model.norm.weight
    plan = replace(llama[1], basis=Basis.of([llama[3].prunable], {}))
    found = tensors_of(apply_to_checkpoint(plan, source, llama[2], report=False))[name]
    assert torch.equal(found, upstream.detach())


def test_a_generation_config_that_cannot_be_read_is_said(llama):
    (llama[0] / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"its generation_config\.json cannot be read"):
        cut(llama)


def test_a_run_that_breaks_off_goes_on_with_the_next_file(llama, monkeypatch):
    options = {"max_shard_size": "40KB"}
    wanted = tensors_of(apply_to_checkpoint(llama[1], llama[0], llama[2].with_name("w"), **options))
    written = []

    def failing(path, parts, told):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, parts, told)

    write = writing.write_shard
    monkeypatch.setattr(writing, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        cut(llama, **options)
    assert not llama[2].exists()
    half = unfinished_name(llama[2])
    times = {name: (half / name).stat().st_mtime_ns for name in written}
    first = list(written)
    monkeypatch.setattr(writing, "write_shard", write)
    steps = []
    cut(llama, **options, progress=lambda done, total: steps.append((done, total)))
    assert {name: (llama[2] / name).stat().st_mtime_ns for name in first} == times
    assert not half.exists()
    assert not record_of(half).exists()
    found = tensors_of(llama[2])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_what_another_run_left_is_not_used(llama, monkeypatch):
    def failing(path, parts, told):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            cut(llama)
    half = unfinished_name(llama[2])
    record = json.loads(record_of(half).read_text())
    (half / "model.safetensors").write_bytes(b"of another plan")
    done = {"model.safetensors": {"sha256": "0", "size": 15}}
    record_of(half).write_text(json.dumps({**record, "key": "other", "done": done}))
    assert tensors_of(cut(llama))


@pytest.mark.parametrize("step", ["_save_settings", "digests", "write_document", "replace_folder"])
def test_a_break_after_the_weights_loses_none_of_them(step, llama, monkeypatch):
    def broken(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(applying, step, broken)
        with pytest.raises(KeyboardInterrupt):
            cut(llama)
    half = unfinished_name(llama[2])
    when = (half / "model.safetensors").stat().st_mtime_ns
    cut(llama)
    assert (llama[2] / "model.safetensors").stat().st_mtime_ns == when
    assert not half.exists()
    assert not record_of(half).exists()


def test_a_complete_file_that_was_changed_is_written_again(llama, monkeypatch):
    wanted = tensors_of(cut((*llama[:2], llama[2].with_name("whole"))))
    with monkeypatch.context() as patch:
        patch.setattr(applying, "digests", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut(llama)
    file = unfinished_name(llama[2]) / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    found = tensors_of(cut(llama))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_runs_do_not_write_one_folder(llama):
    half = unfinished_name(llama[2])
    half.mkdir()
    held = lock_folder(half)
    try:
        with pytest.raises(CheckpointError, match="another process makes this checkpoint"):
            cut(llama)
    finally:
        os.close(held)
    (half / "note.txt").write_text("somebody's")
    with pytest.raises(CheckpointError, match="holds what hf_gradnas did not write"):
        cut(llama)
    assert (half / "note.txt").read_text() == "somebody's"


def test_a_disk_without_room_is_refused_before_the_first_byte(llama, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(applying.shutil, "disk_usage", lambda path: usage(0, 0, 1 << 20))
    with pytest.raises(CheckpointError, match=r"needs \d+ MiB, and .* has 1 MiB free; nothing was"):
        cut(llama)
    assert not unfinished_name(llama[2]).exists()


def test_an_existing_target_is_replaced_only_if_asked_for(llama):
    cut(llama)
    with pytest.raises(CheckpointError, match="output folder exists; pass --overwrite"):
        cut(llama)
    assert cut(llama, overwrite=True) == llama[2]
    (llama[2] / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds mine.txt, which hf_gradnas did not write"):
        cut(llama, overwrite=True)


def test_the_plan_of_another_checkpoint_is_refused(llama, tmp_path):
    source, plan, *_ = llama
    model, _ = zoo.build("llama", dtype=torch.float32, seed=1, tie_word_embeddings=True)
    other = tmp_path / "source2"
    model.save_pretrained(other, max_shard_size="60KB")
    with pytest.raises(CheckpointError, match=r"plan is for another checkpoint \(made from source"):
        apply_to_checkpoint(plan, other, llama[2])
    shutil.rmtree(other)
    with pytest.raises(PlanError, match="does not say which axes it is for"):
        apply_to_checkpoint(replace(plan, basis=None), source, llama[2])
    model, _ = zoo.build("llama", dtype=torch.float32, intermediate_size=32)
    model.save_pretrained(other)
    found = llama[3].prunable
    with pytest.raises(PlanError, match=r"rows of .* at least .*LlamaForCausalLM has \[32, 64\]"):
        apply_to_checkpoint(replace(plan, basis=None), other, llama[2], prunable=found)
    shutil.rmtree(other)
    assert nothing_was_written(llama)


def without_a_file(source):
    next(source.glob("*.safetensors")).unlink()


def truncated(source):
    file = next(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def without_a_tensor(source):
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if "model.norm.weight" in tensors:
            del tensors["model.norm.weight"]
            save_file(tensors or {"other": torch.ones(1)}, file, metadata={"format": "pt"})


def not_in_the_index(source):
    without_a_tensor(source)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def damaged_index(source):
    (source / "model.safetensors.index.json").write_text("{")


def outside(source):
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def without_weights(source):
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


def eight_bits(source):
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, file)


def changed_config(**values):
    def change(source):
        file = source / "config.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


BAD = {
    "a missing file": (without_a_file, r"lacks model-0000.*json names; download"),
    "a truncated file": (truncated, r"cannot be read .* cut short or damaged"),
    "a missing tensor": (without_a_tensor, r"lacks model.norm.weight \(1 in all\), which .* says"),
    "a tensor nowhere": (not_in_the_index, r"has no weights for model.norm.weight of Llama"),
    "a damaged index": (damaged_index, r"index.json: cannot be read"),
    "an index that leads out": (outside, r"names \.\./a.safetensors, needed are files beside it"),
    "pickles": (without_weights, r"no weights in safetensors \(found pytorch_model.bin\)"),
    "8 bits": (eight_bits, r"holds numbers of kind F8_E4M3"),
    "a quantised model": (
        changed_config(quantization_config={"quant_method": "bitsandbytes"}),
        r"has a quantization_config, needed are plain",
    ),
    "no class": (changed_config(architectures=["MyLlama"]), r"names MyLlama .* give the class"),
    "no config": (lambda source: (source / "config.json").unlink(), r"holds no config.json"),
    "an unknown model": (changed_config(model_type="my"), r"its config.json cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_before_anything_is_written(case, llama):
    change, message = BAD[case]
    change(llama[0])
    plan, found = replace(llama[1], basis=None), llama[3].prunable
    with pytest.raises(CheckpointError, match=message):
        apply_to_checkpoint(plan, llama[0], llama[2], prunable=found)
    assert nothing_was_written(llama)


def test_a_size_of_files_must_be_one(llama):
    with pytest.raises(CheckpointError, match=r"max_shard_size='5XB': is no size.*'5GB'"):
        cut(llama, max_shard_size="5XB")
    assert nothing_was_written(llama)


def test_a_config_that_builds_other_shapes_is_refused(llama, monkeypatch):
    def forgetful(model, *args, **options):
        apply_plan(model, *args, **options)
        del model.config.gradnas

    apply_plan = applying.apply_plan
    monkeypatch.setattr(applying, "apply_plan", forgetful)
    with pytest.raises(CheckpointError, match=r"is cut to .* builds .* not be loaded; nothing"):
        cut(llama)
    assert nothing_was_written(llama)
