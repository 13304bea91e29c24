"""What a checkpoint is to llama.cpp: the architecture, its sizes and its tensors, or why not.

llama.cpp has one number of heads and one width for all layers in most of its architectures. In
``deci`` (Nemotron) they are arrays, and a Llama whose layers differ is one: that is the whole idea.
Sizes are read from the config, and every tensor of the files has to be as these sizes say, so that
what is written is complete and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError
from ..shards.parts import Part, Stored, Taken

SHOWN = 4
ZERO_NEURONS = 32
"""Neurons that take the place of a feed-forward that was removed, all of their weights 0.

At 0 neurons, llama.cpp (``src/models/deci.cpp``) leaves the layer without what its attention added.
As many as a block of q8_0 has numbers.
"""
ZERO_HEADS = 1
"""Heads that take the place of a removed attention where llama.cpp cannot do without, all 0.

In the first layer, from whose number it makes the width of a head; and for an out-projection's
bias, which is there without its inputs.
"""
COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What may differ from layer to layer."""
LAYER = "model.layers.{}."
ADVICE = "--layout stock prunes it to one width for all layers, which can be exported"


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp runs a class of Transformers.

    Attributes:
        name: Architecture where all layers have the same sizes.
        per_layer: The one where they differ, or where `name` lacks one of their sizes; None:
            llama.cpp has none that computes the same.
        norms: Norms of queries and keys, by their names in a layer.
        is_square: Whether `name` has no width of a head: all heads are as wide as the model.
    """

    name: str
    per_layer: str | None
    norms: tuple[str, ...] = ()
    is_square: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama", "deci"),
    "MistralForCausalLM": Family("llama", "deci"),
    "Qwen2ForCausalLM": Family("qwen2", "deci", is_square=True),
    "Qwen3ForCausalLM": Family("qwen3", None, norms=("q_norm", "k_norm")),
}
NEIGHBOURS = ("llama", "deci")
"""Architectures that rotate neighbours, where Transformers rotates halves of a head."""
BIASES: Mapping[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "deci": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": (),
}
"""Layers whose bias an architecture reads."""
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Counts:
    """Units of one layer; 0 where the sub-layer was removed."""

    heads: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint as llama.cpp runs it.

    Attributes:
        name: The architecture.
        config: The config's values.
        layers: What each layer has in the file.
        tensors: Every tensor by its name in GGUF, not read yet.
    """

    name: str
    config: Mapping[str, Any]
    layers: tuple[Counts, ...]
    tensors: Mapping[str, Part]

    @property
    def is_per_layer(self) -> bool:
        """Whether counts are arrays."""
        return self.name == "deci"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(self.config["head_dim"])


def find_layout(config: Mapping[str, Any], files: Mapping[str, Part], where: str) -> Layout:
    """How llama.cpp runs a checkpoint; no weight is read.

    Args:
        config: Of the checkpoint, as ``PreTrainedConfig.to_dict`` gives it.
        files: Its tensors.
        where: What errors call it.

    Raises:
        CheckpointError: llama.cpp cannot run it, or files and config do not agree.
    """
    family = _family(config, where)
    config = {**config, "head_dim": _head_dim(config)}
    layers = _layers(config, where)
    is_uniform = len(set(layers)) == 1 and layers[0].heads > 0 and layers[0].neurons > 0
    is_square = layers[0].heads * config["head_dim"] == config["hidden_size"]
    is_known = is_uniform and (is_square or not family.is_square)
    name = family.name if is_known else family.per_layer
    if name is None:
        raise CheckpointError(
            f"{where}: its layers differ in width, and llama.cpp has one width for all layers of "
            f"{family.name}; {ADVICE}."
        )
    biased = [f"{LAYER.format(n)}self_attn.o_proj.bias" in files for n in range(len(layers))]
    written = tuple(
        _written(counts, needs_heads=layer == 0 or biased[layer])
        for layer, counts in enumerate(layers)
    )
    tensors = dict(_tensors(name, family, config, layers, written, _Taker(files, where)))
    return Layout(name, config, written, tensors)


def _written(counts: Counts, *, needs_heads: bool) -> Counts:
    """What is written of a layer: zeros where llama.cpp cannot do without a sub-layer."""
    heads = ZERO_HEADS if needs_heads and not counts.heads else 0
    return Counts(counts.heads or heads, counts.kv_heads or heads, counts.neurons or ZERO_NEURONS)


def _family(config: Mapping[str, Any], where: str) -> Family:
    names = config.get("architectures") or [f"a {config.get('model_type')} without a head"]
    family = FAMILIES.get(str(names[0]))
    if family is None:
        raise CheckpointError(
            f"{where}: is {names[0]}; only {', '.join(FAMILIES)} can be exported to GGUF. Where "
            "the layout is stock, llama.cpp's own convert_hf_to_gguf.py may know it."
        )
    odd = {
        "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "quantization_config": bool(config.get("quantization_config")),
    }
    for name in (name for name, is_odd in odd.items() if is_odd):
        raise CheckpointError(
            f"{where}: config.json has {name}={config[name]!r:.60}, and llama.cpp's {family.name} "
            "needs plain weights and hidden_act='silu'; export the model that it was made from."
        )
    return family


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _layers(config: Mapping[str, Any], where: str) -> tuple[Counts, ...]:
    """What each layer has; Transformers writes the numbers of layers as "01" where there are ten.

    Raises:
        CheckpointError: Layers differ in something else, or in what no rotary attention can have.
    """
    own = {int(layer): values for layer, values in (config.get("per_layer_config") or {}).items()}
    kept = {name: config.get(name) for name in COUNTS}
    if kept["num_key_value_heads"] is None:
        kept["num_key_value_heads"] = kept["num_attention_heads"]
    found = []
    for layer in range(int(config["num_hidden_layers"])):
        more = [name for name in own.get(layer, {}) if name not in COUNTS]
        if more:
            raise CheckpointError(
                f"{where}: layer {layer} has its own {', '.join(more)}; llama.cpp takes heads, KV "
                f"heads and neurons layer by layer, and nothing else. {ADVICE}."
            )
        values = {**kept, **own.get(layer, {})}
        counts = Counts(*(int(values[name]) for name in COUNTS))
        if not counts.heads:  # the only KV head of a layer stays in the config
            counts = replace(counts, kv_heads=0)
        elif not counts.kv_heads or counts.heads % counts.kv_heads:
            raise CheckpointError(
                f"{where}: layer {layer} has {counts.heads} heads on {counts.kv_heads} KV heads, "
                "needed is the same number on each; prune it again."
            )
        found.append(counts)
    return tuple(found)


class _Taker:
    """Hands out tensors of the files by name and shape, and knows which were asked for."""

    def __init__(self, files: Mapping[str, Part], where: str) -> None:
        self._files = files
        self._where = where
        self._taken: set[str] = set()

    def __call__(self, name: str, *shape: int) -> Part:
        """A tensor of this shape.

        Raises:
            CheckpointError: It is not there, or has another shape.
        """
        self._taken.add(name)
        if name not in self._files:
            raise CheckpointError(
                f"{self._where}: lacks the tensor {name}, which the config says it has; save or "
                "download the checkpoint again."
            )
        found = self._files[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{self._where}: {name} has the shape {list(found.shape)}, the config says "
                f"{list(shape)}; save or download the checkpoint again."
            )
        return found

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        return name in self._files

    def check_all_taken(self, name: str) -> None:
        """Check that nothing is left.

        Raises:
            CheckpointError: There are tensors that no place in the file is for.
        """
        left = [each for each in self._files if each not in self._taken]
        left = [each for each in left if not each.endswith("rotary_emb.inv_freq")]
        if left:
            raise CheckpointError(
                f"{self._where}: holds {', '.join(left[:SHOWN])} ({len(left)} in all), for which "
                f"llama.cpp's {name} has no place, so that the result would compute something "
                "else; where these are adapters, merge them first (merge_and_unload)."
            )

    def skip(self, name: str) -> None:
        """Leave a tensor out, which is the same as another."""
        self._taken.add(name)


def _tensors(
    name: str,
    family: Family,
    config: Mapping[str, Any],
    layers: tuple[Counts, ...],
    written: tuple[Counts, ...],
    take: _Taker,
) -> Iterator[tuple[str, Part]]:
    """Every tensor by its name in GGUF, in the order of the layers."""
    vocabulary, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    yield "token_embd.weight", take("model.embed_tokens.weight", vocabulary, hidden)
    for layer, both in enumerate(zip(layers, written, strict=True)):
        for own, tensor in _layer(name, family, config, both, take, LAYER.format(layer)):
            yield f"blk.{layer}.{own}", tensor
    yield "output_norm.weight", take("model.norm.weight", hidden)
    if config.get("tie_word_embeddings"):
        take.skip("lm_head.weight")
    else:
        yield "output.weight", take("lm_head.weight", vocabulary, hidden)
    take.check_all_taken(name)


def _layer(
    name: str,
    family: Family,
    config: Mapping[str, Any],
    both: tuple[Counts, Counts],
    take: _Taker,
    path: str,
) -> Iterator[tuple[str, Part]]:
    """Tensors of one layer, whose counts are given as they are and as they are written."""
    hidden, width = int(config["hidden_size"]), int(config["head_dim"])
    counts, written = both
    turned = width if name in NEIGHBOURS else 0
    norm = take(f"{path}input_layernorm.weight", hidden)
    if written.heads:
        yield "attn_norm.weight", norm
    for own in family.norms:
        yield f"{NAMES[own]}.weight", take(f"{path}self_attn.{own}.weight", width)
    yield "ffn_norm.weight", take(f"{path}post_attention_layernorm.weight", hidden)
    wanted, there = _shapes(written, hidden, width), _shapes(counts, hidden, width)
    for own, shape in wanted.items():
        inner = "mlp" if own in FEED_FORWARD else "self_attn"
        rows = turned if own in ("q_proj", "k_proj") else 0
        is_there = 0 not in there[own]
        if is_there:
            found = take(f"{path}{inner}.{own}.weight", *there[own])
            yield f"{NAMES[own]}.weight", _turned(found, rows)
        elif 0 not in shape:
            yield f"{NAMES[own]}.weight", _zeros(*shape)
        bias = f"{path}{inner}.{own}.bias"
        if own in BIASES[name] and take.has(bias):
            yield f"{NAMES[own]}.bias", _turned(take(bias, shape[0]), rows)


def _shapes(counts: Counts, hidden: int, width: int) -> dict[str, tuple[int, int]]:
    query, key = counts.heads * width, counts.kv_heads * width
    up = (counts.neurons, hidden)
    return {
        "q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": up, "up_proj": up, "down_proj": (hidden, counts.neurons),
    }  # fmt: skip


def _turned(part: Part, width: int) -> Part:
    """Rows of each head so that the two halves alternate; as they are where there is no width."""
    if not width:
        return part
    rows = torch.arange(part.shape[0]).reshape(-1, 2, width // 2)
    return Taken(part, 0, rows.transpose(1, 2).reshape(-1))


def _zeros(*shape: int) -> Part:
    return Stored(lambda: torch.zeros(shape), shape, torch.float32)
