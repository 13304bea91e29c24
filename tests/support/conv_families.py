"""Tiny models of the convolutional families of Transformers, with their channels axes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

LABELS = {"num_labels": 3}
STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2], **LABELS}
WAVES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 12, 8),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
}
CONVS = "feature_extractor.conv_layers"
# Config, model, arguments of the config, and the units of every channels axis by the path of its
# first producer (without the name of the base model), in running order.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "resnet basic": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "layer_type": "basic", **STAGES},
        {
            # The first stage keeps width and resolution, so its stream is the stem's.
            "embedder.embedder.convolution": 8,
            "encoder.stages.0.layers.0.layer.0.convolution": 8,
            "encoder.stages.0.layers.1.layer.0.convolution": 8,
            "encoder.stages.1.layers.0.layer.0.convolution": 16,
            "encoder.stages.1.layers.0.layer.1.convolution": 16,
            "encoder.stages.1.layers.1.layer.0.convolution": 16,
        },
    ),
    "resnet bottleneck": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], **LABELS},
        {
            "embedder.embedder.convolution": 8,
            "encoder.stages.0.layers.0.layer.0.convolution": 4,
            "encoder.stages.0.layers.0.layer.1.convolution": 4,
            "encoder.stages.0.layers.0.layer.2.convolution": 16,
        },
    ),
    "regnet x": (
        "RegNetConfig",
        "RegNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [16],
            "depths": [1],
            "groups_width": 4,
            "layer_type": "x",
            **LABELS,
        },
        {
            "embedder.embedder.convolution": 8,
            "encoder.stages.0.layers.0.layer.0.convolution": 4,
            "encoder.stages.0.layers.0.layer.1.convolution": 4,
            "encoder.stages.0.layers.0.layer.2.convolution": 16,
        },
    ),
    "regnet y": (
        "RegNetConfig",
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "groups_width": 8, **LABELS},
        {
            "embedder.embedder.convolution": 8,
            "encoder.stages.0.layers.0.layer.0.convolution": 8,
            "encoder.stages.0.layers.0.layer.1.convolution": 8,
            "encoder.stages.0.layers.0.layer.2.attention.0": 2,
            "encoder.stages.0.layers.0.layer.3.convolution": 16,
        },
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], **LABELS},
        {
            "embeddings.patch_embeddings": 8,
            "encoder.stages.0.layers.0.pwconv1": 32,
            "encoder.stages.1.downsampling_layer.1": 16,
            "encoder.stages.1.layers.0.pwconv1": 64,
        },
    ),
    "convnextv2": (
        "ConvNextV2Config",
        "ConvNextV2ForImageClassification",
        {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], **LABELS},
        {
            "embeddings.patch_embeddings": 8,
            "encoder.stages.0.layers.0.pwconv1": 32,
            "encoder.stages.1.downsampling_layer.1": 16,
            "encoder.stages.1.layers.0.pwconv1": 64,
        },
    ),
    "mobilenet v1": (
        "MobileNetV1Config",
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25, **LABELS},
        {
            "conv_stem.convolution": 8,
            "layer.1.convolution": 16,
            **{f"layer.{i}.convolution": 32 for i in (3, 5)},
            **{f"layer.{i}.convolution": 64 for i in (7, 9)},
            **{f"layer.{i}.convolution": 128 for i in range(11, 23, 2)},
            **{f"layer.{i}.convolution": 256 for i in (23, 25)},
        },
    ),
    "mobilenet v2": (
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "finegrained_output": False, **LABELS},
        {
            "conv_stem.first_conv.convolution": 8,
            "conv_stem.reduce_1x1.convolution": 8,
            "layer.0.expand_1x1.convolution": 48,
            "layer.0.reduce_1x1.convolution": 8,
            "layer.1.expand_1x1.convolution": 48,
            "layer.2.expand_1x1.convolution": 48,
            "layer.2.reduce_1x1.convolution": 8,
            **{f"layer.{i}.expand_1x1.convolution": 48 for i in (3, 4, 5)},
            "layer.5.reduce_1x1.convolution": 16,
            **{f"layer.{i}.expand_1x1.convolution": 96 for i in (6, 7, 8, 9)},
            "layer.9.reduce_1x1.convolution": 24,
            **{f"layer.{i}.expand_1x1.convolution": 144 for i in (10, 11, 12)},
            "layer.12.reduce_1x1.convolution": 40,
            **{f"layer.{i}.expand_1x1.convolution": 240 for i in (13, 14, 15)},
            "layer.15.reduce_1x1.convolution": 80,
            "conv_1x1.convolution": 320,
        },
    ),
    "efficientnet": (
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "kernel_sizes": [3, 5],
            "strides": [1, 2],
            "expand_ratios": [1, 6],
            "num_block_repeats": [1, 2],
            "depthwise_padding": [],
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "hidden_dim": 320,
            **LABELS,
        },
        {
            "embeddings.convolution": 8,
            "encoder.blocks.0.squeeze_excite.reduce": 2,
            "encoder.blocks.0.projection.project_conv": 8,
            "encoder.blocks.1.expansion.expand_conv": 48,
            "encoder.blocks.1.squeeze_excite.reduce": 2,
            "encoder.blocks.1.projection.project_conv": 8,
            "encoder.blocks.2.expansion.expand_conv": 48,
            "encoder.blocks.2.squeeze_excite.reduce": 2,
            "encoder.top_conv": 320,
        },
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 24,
            **LABELS,
        },
        {
            "decode_head.linear_projections.0.proj": 24,
            "decode_head.linear_projections.1.proj": 24,
            "decode_head.linear_fuse": 24,
            "stages.0.blocks.0.mlp.fc1": 32,
            "stages.1.blocks.0.mlp.fc1": 64,
        },
    ),
    "wav2vec2 group": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {"feat_extract_norm": "group", **WAVES},
        {f"{CONVS}.{i}.conv": size for i, size in enumerate((16, 12, 8))},
    ),
    "wav2vec2 layer": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {"feat_extract_norm": "layer", "conv_bias": True, **WAVES},
        {f"{CONVS}.{i}.conv": size for i, size in enumerate((16, 12, 8))},
    ),
    "hubert group": (
        "HubertConfig",
        "HubertForCTC",
        {"feat_extract_norm": "group", **WAVES},
        {f"{CONVS}.{i}.conv": size for i, size in enumerate((16, 12, 8))},
    ),
}
ATTENTIVE = tuple(name for name in FAMILIES if name.startswith(("segformer", "wav2vec2", "hubert")))


def build(
    name: str,
) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor], dict[str, int]]:
    """Make a family's model in float64 and eval mode, its inputs, and its axes.

    Weights keep the size of the activations, and norms are random: no ReLU is dead.
    """
    config, model_class, kwargs, axes = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**kwargs))
    model = model.double().eval()
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim > 2:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(-0.1, 0.1).add_(0.2 if path.endswith("var") else 0.1)
    x = torch.randn(2, 800) if "conv_dim" in kwargs else torch.randn(2, 3, 32, 32)
    key = "input_values" if "conv_dim" in kwargs else "pixel_values"
    return (
        model,
        {key: x.double()},
        {
            p if p.startswith("decode_head") else f"{model.base_model_prefix}.{p}": units
            for p, units in axes.items()
        },
    )
