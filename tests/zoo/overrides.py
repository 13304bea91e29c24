"""What a type needs besides the rules of `tiny_configs`: values, another class, a config of two.

The values of a config class hold wherever it occurs, those of a type for its outermost config only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    EncoderDecoderConfig,
    PreTrainedConfig,
    ResNetConfig,
    SpeechEncoderDecoderConfig,
    VisionEncoderDecoderConfig,
)

DROP = object()
"""Leaves a value out, so that the class computes it."""


def _resnet(*stages: int) -> Callable[[], ResNetConfig]:
    """A tiny backbone that puts out these stages."""

    def made() -> ResNetConfig:
        return ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1],
            out_features=[f"stage{stage}" for stage in stages],
            layer_type="basic",
        )

    return made


CONFIGS: dict[str, dict[str, Any]] = {
    "ASTConfig": {"max_length": 64, "num_mel_bins": 32},
    "AlignVisionConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 64},
    "AutoformerConfig": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "BailingHybridConfig": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "BambaConfig": {"attn_layer_indices": [1]},
    "BitConfig": {"num_groups": 4, "embedding_size": 32, "hidden_sizes": [32, 64, 96, 128]},
    "Blip2Config": {"image_token_id": 150, "num_query_tokens": 4},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "BltLocalDecoderConfig": {"vocab_size": 260},
    "BltLocalEncoderConfig": {"vocab_size": 260},
    "BltPatcherConfig": {"vocab_size": 260},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 150}},
    "ChameleonVQVAEConfig": {
        "base_channels": 32,
        "num_embeddings": 16,
        "embed_dim": 16,
        "latent_channels": 16,
        "resolution": 32,
    },
    "ClapAudioConfig": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "patch_stride": [4, 4],
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "depths": [1, 1],
        "num_attention_heads": [2, 4],
    },
    "CohereCompassTextConfig": {
        "num_hidden_layers": 4,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "DepthAnythingConfig": {"reassemble_hidden_size": 64},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "DonutSwinConfig": {"image_size": 64, "window_size": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3NoteVisionConfig": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "dense"]},
    "ESMCConfig": {"num_key_value_heads": 4},
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "Emu3Config": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 149}},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
        }
    },
    "EsmConfig": {
        "vocab_size": 160,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
    },
    "EsmcConfig": {"num_key_value_heads": 4},
    "Exaone4_5_VisionConfig": {"window_size": 32},
    "FalconH1Config": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 160},
    "Gemma4TextConfig": {"num_hidden_layers": 3, "global_head_dim": 32},
    "Gemma4UnifiedTextConfig": {"num_hidden_layers": 3, "global_head_dim": 32},
    "Glm5NextTextConfig": {"num_hidden_layers": 4},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "GraniteSpeech5EncoderConfig": {"num_key_value_heads": 4},
    "HGNetV2Config": {"hidden_sizes": DROP},
    "HunYuanDenseV1Config": {"head_dim": 16},
    "HunYuanMoEV1Config": {"head_dim": 16},
    "HunYuanVLTextConfig": {"head_dim": 16},
    "InformerConfig": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "InstructBlipConfig": {"image_token_id": 150, "num_query_tokens": 4},
    "JambaConfig": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "KimiLinearConfig": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Kosmos2Config": {"latent_query_num": 4},
    "LEDConfig": {"attention_window": 4},
    "LayoutLMv3Config": {"coordinate_size": 8, "shape_size": 16, "input_size": 32, "patch_size": 8},
    "LevitConfig": {
        "image_size": 224,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "drop_path_rate": 0,
        "patch_size": 16,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Lfm3Config": {"num_hidden_layers": 4},
    "Lfm3VlTextConfig": {"num_hidden_layers": 4},
    "LiltConfig": {"hidden_size": 96},
    "LongcatFlashConfig": {"head_dim": 8, "num_key_value_heads": 4},
    "LongformerConfig": {"attention_window": 4},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "MaskFormerSwinConfig": {"image_size": 64, "window_size": 2},
    "MimiConfig": {"upsample_groups": 64, "codebook_dim": 16, "num_filters": 8},
    "MinistralConfig": {"head_dim": 16},
    "MobileViTConfig": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64],
    },
    "MobileViTV2Config": {"image_size": 64},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "Nemotron3DiarizationAudioConfig": {"num_key_value_heads": 4},
    "Nemotron3DiarizationConfig": {"num_key_value_heads": 4},
    "Nemotron3_5TranscribeAsrAudioConfig": {"num_key_value_heads": 4},
    "Nemotron3_5TranscribeAudioConfig": {"num_key_value_heads": 4},
    "NllbMoeConfig": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "OlmoHybridConfig": {"num_hidden_layers": 4},
    "PaddleOCRTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
        }
    },
    "PatchTSMixerConfig": {"context_length": 32, "patch_length": 4, "patch_stride": 4},
    "PatchTSTConfig": {"context_length": 32, "patch_length": 4, "patch_stride": 4},
    "PerceiverConfig": {"num_latents": 8},
    "Pix2StructVisionConfig": {"patch_embed_hidden_size": 768},
    "PocketTTSAudioTokenizerConfig": {"upsample_groups": 64, "num_filters": 8},
    "PromptDepthAnythingConfig": {"reassemble_hidden_size": 64},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "Qwen2_5OmniVisionEncoderConfig": {"window_size": 32},
    "Qwen2_5_VLVisionConfig": {"window_size": 32},
    "Qwen3NextConfig": {"num_hidden_layers": 4},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "Qwen3_5MoeTextConfig": {"num_hidden_layers": 4},
    "Qwen3_5TextConfig": {"num_hidden_layers": 4},
    "Qwen4ExpTextConfig": {
        "num_hidden_layers": 4,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 4},
    "ReformerConfig": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [3, 4],
        "axial_pos_embds_dim": [16, 48],
        "feed_forward_size": 96,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "Sam2HieraDetConfig": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads": 1,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 1, 1],
        "global_attention_blocks": [3],
        "image_size": [128, 128],
        "window_positional_embedding_background_size": [4, 4],
    },
    "Sam2VisionConfig": {"backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 64},
    "SamVisionConfig": {"output_channels": 64},
    "Siglip2VisionConfig": {"num_patches": 16},
    "Step3p7TextConfig": {"sliding_window": 8},
    "SwinConfig": {"image_size": 64, "window_size": 2},
    "SwitchTransformersConfig": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "TextNetConfig": {"hidden_sizes": DROP},
    "TimeSeriesTransformerConfig": {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
    },
    "VJEPA2Config": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 64,
        "patch_size": 8,
    },
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "Zamba2Config": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "n_mamba_heads": 8,
    },
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "xLSTMConfig": {
        "embedding_dim": 64,
        "num_blocks": 2,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "chunk_size": 8,
        "hidden_size": 64,
    },
}
TYPES: dict[str, dict[str, Any]] = {
    "chmv2": {
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "out_features": DROP,
        }
    },
    "conditional_detr": {
        "backbone_config": _resnet(4),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    },
    "dab-detr": {
        "backbone_config": _resnet(4),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    },
    "deformable_detr": {
        "backbone_config": _resnet(2, 3, 4),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    },
    "depth_anything": {
        "reassemble_hidden_size": 64,
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "out_features": DROP,
        },
    },
    "detr": {
        "backbone_config": _resnet(4),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_hidden_layers": 3}},
    "prompt_depth_anything": {
        "reassemble_hidden_size": 64,
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "out_features": DROP,
        },
    },
    "table-transformer": {
        "backbone_config": _resnet(4),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    },
    "tipsv2_dpt": {
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "out_features": DROP,
        }
    },
    "upernet": {"backbone_config": _resnet(1, 2, 3, 4), "use_auxiliary_head": False},
    "vitdet": {"image_size": 32},
    "vitmatte": {
        "backbone_config": {"out_features": ["stage2"]},
        "convstream_hidden_sizes": [16, 16, 16],
        "fusion_hidden_sizes": [32, 16, 16, 16],
    },
}
CLASSES: dict[str, tuple[str, str]] = {
    "bark": ("BarkModel", "base"),
    "clvp": ("ClvpModelForConditionalGeneration", "base"),
    "dpt": ("DPTModel", "base"),
    "imagegpt": ("ImageGPTModel", "base"),
    "layoutlmv3": ("LayoutLMv3ForSequenceClassification", "sequence_classification"),
    "musicgen": ("MusicgenForConditionalGeneration", "speech"),
    "musicgen_melody": ("MusicgenMelodyForConditionalGeneration", "speech"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "multimodal_lm"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "multimodal_lm"),
    "vit_mae": ("ViTMAEModel", "base"),
}


def _pair(config: Any, encoder: str, decoder: str) -> Callable[..., PreTrainedConfig]:
    """Makes a config of two others."""

    def made(tiny: Callable[[str], PreTrainedConfig]) -> PreTrainedConfig:
        both = config.from_encoder_decoder_configs(tiny(encoder), tiny(decoder))
        both.decoder_start_token_id, both.pad_token_id = 1, 0
        return both

    return made


BUILDERS: dict[str, Callable[..., PreTrainedConfig]] = {
    "encoder-decoder": _pair(EncoderDecoderConfig, "bert", "bert"),
    "speech-encoder-decoder": _pair(SpeechEncoderDecoderConfig, "wav2vec2", "bert"),
    "vision-encoder-decoder": _pair(VisionEncoderDecoderConfig, "vit", "bert"),
}
