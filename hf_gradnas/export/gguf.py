"""Checkpoints as GGUF files, which llama.cpp runs, and with it Ollama and LM Studio.

Tensors go from file to file a few rows at a time: the model is never in memory. The `gguf` package
writes the format; it is an extra (``hf_gradnas[gguf]``), and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from .._files import check_replaceable, write_whole
from ..errors import CheckpointError, check_choice, described
from ..shards.files import open_checkpoint
from ..shards.writing import Progress
from .layout import Layout, find_layout
from .numbers import FILE_TYPES, TYPES, Streamed, type_of
from .rope import Rope, find_rope
from .vocabulary import Vocabulary, read_vocabulary

MAGIC = b"GGUF"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Export:
    """A file that was written.

    Attributes:
        file: Where it is.
        architecture: llama.cpp's name of what it holds.
        type: Number type of the matrices.
        size: Bytes.
        tensors: How many tensors it holds.
        fallen_back: Tensors in float16, since their rows are no whole blocks of the type.
        notes: What llama.cpp does otherwise than Transformers, in sentences.
    """

    file: Path
    architecture: str
    type: str
    size: int
    tensors: int
    fallen_back: tuple[str, ...]
    notes: tuple[str, ...]


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    overwrite: bool = False,
    pre_tokenizer: str | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write a checkpoint, pruned or not, as one GGUF file for llama.cpp.

    A Llama, Mistral, Qwen2 or Qwen3 whose layers are alike becomes what llama.cpp has for it. A
    Llama, Mistral or Qwen2 whose layers differ (``per_layer``) becomes ``deci``, in which heads, KV
    heads and neurons are numbers per layer. What llama.cpp would compute otherwise is refused, or
    said in `Export.notes`.

    Args:
        folder: Of the checkpoint, with its tokenizer, as ``save_pretrained`` writes it.
        out: File to write; it is whole or not there.
        type: ``f32``, ``f16``, ``bf16`` or ``q8_0`` for the matrices; norms are float32 always.
        overwrite: Whether a GGUF file that is there may be replaced.
        pre_tokenizer: llama.cpp's name of how a byte-level tokenizer splits text; None: found.
        progress: Told how many MiB of how many are written.

    Raises:
        CheckpointError: llama.cpp cannot run the checkpoint, something in it is missing, a weight
            is too large for the type, the file is there, or `gguf` is not installed.
    """
    _check_type(type)
    _check_package()
    folder, target = Path(folder).expanduser(), Path(out).expanduser()
    _check_target(target, overwrite=overwrite)
    files = open_checkpoint(folder)
    layout = find_layout(_config(folder), files.tensors, str(folder))
    rope = find_rope(layout, str(folder))
    vocabulary = read_vocabulary(folder, int(layout.config["vocab_size"]), pre_tokenizer)
    tensors = _streamed({**layout.tensors, **rope.tensors}, type, progress)

    def fill(writer: Any) -> None:
        _add_model(writer, folder.resolve().name, layout, rope, type)
        _add_vocabulary(writer, vocabulary)
        _add_tensors(writer, tensors)

    _write(target, layout.name, fill)
    fallen = tuple(each.name for each in tensors if type == "q8_0" and each.type == "f16")
    notes = (*rope.notes, *vocabulary.notes)
    size = target.stat().st_size
    return Export(target, layout.name, type, size, len(tensors), fallen, notes)


def _check_type(type: str) -> None:
    try:
        check_choice("type", type, TYPES, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} llama.cpp makes smaller types of f16: "
            "llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M."
        ) from None


def _check_package() -> None:
    if find_spec("gguf") is None:
        raise CheckpointError(
            "gguf is not installed, and writes the file; install it with pip install gguf."
        )


def _write(target: Path, architecture: str, fill: Callable[[Any], None]) -> None:
    """Write a file, whole or not at all.

    Raises:
        CheckpointError: It cannot be written; what was there is as it was.
    """

    def write(path: Path) -> None:
        from gguf import GGUFWriter  # noqa: PLC0415 - an optional package

        writer = GGUFWriter(path, architecture)
        try:
            fill(writer)
        finally:
            writer.close()

    try:
        write_whole(target, write, replaces=_is_gguf)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); choose another file, or "
            "make room."
        ) from error


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Check that the file may be written, before anything is read.

    Raises:
        CheckpointError: It is there, and may not be replaced.
    """
    if target.is_dir():
        raise CheckpointError(
            f"{target}: is a folder, needed a file; give for example {target / 'model-f16.gguf'}."
        )
    if target.is_file() and not overwrite:
        raise CheckpointError(
            f"{target}: is there; pass --overwrite (overwrite=True) to replace it, or choose "
            "another file."
        )
    try:
        check_replaceable(target, _is_gguf)
    except OSError as error:
        raise CheckpointError(
            f"{target}: is no GGUF file, and only these are replaced; choose another name."
        ) from error


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        return found
    except Exception as error:  # unreadable JSON, an unknown type, code of its own
        raise CheckpointError(
            f"{folder}: its config.json cannot be read ({described(error)}); export takes Llama, "
            "Mistral, Qwen2 and Qwen3 without code of their own."
        ) from error


def _streamed(
    parts: Mapping[str, Any], type: str, progress: Progress | None
) -> tuple[Streamed, ...]:
    """All tensors, with the type of each."""
    tell, done = progress or (lambda done, total: None), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        tell(done // MIB, total)

    kinds = {name: type_of(part.shape, type) for name, part in parts.items()}
    found = tuple(Streamed(name, part, kinds[name], told) for name, part in parts.items())
    total = sum(each.nbytes for each in found) // MIB
    return found


# --- what the file says ---------------------------------------------------------------------------


def _add_model(writer: Any, name: str, layout: Layout, rope: Rope, type: str) -> None:
    config, layers = layout.config, layout.layers
    counts: dict[str, Any] = {
        "heads": [layer.heads for layer in layers],
        "kv_heads": [layer.kv_heads for layer in layers],
        "neurons": [layer.neurons for layer in layers],
    }
    if not layout.is_per_layer:
        counts = {key: values[0] for key, values in counts.items()}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(2)
    writer.add_block_count(len(layers))
    writer.add_context_length(rope.context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_feed_forward_length(counts["neurons"])
    writer.add_head_count(counts["heads"])
    writer.add_head_count_kv(counts["kv_heads"])
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(rope.base)
    for key, value in rope.scaling.items():
        full = f"{layout.name}.rope.scaling.{key}"
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[value.__class__](full, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_ID_NAMES.get(name, name)}_token_id", index)
    for name, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


_ID_NAMES = {"unk": "unknown", "pad": "padding"}


def _add_tensors(writer: Any, tensors: Sequence[Streamed]) -> None:
    from gguf import GGMLQuantizationType  # noqa: PLC0415 - an optional package

    for each in tensors:
        kind = GGMLQuantizationType[each.type.upper()]
        writer.add_tensor_info(each.name, each.byte_shape, np.dtype(np.uint8), each.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(each)
