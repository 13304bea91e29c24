"""Wrote the files of this folder with hf_gradnas 0.1: `python make.py FOLDER`.

They are read by tests/test_format_0_1.py and are never written again: a later version must read
what this one wrote. To run this file again, check out the commit that added it; the cases of
RENAMED came later, and were written with the package of that commit too.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TimesformerConfig,
    TimesformerForVideoClassification,
    XmodConfig,
    XmodForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_gradnas import GradNASPruner


class AttributeConfig(PreTrainedConfig):
    model_type = "ffn_as_attribute"


class FfnAsAttribute(PreTrainedModel):
    """One FFN in attributes without a number in their paths: `channels` in 0.1."""

    config_class = AttributeConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = torch.nn.Conv2d(3, 8, 2, stride=2)  # 0.1 looks for channels beside these only
        self.up = torch.nn.Linear(8, 24)
        self.down = torch.nn.Linear(24, 8)
        self.score = torch.nn.Linear(8, 2)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        pixels = self.stem(pixel_values).mean((2, 3))  # (batch, 8)
        hidden = pixels + self.down(torch.nn.functional.gelu(self.up(pixels)))
        logits = self.score(hidden)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def bert():
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def llama():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def t5():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def resnet():
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def attribute():
    return FfnAsAttribute(AttributeConfig(num_labels=2))


def mobilebert():
    """Its last FFN was named after its out-projection, a refused pair of its layer having none."""
    config = MobileBertConfig(
        vocab_size=32,
        hidden_size=16,
        embedding_size=16,
        intra_bottleneck_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_feedforward_networks=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return MobileBertForSequenceClassification(config)


def xmod():
    """Its adapters were named after the module around them, since a weight before fitted too."""
    config = XmodConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        languages=["en_XX"],
        default_language="en_XX",
    )
    return XmodForSequenceClassification(config)


def timesformer():
    """It has further axes now, in the layers that its FFNs were named after."""
    config = TimesformerConfig(
        image_size=8,
        patch_size=4,
        num_frames=2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return TimesformerForVideoClassification(config)


def batches(name):
    torch.manual_seed(1)
    if name == "timesformer":
        videos = [torch.randn(4, 2, 3, 8, 8) for _ in range(2)]
        return [{"pixel_values": video, "labels": torch.randint(0, 2, (4,))} for video in videos]
    if name == "resnet":
        images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
        return [{"pixel_values": image, "labels": torch.randint(0, 3, (4,))} for image in images]
    if name == "attribute":
        rows = [torch.randn(4, 3, 4, 4) for _ in range(2)]
        return [{"pixel_values": row, "labels": torch.randint(0, 2, (4,))} for row in rows]
    tokens = [torch.randint(3, 32, (4, 8)) for _ in range(2)]
    if name in ("bert", "mobilebert", "xmod"):
        return [{"input_ids": ids, "labels": torch.randint(0, 2, (4,))} for ids in tokens]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


# Name: how it is built, its layout.
CASES = {
    "bert": (bert, "per_layer"),
    "bert_stock": (bert, "stock"),
    "llama": (llama, "per_layer"),
    "t5": (t5, "per_layer"),
    "resnet": (resnet, "per_layer"),
    "attribute": (attribute, "per_layer"),
}
# Types whose axes have other names, or companions, since.
RENAMED = {
    "mobilebert": (mobilebert, "per_layer"),
    "xmod": (xmod, "per_layer"),
    "timesformer": (timesformer, "per_layer"),
}


def write(name, folder):
    build, layout = {**CASES, **RENAMED}[name]
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that what is cut shows in the outputs
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder / "model")
    data = batches(name.split("_")[0])
    pruner = GradNASPruner(model, layout=layout, score="fisher")
    pruner.score(data).save(folder / "scores.safetensors")
    plan = pruner.plan({"params": "80%"})
    plan.save(folder / "plan.json")
    pruner.apply(plan, pruner.repair(plan, data) if name == "bert" else None)
    if name in CASES and name != "attribute":
        pruner.save_pretrained(folder / "pruned", report=False)
    with torch.no_grad():
        outputs = {"logits": pruner.model(**data[0]).logits.contiguous()}
    example = {name: value.clone() for name, value in {**data[0], **outputs}.items()}
    save_file(example, folder / "example.safetensors")


if __name__ == "__main__":
    for case in {**CASES, **RENAMED}:
        write(case, Path(sys.argv[1]) / case)
