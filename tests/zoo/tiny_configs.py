"""Tiny configs of every type that Transformers has, made from the defaults of each config class.

A value is shrunk by its name: `RULES` has one row per concept (hidden sizes, heads, layers, …), and
`overrides` has what a class needs besides. A new type mostly needs nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import overrides
import transformers
from not_built import NOT_BUILT
from overrides import DROP
from sizes import (
    EXPERT_WIDTH,
    EXPERTS,
    FFN,
    GROUPS,
    HEAD,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    TOP,
    VOCABULARY,
)
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

TASKS = (
    ("speech_seq2seq", "FOR_SPEECH_SEQ_2_SEQ"),
    ("seq2seq_lm", "FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    ("masked_lm", "FOR_MASKED_LM"),
    ("causal_lm", "FOR_CAUSAL_LM"),
    ("multimodal_lm", "FOR_IMAGE_TEXT_TO_TEXT"),
    ("multimodal_lm", "FOR_MULTIMODAL_LM"),
    ("sequence_classification", "FOR_SEQUENCE_CLASSIFICATION"),
    ("image_classification", "FOR_IMAGE_CLASSIFICATION"),
    ("video_classification", "FOR_VIDEO_CLASSIFICATION"),
    ("audio_classification", "FOR_AUDIO_CLASSIFICATION"),
    ("ctc", "FOR_CTC"),
    ("semantic_segmentation", "FOR_SEMANTIC_SEGMENTATION"),
    ("base", ""),
    ("object_detection", "FOR_OBJECT_DETECTION"),
    ("depth", "FOR_DEPTH_ESTIMATION"),
    ("image_to_image", "FOR_IMAGE_TO_IMAGE"),
    ("matting", "FOR_IMAGE_MATTING"),
    ("universal_segmentation", "FOR_UNIVERSAL_SEGMENTATION"),
    ("mask_generation", "FOR_MASK_GENERATION"),
    ("keypoint_detection", "FOR_KEYPOINT_DETECTION"),
    ("keypoint_matching", "FOR_KEYPOINT_MATCHING"),
    ("pose_estimation", "FOR_POSE_ESTIMATION"),
    ("zero_shot_detection", "FOR_ZERO_SHOT_OBJECT_DETECTION"),
    ("visual_questions", "FOR_VISUAL_QUESTION_ANSWERING"),
    ("text_recognition", "FOR_TEXT_RECOGNITION"),
    ("table_recognition", "FOR_TABLE_RECOGNITION"),
    ("speech", "FOR_TEXT_TO_SPECTROGRAM"),
    ("speech", "FOR_TEXT_TO_WAVEFORM"),
    ("series_prediction", "FOR_TIME_SERIES_PREDICTION"),
    ("series_regression", "FOR_TIME_SERIES_REGRESSION"),
    ("series_classification", "FOR_TIME_SERIES_CLASSIFICATION"),
    ("rnnt", "FOR_RNNT"),
    ("tdt", "FOR_TDT"),
    ("image_tokens", "FOR_CAUSAL_IMAGE_MODELING"),
    ("backbone", "FOR_BACKBONE"),
    ("image", "FOR_IMAGE"),
    ("text_encoding", "FOR_TEXT_ENCODING"),
    ("pretraining", "FOR_PRETRAINING"),
)
"""Tasks and the auto mapping of each; a type is built for the first that has a class for it."""


def mapped() -> list[tuple[str, Mapping[str, Any]]]:
    """Tasks with Transformers' own names of classes by type."""
    names = [
        (task, f"MODEL_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES")
        for task, name in TASKS
    ]
    return [
        (task, vars(modeling_auto)[name]) for task, name in names if hasattr(modeling_auto, name)
    ]


def all_types() -> list[str]:
    """Every type that has a class and can be built tiny, in Transformers' order."""
    tables = mapped()
    named = [name for name in CONFIG_MAPPING_NAMES if any(name in table for _, table in tables)]
    return [name for name in named if name not in NOT_BUILT]


def class_of(name: str) -> tuple[str, str]:
    """Name of the class that a type is built with, and its task."""
    if name in overrides.CLASSES:
        return overrides.CLASSES[name]
    tables = mapped()
    if "text_config" in CONFIG_MAPPING[name].sub_configs:
        tables = sorted(tables, key=lambda item: item[0] != "multimodal_lm")
    for task, table in tables:
        if name in table:
            found = table[name]
            return (found[0] if isinstance(found, tuple | list) else found), task
    raise KeyError(f"{name}: no class is mapped.")


def tiny_config(name: str) -> PreTrainedConfig:
    """The tiny config of a type."""
    cls = CONFIG_MAPPING[name]
    if name in overrides.BUILDERS:
        config = overrides.BUILDERS[name](tiny_config)
    else:
        config = cls(**_tiny_values(cls, cls(), overrides.TYPES.get(name, {})))
    for part in (config, value_of(config, "decoder"), value_of(config, "text_config")):
        if isinstance(part, PreTrainedConfig) and part.is_encoder_decoder:
            for key in ("decoder_start_token_id", "pad_token_id"):
                if value_of(part, key) is None:
                    setattr(part, key, 0)
    _place_tokens(config)
    return config


def value_of(config: PreTrainedConfig | None, name: str, default: Any = None) -> Any:
    """A value of a config, read without a word where layers have their own."""
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    try:
        return getattr(config, name, default) if read is None else read(name, default)
    except Exception:  # a property may compute what is not there
        return default


# --- one value ------------------------------------------------------------------------------------

_HIDDEN = frozenset(
    "hidden_size d_model n_embd dim hidden_dim emb_dim encoder_hidden_size decoder_hidden_size "
    "projection_dim word_embed_proj_dim embedding_size projection_size projector_hidden_size "
    "encoder_hidden_dim out_hidden_size text_hidden_size vision_hidden_size cross_hidden_size "
    "model_dim embedding_dim image_text_hidden_size mit_hidden_size backbone_hidden_size "
    "moe_hidden_size cross_attention_hidden_size fusion_hidden_size hidden_size_global "
    "hidden_channels attention_hidden_size output_embedding_size input_embedding_size "
    "patch_embed_hidden_size output_hidden_size vocab_hidden_size pred_hidden_size "
    "memory_attention_hidden_size memory_encoder_hidden_size mask_downsampler_embed_dim "
    "memory_fuser_embed_dim kv_dim perceiver_resampler_hidden_size neck_hidden_size "
    "fpn_hidden_size enc_dim d_latents task_encoder_hidden_dim t2u_hidden_size decoder_dim "
    "text_dim proj_dim vit_dim head_hidden_size prompt_embed_dim embed_proj_dim bert_hidden_size "
    "hidden_size_bert projection_hidden_size text_embed_dim vision_embed_dim "
    "retrieval_proj_size".split()
)
_FFN = frozenset(
    "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size "
    "mlp_dim dim_feedforward decoder_intermediate_size feed_forward_size d_inner "
    "mit_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim "
    "t2u_decoder_ffn_dim dim_ff encoder_dim_feedforward decoder_dim_feedforward "
    "perceiver_resampler_mlp_intermediate_size encoder_feedforward_dim "
    "dense_intermediate_size patch_transformer_intermediate_size "
    "projection_intermediate_size alignment_intermediate_size prefix_dense_intermediate_size "
    "memory_attention_mlp_hidden_size memory_attention_feed_forward_hidden_size "
    "intermediate_size_mlp ff_dim mlp_hidden_size projector_intermediate_size "
    "decoder_mlp_dim prompt_intermediate_size shared_intermediate_size "
    "adapter_intermediate_size".split()
)
_EXPERT_WIDTH = frozenset(
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "expert_intermediate_size intermediate_size_moe".split()
)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPS = re.compile(
    r"num_key_value_heads|num_kv_heads|n_kv_heads|num_key_value_attention_heads|kv_n_heads"
    r"|.*_num_key_value_heads|multi_query_group_num"
)
_HEADS = (
    r"num_attention_heads|n_heads?|num_heads|attention_heads|.*_attention_heads|self_attn_heads"
    r"|resampler_(n_)?heads|decoder_num_heads|linear_num_heads"
)
_WIDTHS = (
    r"head_dim|attention_head_size|d_kv|kv_channels|head_size|attention_head_dim|cross_head_dim|d_head"
    r"|dim_head|global_head_dim|swa_head_dim|linear_head_dim|resampler_head_dim"
    r"|perceiver_resampler_attention_head_dim|linear_key_head_dim|linear_value_head_dim"
    r"|mamba_head_dim|mamba_d_head|v_head_dim|qk_nope_head_dim|indexer_head_dim|index_head_dim"
)
_DEPTHS = (
    r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_encoder_layers"
    r"|num_decoder_layers|.*_num_hidden_layers|decoder_num_layers|num_blocks"
    r"|text_encoder_num_layers|[rxl]_layers|speech_encoder_layers|t2u_(en|de)coder_layers"
    r"|decoder_depth|resampler_depth|perceiver_resampler_num_layers|num_fov_head_layers"
    r"|memory_attention_num_layers|num_layers_per_stack|attn_layers_num"
    r"|patch_transformer_num_layers|num_patch_transformer_layers|num_self_attends_per_block"
    r"|num_conformer_layers|num_global_layers|n_codebook_layers"
)
_LENGTHS = (
    r".*max_position_embeddings|n_positions|max_source_positions|max_target_positions|max_seq_len"
    r"|seq_length|max_sequence_length|max_(encoder|decoder)_position_embeddings"
    r"|max_2d_position_embeddings|max_seq_length|n_ctx|max_text_positions|max_speech_positions"
    r"|max_length_positions|max_context_length"
)


def _to(value: int) -> Callable[[int], int]:
    return lambda old: value


def _at_most(value: int) -> Callable[[int], int]:
    return lambda old: min(old, value)


def _above(limit: int, value: int) -> Callable[[int], int]:
    """The value where the old one is above a limit."""
    return lambda old: value if old > limit else old


RULES: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = tuple(
    (re.compile(pattern), change)
    for pattern, change in (
        ("|".join(sorted(_HIDDEN)), _to(HIDDEN)),
        ("embed_dim", lambda old: HIDDEN if old >= HIDDEN else old),
        (_HEADS, lambda old: 1 if old == 1 else HEADS),
        (_WIDTHS, _to(HEAD)),
        ("qk_rope_head_dim", lambda old: 8 if old else 0),
        ("qk_head_dim", _to(HEAD + 8)),
        ("[kqo]v?_lora_rank", _to(32)),
        (_DEPTHS, _at_most(LAYERS)),
        ("|".join(sorted(_FFN)), _to(FFN)),
        ("|".join(sorted(_EXPERT_WIDTH)), _to(EXPERT_WIDTH)),
        (
            "num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts"
            "|n_experts",
            _at_most(EXPERTS),
        ),
        (
            "num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts"
            "|experts_per_token|n_experts_per_tok",
            _at_most(TOP),
        ),
        ("n_group|topk_group", _to(1)),
        ("n_shared_experts|num_shared_experts|moe_num_shared_experts", _at_most(1)),
        (".*vocab_size.*", _at_most(VOCABULARY)),
        (_LENGTHS, _at_most(POSITIONS)),
        ("sliding_window(_size)?|attention_window_size|attention_chunk_size", _at_most(8)),
        ("image_size|pretrain_image_size|force_image_size|input_size_image", _to(32)),
        ("patch_size", _above(4, 8)),
        ("window_size", _above(4, 4)),
        ("mamba_d_state|ssm_state_size|state_size", _to(8)),
        ("mamba_n_heads|mamba_num_heads", _to(8)),
        ("linear_num_value_heads", _to(HEADS)),
        ("linear_num_key_heads|index_n_heads|indexer_n_heads", _to(GROUPS)),
        ("rotary_dim", _to(8)),
        ("mamba_n_groups|mamba_ngroups|n_groups", _to(1)),
        ("mamba_chunk_size|chunk_size", _above(8, 8)),
        ("mamba_dt_rank|time_step_rank|index_topk", _to(4)),
        (
            "num_queries|num_query_tokens|num_latents|resampler_num_latents"
            "|perceiver_resampler_num_latents|hidden_size_per_layer_input|laurel_rank",
            _at_most(8),
        ),
        ("num_frames", _at_most(4)),
        ("first_k_dense_replace|max_window_layers", _at_most(1)),
        ("codevector_dim|proj_codevector_dim|classifier_proj_size|xvector_output_dim", _to(32)),
        ("num_codevectors_per_group", _to(8)),
        ("num_conv_pos_embeddings", _at_most(16)),
        ("num_conv_pos_embedding_groups", _at_most(2)),
        (
            "pooler_output_size|prediction_head_size|iou_head_hidden_dim|mask_dim|fpn_feature_size"
            "|mask_feature_size|feature_dim|hidden_dim_bbox",
            _at_most(32),
        ),
        ("codebook_size", _at_most(32)),
    )
)
"""How a whole number is shrunk, by the name of the value; the first that fits."""
_NO_CHANCE = re.compile(
    r"dropout|pdrop|layerdrop|drop_path|drop_rate|jitter|mask_time_prob|mask_feature_prob"
)
_TOKEN = re.compile(r"(token_id|token_index|_id|_idx)$")
_NONE = object()


def _shrunk(name: str, value: Any, default: Any, config: PreTrainedConfig, own: set[str]) -> Any:
    """The tiny value, or `_NONE` to leave it to the class.

    Args:
        name: Of the value.
        value: What the config has.
        default: What the class says; None where it computes the value from others.
        config: The config.
        own: Names of values that are not those of the class's defaults.
    """
    if isinstance(value, bool):
        return _NONE
    if _GROUPS.fullmatch(name):
        return _tiny_groups(name, value, default, config, own)
    if value is None:
        return _NONE
    if isinstance(value, float):
        if _NO_CHANCE.search(name):
            return 0.0
        is_spread = name in ("initializer_range", "init_std") and 0.004 < value < 0.06
        return 0.1 if is_spread else _NONE
    if default is None and name not in own:
        return _NONE
    if name in _SPECIAL:
        is_small = isinstance(value, int) and 0 <= value < 5
        return value if is_small else _SPECIAL[name]
    if isinstance(value, int):
        return _tiny_number(name, value, config)
    if isinstance(value, list | tuple) and value and all(type(x) in (int, float) for x in value):
        return _tiny_list(name, value, config)
    return _NONE


def _tiny_groups(
    name: str, value: Any, default: Any, config: PreTrainedConfig, own: set[str]
) -> Any:
    """Two groups wherever a class knows groups, also where its default is one per head."""
    if value is None:
        return GROUPS
    if not isinstance(value, int):
        return _NONE
    if default is None and name not in own:
        return GROUPS
    if value == default == 1:
        return 1
    names = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
    heads = next(filter(None, (value_of(config, other) for other in names)), None)
    return HEADS if value == heads else GROUPS


def _tiny_number(name: str, value: int, config: PreTrainedConfig) -> Any:
    if _TOKEN.search(name):
        return _NONE  # placed in the vocabulary later
    if name == "embed_dim":
        heads = value_of(config, "num_heads") or value_of(config, "num_attention_heads")
        if isinstance(heads, list | tuple):
            return HEAD * heads[0]
    for pattern, change in RULES:
        if pattern.fullmatch(name):
            return change(value)
    return _NONE


def _tiny_list(name: str, value: Any, config: PreTrainedConfig) -> Any:
    make = type(value)
    if name in ("depths", "num_layers_per_stage", "layer_depths"):
        return make(1 for _ in value)
    if name in ("hidden_sizes", "encoder_hidden_sizes", "embed_dims", "embed_dim",
                "embed_dim_per_stage"):  # fmt: skip
        heads = value_of(config, "num_attention_heads") or value_of(config, "num_heads")
        first = min(value[0], HEAD * (heads[0] if isinstance(heads, list | tuple) else 1))
        return make(max(1, round(size * first / value[0])) for size in value)
    if (name == "conv_dim" and len(value) >= 4) or name == "tdnn_dim":
        return make(16 for _ in value)
    if name in ("image_size", "img_size") and max(value) > 32:
        return make(32 for _ in value)
    if name == "patch_size" and max(value) > 4:
        return make(min(8, size) for size in value)
    return _NONE


# --- all values of a config -----------------------------------------------------------------------

_OF_ALL = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


def _tiny_values(
    cls: type[PreTrainedConfig], config: PreTrainedConfig, forced: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments that make a tiny one of `config`; nested mappings force values of sub-configs."""
    forced = _merged(overrides.CONFIGS.get(cls.__name__, {}), forced)
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    } | {
        field.name: field.default_factory()
        for field in dataclasses.fields(cls)
        if field.default_factory is not dataclasses.MISSING
    }
    own = _not_default(cls, config, defaults)
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        value = value_of(config, name)
        if name in forced or isinstance(value, PreTrainedConfig):
            continue
        if name in _OF_ALL and name not in _SPECIAL:
            continue
        new = _shrunk(name, value, default, config, own)
        if new is not _NONE:
            if name not in _SPECIAL or default is not None:
                values[name] = new
        elif name in own and value is not None and not isinstance(value, dict):
            values[name] = value
    _add_rotation(cls, config, defaults, forced, values)
    _shorten(config, forced, values)
    for name in sorted(defaults.keys() | cls.sub_configs.keys()):
        inner, given = value_of(config, name), forced.get(name, {})
        if isinstance(inner, PreTrainedConfig) and isinstance(given, dict):
            values[name] = type(inner)(**_tiny_values(type(inner), inner, given))
    for name, value in forced.items():
        if not (name in values and isinstance(value, dict)):
            values[name] = value() if callable(value) else value
    values = {name: value for name, value in values.items() if value is not DROP}
    _place_ids(config, defaults, forced, values)
    return values


def _not_default(
    cls: type[PreTrainedConfig], config: PreTrainedConfig, defaults: Mapping[str, Any]
) -> set[str]:
    """Names of values that a config around this one gave it."""
    try:
        usual = cls()
    except Exception:  # some need arguments
        return set()
    return {name for name in defaults if _differ(value_of(config, name), value_of(usual, name))}


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except Exception:  # a config whose layers have values of their own cannot be compared
        return False


def _add_rotation(
    cls: type[PreTrainedConfig],
    config: PreTrainedConfig,
    defaults: Mapping[str, Any],
    forced: Mapping[str, Any],
    values: dict[str, Any],
) -> None:
    """Sections of rotary positions of images, which the defaults give for heads of 128."""
    ignored = cls.ignore_keys_at_rope_validation or ()
    if "rope_parameters" not in defaults or "rope_parameters" in forced:
        return
    if "mrope_section" in ignored:
        given = value_of(config, "rope_parameters") or {}
        rotation = {key: value for key, value in given.items() if not isinstance(value, dict)}
        rotation.setdefault("rope_type", "default")
        rotation.setdefault("rope_theta", 10000.0)
        half = int(HEAD * rotation.get("partial_rotary_factor", 1.0)) // 2
        rotation["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        values["rope_parameters"] = rotation


def _shorten(config: PreTrainedConfig, forced: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Cut lists with one entry per layer."""
    before = value_of(config, "num_hidden_layers")
    after = values.get("num_hidden_layers", forced.get("num_hidden_layers"))
    if isinstance(before, int) and before > 3 and after:
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) == before:
                values[name] = type(value)(value[:after])


def _place_ids(
    config: PreTrainedConfig,
    defaults: Mapping[str, Any],
    forced: Mapping[str, Any],
    values: dict[str, Any],
) -> None:
    """Give special tokens beyond the tiny vocabulary the last ids in it."""
    size = values.get("vocab_size", defaults.get("vocab_size"))
    if not isinstance(size, int):
        return
    free = size - 1
    for name in sorted(defaults.keys() - forced.keys() - _SPECIAL.keys()):
        if re.search(r"(token_id|token_index)$", name):
            value = values.get(name, value_of(config, name))
            if type(value) is int and value >= size:
                values[name], free = free, free - 1


def _place_tokens(config: PreTrainedConfig) -> None:
    """The same for placeholders of images and audio, which the outermost config holds."""
    try:
        size = config.get_text_config().vocab_size
    except Exception:  # has no text, or several
        return
    if not isinstance(size, int):
        return
    used: dict[int, int] = {}
    parts = [config, *(value_of(config, name) for name in type(config).sub_configs)]
    for part in parts:
        for name in sorted(vars(part)) if isinstance(part, PreTrainedConfig) else ():
            value = value_of(part, name)
            is_token = re.search(r"(token_id|token_index)$", name) and name not in _SPECIAL
            if is_token and type(value) is int and value >= size:
                used.setdefault(value, size - 1 - len(used))
                setattr(part, name, used[value])


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(first)
    for name, value in second.items():
        inner = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = _merged(out[name], value) if inner else value
    return out


def built(name: str) -> tuple[type[Any], PreTrainedConfig]:
    """The class of a type, and a tiny config of its own for it."""
    return getattr(transformers, class_of(name)[0]), copy.deepcopy(tiny_config(name))
