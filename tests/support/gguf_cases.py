"""Tiny language models with tokenizers of their own, and what llama.cpp computes of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hf_gradnas import GradNASPruner, Plan

TEXT = "The 1st of 2026 isn't  so long,\n\nsaid Zoë: 'we'll 日本 see' "
SPECIAL = ("<s>", "</s>", "<unk>")
MERGES = (
    "t h",
    "h e",
    "th e",
    "i n",
    "a n",
    "o u",
    "e r",
    "l o",
    "lo n",
    "lon g",
    "s a",
    "i d",
    "sa id",
)

MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm": ("", {}),
    "llama-bpe": (MODERN % "{1,3}", {"ignore_merges": True}),
    "smaug-bpe": (MODERN % "{1,3}", {}),
    "qwen2": (MODERN % "", {}),
    "tekken": (TEKKEN, {"ignore_merges": True}),
}
"""Patterns (none: single digits before those of GPT-2), and options of the model of pairs."""


def byte_tokenizer(steps: Sequence[Any] | None = None, **model: Any) -> tf.PreTrainedTokenizerFast:
    """Byte-level pairs, with a few merges."""
    pairs = [tuple(merge.split()) for merge in MERGES]
    pairs += [("Ġ", "the"), ("Ġ", "s"), ("Ġs", "aid"), ("2", "0"), ("Ċ", "Ċ")]
    made = ["".join(pair) for pair in pairs]
    pairs.insert(-2, ("a", "id"))
    made.append("aid")
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(made)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, **model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        steps or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def split_tokenizer(name: str) -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits text as one of `SPLITS`."""
    pattern, model = SPLITS[name]
    if pattern:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    return byte_tokenizer([*steps, rest], **model)


def piece_tokenizer() -> tf.PreTrainedTokenizerFast:
    """SentencePiece's pairs as Transformers keeps them: every split of a piece is a merge."""
    letters = sorted({*TEXT.lower(), *"abcdefghijklmnopqrstuvwxyz.T▁"} - {" ", "日", "\n"})
    made = ["".join(merge.split()) for merge in MERGES] + ["▁t", "▁the", "▁s", "▁said", "▁▁"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    names += [name for name in dict.fromkeys(made) if name not in names]
    vocabulary = {name: index for index, name in enumerate(names)}
    pairs = []
    for piece in made:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs += [pair for pair in splits if set(pair) <= vocabulary.keys()]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> tf.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    names = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = "{{ messages[0]['content'] }}"
    return wrapped


def save_model(folder: Path, kind: str = "Llama", tokenizer: Any = None, **values: Any) -> Path:
    """A model of four layers with grouped queries, whose weights are large enough to matter."""
    tokenizer = tokenizer or byte_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**{**sizes, **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_cut(source: Path, folder: Path, counts: Sequence[tuple[int, int, int]]) -> Path:
    """Cut a checkpoint: for each layer KV groups, heads in each of them, and neurons."""
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.discover(batch)
    kept: dict[str, tuple[int, ...]] = {}
    for layer, (groups, heads, neurons) in enumerate(counts):
        path = f"model.layers.{layer}"
        each = model.config.num_attention_heads // model.config.num_key_value_heads
        first = range(1, 1 + groups) if groups < model.config.num_key_value_heads else range(groups)
        kept[f"{path}.self_attn:kv_groups"] = tuple(first)
        kept[f"{path}.self_attn:heads"] = tuple(
            group * each + head for group in first for head in range(heads)
        )
        start = min(3, model.config.intermediate_size - neurons)
        kept[f"{path}.mlp:neurons"] = tuple(range(start, start + neurons))
    sizes = {axis.name: axis.size for axis in pruner.structure.axes}
    kept = {name: units for name, units in kept.items() if name in sizes}  # no groups of one
    plan = Plan(kept, sizes, "per_layer")
    pruner.apply(plan)
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    return pruner.save_pretrained(folder, tokenizer, report=False)


# --- what llama.cpp computes ----------------------------------------------------------------------


def logits_of(file: Path, ids: Sequence[int]) -> torch.Tensor:
    """Logits of a GGUF file in float64, as llama.cpp's ``deci`` and ``llama`` make them.

    Written from their graphs, not from Transformers: rotation of neighbours, counts per layer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    own = {n.partition(".")[2]: value for n, value in fields.items() if n.startswith(arch)}
    weights = {each.name: torch.from_numpy(each.data.copy()).double() for each in reader.tensors}
    width, epsilon = own["attention.key_length"], own["attention.layer_norm_rms_epsilon"]
    places = torch.arange(0, width, 2, dtype=torch.float64) / width
    factors = weights.get("rope_freqs.weight", torch.ones(width // 2))
    angles = torch.arange(len(ids))[:, None] / own["rope.freq_base"] ** places / factors
    turns = torch.polar(torch.ones_like(angles), angles)

    def per_layer(name: str) -> list[int]:
        return own[name] if isinstance(own[name], list) else [own[name]] * own["block_count"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rotated(x: torch.Tensor, heads: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(len(ids), heads, width // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).reshape(len(ids), heads, width)

    x = weights["token_embd.weight"][list(ids)]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    for layer, (heads, groups, neurons) in enumerate(zip(*map(per_layer, names), strict=True)):
        at = f"blk.{layer}."
        if heads:
            y = norm(x, f"{at}attn_norm")
            q = rotated(linear(y, f"{at}attn_q"), heads)
            k = rotated(linear(y, f"{at}attn_k"), groups).repeat_interleave(heads // groups, 1)
            v = linear(y, f"{at}attn_v").reshape(len(ids), groups, width)
            v = v.repeat_interleave(heads // groups, 1)
            scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5 + mask
            y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(len(ids), -1)
            x = x + linear(y, f"{at}attn_output")
        assert neurons, "llama.cpp would go on with what came into the layer"
        y = norm(x, f"{at}ffn_norm")
        gate = torch.nn.functional.silu(linear(y, f"{at}ffn_gate"))
        x = x + linear(gate * linear(y, f"{at}ffn_up"), f"{at}ffn_down")
    head = "output" if "output.weight" in weights else "token_embd"
    return linear(norm(x, "output_norm"), head)
