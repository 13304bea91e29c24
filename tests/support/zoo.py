"""Tiny models of every supported family, built from configs: no downloads, milliseconds each.

Every model has 3 layers, hidden size 64, 4 heads of 16, 2 key/value groups where the family has
them, and 96 FFN neurons. All parameters are random, biases and norms too, so that a wrongly
sliced bias shows; batches of text hold sequences of mixed length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers

BATCH = 4
LENGTHS = (12, 9, 5, 7)
TARGET_LENGTHS = (6, 3, 7, 5)
VOCAB = 160
LABELS = 3
SPREAD = 0.15
IGNORED = -100
AUDIO_SAMPLES = 320

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
CLASSES = {"num_labels": LABELS, "problem_type": "single_label_classification"}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    **CLASSES,
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **SPECIAL,
    **NO_DROPOUT,
}


@dataclass(frozen=True)
class Family:
    """One supported model type: which classes make it, and how small.

    Attributes:
        config: Name of the config class in transformers.
        model: Name of the model class in transformers.
        inputs: Key of `INPUTS`: what a batch holds.
        kwargs: Arguments of the config.
        kernels: Attention kernels that the class accepts.
    """

    config: str
    model: str
    inputs: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ("eager", "sdpa")

    @property
    def generates(self) -> bool:
        """Whether the model has ``generate``."""
        return self.inputs in {"causal", "seq2seq", "speech"}


FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", "BertForSequenceClassification", "classify", ENCODER),
    "roberta": Family(
        "RobertaConfig",
        "RobertaForSequenceClassification",
        "classify",
        {**ENCODER, "pad_token_id": 0},
    ),
    "distilbert": Family(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        "classify",
        {
            "vocab_size": VOCAB,
            "dim": 64,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 96,
            "max_position_embeddings": 64,
            "seq_classif_dropout": 0.0,
            **CLASSES,
        },
    ),
    "albert": Family(
        "AlbertConfig",
        "AlbertForSequenceClassification",
        "classify",
        {**ENCODER, "embedding_size": 32, "num_hidden_groups": 1, "inner_group_num": 1},
    ),
    "electra": Family(
        "ElectraConfig",
        "ElectraForSequenceClassification",
        "classify",
        {**ENCODER, "embedding_size": 32},
    ),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        "causal",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 96,
            "n_positions": 64,
            **SPECIAL,
        },
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        "causal",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", "causal", DECODER),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", "causal", GROUPED),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", "causal", {**GROUPED, "sliding_window": None}
    ),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", "causal", GROUPED),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", "causal", {**GROUPED, "head_dim": 16}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "causal",
        {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
        kernels=("eager",),  # its soft cap on attention scores has no sdpa form
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", "causal", GROUPED),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        "seq2seq",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
    ),
    "bart": Family(
        "BartConfig",
        "BartForConditionalGeneration",
        "seq2seq",
        {**SEQ2SEQ, "max_position_embeddings": 64},
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        "image",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 16,
            "patch_size": 4,
            **CLASSES,
        },
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        "speech",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 24,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
        },
    ),
}


IMAGES = {"num_labels": LABELS, "problem_type": "single_label_classification", "image_size": 24}
STAGES = {**CLASSES, "embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [2, 2, 1]}
CONVNEXT = {
    **IMAGES,
    "num_stages": 3,
    "patch_size": 2,
    "hidden_sizes": [8, 12, 16],
    "depths": [1, 2, 1],
}
AUDIO = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [8, 12, 10],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "final_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    **CLASSES,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

# Families with convolutions; they have no hidden size, heads or layers in common.
CONV_FAMILIES: dict[str, Family] = {
    "resnet": Family(
        "ResNetConfig", "ResNetForImageClassification", "image", {**STAGES, "layer_type": "basic"}
    ),
    "resnet_bottleneck": Family(
        "ResNetConfig",
        "ResNetForImageClassification",
        "image",
        {**STAGES, "hidden_sizes": [16, 24, 32], "layer_type": "bottleneck"},
    ),
    "regnet": Family(
        "RegNetConfig",
        "RegNetForImageClassification",
        "image",
        {
            **STAGES,
            "embedding_size": 32,
            "hidden_sizes": [32, 40, 48],
            "depths": [1, 2, 1],
            "groups_width": 8,
            "layer_type": "y",
        },
    ),
    "convnext": Family("ConvNextConfig", "ConvNextForImageClassification", "image", CONVNEXT),
    "convnextv2": Family("ConvNextV2Config", "ConvNextV2ForImageClassification", "image", CONVNEXT),
    "mobilenet_v1": Family(
        "MobileNetV1Config",
        "MobileNetV1ForImageClassification",
        "image",
        {**IMAGES, "depth_multiplier": 0.25, "classifier_dropout_prob": 0.0},
    ),
    "mobilenet_v2": Family(
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        "image",
        {**IMAGES, "depth_multiplier": 0.25, "classifier_dropout_prob": 0.0},
    ),
    "efficientnet": Family(
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        "image",
        {
            **IMAGES,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 64],
            "kernel_sizes": [3, 5, 3],
            "strides": [1, 2, 1],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 4, 2],
            "hidden_dim": 320,
            "dropout_rate": 0.0,
            "drop_connect_rate": 0.0,
        },
    ),
    "segformer": Family(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        "segment",
        {
            "num_labels": LABELS,
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
        },
    ),
    "wav2vec2": Family("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", "audio", AUDIO),
    "wav2vec2_layer": Family("Wav2Vec2Config", "Wav2Vec2ForCTC", "ctc", {**AUDIO, **STABLE}),
    "hubert": Family("HubertConfig", "HubertForSequenceClassification", "audio", AUDIO),
}


MIXTURE = {**GROUPED, "num_hidden_layers": 2, "num_experts_per_tok": 2, "head_dim": 16}
SHARED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}

# Families with mixtures of experts: 6 experts of 24 neurons, of which 2 run for a token.
MIXTURES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        "causal",
        {**MIXTURE, "intermediate_size": 24, "num_local_experts": 6, "sliding_window": None},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "causal",
        {
            **MIXTURE,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "num_experts": 6,
            "norm_topk_prob": False,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        "causal",
        {**MIXTURE, "intermediate_size": 24, "num_local_experts": 6},
        kernels=("eager",),
    ),
    "dots1": Family("Dots1Config", "Dots1ForCausalLM", "causal", {**MIXTURE, **SHARED}),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        "causal",
        {
            **MIXTURE,
            "intermediate_size": 24,
            "intermediate_size_mlp": 96,
            "num_local_experts": 6,
            "interleave_moe_layer_step": 1,
            "attn_temperature_tuning": False,
        },
    ),
    "dbrx": Family(
        "DbrxConfig",
        "DbrxForCausalLM",
        "causal",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "hidden_size": 64,
                "moe_num_experts": 6,
                "moe_top_k": 2,
            },
            **SPECIAL,
        },
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        "JetMoeForCausalLM",
        "causal",
        {
            **MIXTURE,
            "kv_channels": 16,
            "intermediate_size": 24,
            "num_local_experts": 6,
        },
    ),
}
LISTS: dict[str, Family] = {
    "switch": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        "seq2seq",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_experts": 6,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
    ),
}
"""Families whose experts are modules of a list."""
ALL_RUN = ("llama4",)
"""Mixtures whose experts all run for every token, on inputs that are 0 where one is not chosen."""
OWN_KERNELS = (*ALL_RUN, "dbrx", "jetmoe")
"""Mixtures whose experts do not run behind Transformers' interface."""


@dataclass(frozen=True)
class Built:
    """A model that `build` made, and the parameters that its class freezes."""

    model: transformers.PreTrainedModel
    frozen: frozenset[str]


BUILT: list[Built] = []  # what this test file has built: conftest looks for traces on it


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attn: str = "eager",
    **overrides: Any,
) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Make the family's tiny model, in eval mode, and one labelled batch for ``model(**inputs)``.

    Args:
        name: Key of `FAMILIES`, `CONV_FAMILIES`, `MIXTURES` or `LISTS`.
        dtype: Type of the parameters and of floating-point inputs.
        seed: Decides parameters and batch.
        attn: Attention kernel: ``"eager"`` or ``"sdpa"``.
        **overrides: Replace arguments of the config.
    """
    family = {**FAMILIES, **CONV_FAMILIES, **MIXTURES, **LISTS}[name]
    config = getattr(transformers, family.config)(**{**family.kwargs, **overrides})
    config._attn_implementation = attn
    if name in MIXTURES and name not in OWN_KERNELS:
        config._experts_implementation = "eager" if dtype is torch.float64 else "grouped_mm"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = getattr(transformers, family.model)(config).to(dtype).eval()
    _randomise(model, generator=generator)
    frozen = frozenset(path for path, p in model.named_parameters() if not p.requires_grad)
    BUILT.append(Built(model, frozen))
    batch = INPUTS[family.inputs](config, generator)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    return model, inputs


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let forwards that cast to float32 inside (norms, softmax, losses) cast to float64 instead.

    Without it a float64 Llama is exact to 1e-7 only, because RMSNorm and the eager softmax round
    to float32; equations that hold to 1e-10 over a whole model are tested under it.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@torch.no_grad()
def _randomise(model: transformers.PreTrainedModel, *, generator: torch.Generator) -> None:
    """Draw every parameter anew: vectors keep their mean (norms 1, biases 0), matrices do not.

    The running statistics of batch norms are drawn too, and their weights, which some classes
    set to 0, are near 1.
    """
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Convolutions keep the size of what they read, or nothing would be left of it in the end.
        noise *= (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 2 else SPREAD
        if parameter.dim() == 1:
            noise += parameter
        parameter.copy_(noise)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.bias.add_(1)  # keeps the few ReLUs of a squeeze-and-excite alive
        if isinstance(module, torch.nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.weight.copy_(torch.randn(shape, generator=generator) * SPREAD + 1)
            module.running_mean.copy_(torch.randn(shape, generator=generator) * SPREAD)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)


def _tokens(lengths: tuple[int, ...], *, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Ids and attention mask ``(batch, seq)``, padded on the right with 0."""
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, VOCAB, shape, generator=generator) * mask, mask


def _class_labels(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, LABELS, (BATCH,), generator=generator)


def _classify(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    ids, mask = _tokens(LENGTHS, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": _class_labels(generator)}


def _causal(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    ids, mask = _tokens(LENGTHS, generator=generator)
    labels = ids.masked_fill(mask == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _targets(generator: torch.Generator) -> torch.Tensor:
    ids, mask = _tokens(TARGET_LENGTHS, generator=generator)
    return ids.masked_fill(mask == 0, IGNORED)


def _seq2seq(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    ids, mask = _tokens(LENGTHS, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": _targets(generator)}


def _pixels(config: transformers.PreTrainedConfig, generator: torch.Generator) -> torch.Tensor:
    side = vars(config).get("image_size", IMAGES["image_size"])
    return torch.randn((BATCH, config.num_channels, side, side), generator=generator)


def _image(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    return {"pixel_values": _pixels(config, generator), "labels": _class_labels(generator)}


def _segment(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    pixels = _pixels(config, generator)
    labels = torch.randint(0, LABELS, (BATCH, *pixels.shape[2:]), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def _audio(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    samples = torch.randn((BATCH, AUDIO_SAMPLES), generator=generator)
    return {"input_values": samples, "labels": _class_labels(generator)}


def _ctc(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    labels = torch.randint(3, config.vocab_size, (BATCH, 4), generator=generator)
    return {**_audio(config, generator), "labels": labels}


def _speech(config: transformers.PreTrainedConfig, generator: torch.Generator) -> dict:
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator)
    return {"input_features": features, "labels": _targets(generator)}


INPUTS = {
    "classify": _classify,
    "causal": _causal,
    "seq2seq": _seq2seq,
    "image": _image,
    "speech": _speech,
    "segment": _segment,
    "audio": _audio,
    "ctc": _ctc,
}
