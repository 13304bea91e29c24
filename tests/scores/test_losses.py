"""Losses that a model computes without labels, or that are none of single examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from callback_runs import train_arguments
from score_examples import build, examples_of, in_batches
from torch import Tensor
from transformers import Trainer

from hf_gradnas import GradNASCallback, GradNASPruner, Scores
from hf_gradnas.batches.batch import Batch, to_device
from hf_gradnas.errors import DataError, GradNASWarning
from hf_gradnas.scores import collect_scores
from hf_gradnas.scores.normaliser import _found_on, find_normaliser

EXAMPLES = 4
BODY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
IMAGE = {**BODY, "image_size": 16, "patch_size": 4}


def pixels() -> Tensor:
    return torch.randn(EXAMPLES, 3, 16, 16)


def masked_images(uneven: bool = False) -> tuple[Any, dict[str, Any]]:
    model = tf.ViTForMaskedImageModeling(tf.ViTConfig(**IMAGE, encoder_stride=4))
    hidden = torch.zeros(EXAMPLES, 16).bool()
    hidden[:, ::2] = True
    if uneven:
        hidden[0] = True
    return model, {"pixel_values": pixels(), "bool_masked_pos": hidden}


def contrastive() -> tuple[Any, dict[str, Any]]:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**BODY, **tokens, "vocab_size": 50, "max_position_embeddings": 16}
    config = tf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=8)
    ids = torch.randint(3, 50, (EXAMPLES, 6))
    ids[:, -1] = 2
    return tf.CLIPModel(config), {"input_ids": ids, "pixel_values": pixels(), "return_loss": True}


def time_series() -> tuple[Any, dict[str, Any]]:
    sides = ("encoder", "decoder")
    config = tf.TimeSeriesTransformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1,
        d_model=16, **{f"{side}_layers": 1 for side in sides},
        **{f"{side}_attention_heads": 2 for side in sides},
        **{f"{side}_ffn_dim": 32 for side in sides},
    )  # fmt: skip
    batch = {
        "past_values": torch.randn(EXAMPLES, 10),
        "past_time_features": torch.randn(EXAMPLES, 10, 1),
        "past_observed_mask": torch.ones(EXAMPLES, 10),
        "future_values": torch.randn(EXAMPLES, 4),
        "future_time_features": torch.randn(EXAMPLES, 4, 1),
    }
    return tf.TimeSeriesTransformerForPrediction(config), batch


def detection() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("scipy")  # the model matches boxes with it
    sizes = {"image_size": [16, 16], "num_detection_tokens": 3, "num_labels": 3}
    model = tf.YolosForObjectDetection(tf.YolosConfig(**{**IMAGE, **sizes}))
    labels = [
        {"class_labels": torch.randint(3, (count,)), "boxes": torch.rand(count, 4) * 0.4 + 0.2}
        for count in (1, 2, 1, 2)
    ]
    return model, {"pixel_values": pixels(), "labels": labels}


def patches(noise: bool) -> tuple[Any, dict[str, Any]]:
    decoder = {f"decoder_{key}": value for key, value in BODY.items()}
    model = tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**IMAGE, **decoder))
    batch = {"pixel_values": pixels()}
    return model, {**batch, "noise": torch.rand(EXAMPLES, 16)} if noise else batch


def score(made: tuple[Any, dict[str, Any]], *, method: str = "fisher", **options: Any) -> Scores:
    model, batch = made
    return GradNASPruner(model.eval(), score=method).score([batch], **options)


@pytest.mark.parametrize(
    "make", [masked_images, time_series, lambda: patches(noise=True)], ids=["mim", "time", "mae"]
)
def test_a_loss_without_labels_is_used(make: Any) -> None:
    model, batch = make()
    pruner = GradNASPruner(model.eval())
    together = pruner.score([batch])
    assert together.metadata["normaliser"] == "examples"
    assert any(values.any() for values in together.values.values())
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(EXAMPLES)]
    alone = pruner.score(rows)
    for name, values in together.values.items():
        np.testing.assert_allclose(alone.values[name], values, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("make", [masked_images, contrastive, time_series, detection])
def test_labels_of_the_model_work_for_all_of_them(make: Any) -> None:
    assert score(make(), labels="model").metadata["normaliser"] == "sampled_labels"


def test_without_what_the_loss_needs_it_is_named_and_nothing_changes() -> None:
    for make, name in ((masked_images, "bool_masked_pos"), (contrastive, "return_loss")):
        model, batch = make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        del batch[name]
        with pytest.raises(DataError, match=rf"computes no loss without; give what it .*{name}"):
            score((model, batch))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    base = tf.BertModel(tf.BertConfig(vocab_size=50, **BODY))
    with pytest.raises(DataError, match='give a model with a head, or score with labels="model"'):
        score((base, {"input_ids": torch.randint(50, (2, 6))}))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (contrastive, "is none of an example alone, as it compares those of a batch"),
        (lambda: masked_images(uneven=True), "is no mean and no sum over labels or examples"),
        (detection, "is no mean and no sum over labels or examples"),
    ],
    ids=["contrastive", "mim", "detection"],
)
def test_a_loss_of_batches_is_warned_of_and_gradnas_takes_it(make: Any, what: str) -> None:
    with pytest.warns(GradNASWarning, match=rf"{what}.*take score='gradnas'.*labels='model'"):
        assert score(make()).metadata["normaliser"] == "examples"
    assert score(make(), method="gradnas").metadata["normaliser"] == "examples"


def test_whole_batches_of_a_contrastive_loss_are_its_terms() -> None:
    model, batch = contrastive()
    pruner = GradNASPruner(model.eval(), score="gradnas")
    scores = pruner.score([batch])
    axis = next(
        a for a in pruner.structure.axes if a.name.startswith("text_model.encoder.layers.0")
    )
    kept = np.array([0.0, 0.0])
    for unit in range(2):  # by finite differences of the batch's own loss
        losses = []
        for factor in (1.001, 0.999):
            weights = model.get_submodule(axis.taps[0].module).weight
            rows = slice(unit * axis.width, (unit + 1) * axis.width)
            with torch.no_grad():
                weights[:, rows] *= factor
                losses.append(float(model.double()(**_double(batch)).loss))
                weights[:, rows] /= factor
        kept[unit] = ((losses[0] - losses[1]) / 0.002) ** 2
    np.testing.assert_allclose(scores.values[axis.name][:2], kept, rtol=2e-2)


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def test_what_cannot_be_run_on_single_examples_is_warned_of() -> None:
    model, columns = contrastive()
    forward = model.forward

    def together(**given: Any) -> Any:
        if len(given["input_ids"]) != EXAMPLES:
            raise IndexError("negatives of other examples")
        return forward(**given)

    model.forward = together
    batch = Batch(0, columns, EXAMPLES, ())
    with pytest.warns(GradNASWarning, match="cannot be had of single examples .negatives of other"):
        assert find_normaliser(model.eval(), batch) == "examples"


def test_a_loss_that_draws_is_named() -> None:
    with pytest.warns(GradNASWarning, match=r"draws random numbers in evaluation.*noise"):
        score(patches(noise=False))


@pytest.mark.parametrize("source", ["private", "training"])
def test_a_callback_scores_a_loss_without_labels(source: str, tmp_path: Path) -> None:
    model, batch = masked_images()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(EXAMPLES)]
    callback = GradNASCallback({"params": "80%"}, scores_from=source)
    arguments = train_arguments(tmp_path, max_steps=2, remove_unused_columns=False)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert int(callback.scores.metadata["examples"]) >= EXAMPLES
    assert (tmp_path / "pruned" / "gradnas.json").is_file()


def test_labels_in_dicts_move_with_the_batch() -> None:
    model, batch = detection()
    moved = to_device(batch, model.to(torch.bfloat16))
    assert moved["pixel_values"].dtype is torch.bfloat16
    assert moved["labels"][0]["boxes"].dtype is torch.float32
    meta = to_device(batch, model.to("meta"))
    assert meta["labels"][1]["boxes"].is_meta


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_examples_tell_the_normaliser_too(family: str, dtype: torch.dtype) -> None:
    model, _, _ = build(family, dtype=dtype)
    for columns in in_batches(examples_of(family, 24, longest=40), 8):
        batch = Batch(0, columns, 8, ("labels",))
        assert find_normaliser(model, batch) == _found_on(model, batch)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("bert", torch.float32),
        ("bert", torch.bfloat16),
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("t5", torch.float32),
    ],
    ids=str,
)
def test_the_start_takes_less_than_a_third_of_a_batch(family: str, dtype: torch.dtype) -> None:
    model, axes, _ = build(family, dtype=dtype)
    batches = in_batches(examples_of(family, 16, longest=40), 16)
    work = 0

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        nonlocal work
        work += 0 if torch.is_grad_enabled() else kwargs["input_ids"].numel()

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = collect_scores(model, axes, batches)
    handle.remove()
    counts = {"bert": "examples", "llama": "labels_after_shift", "t5": "labels"}
    assert found.metadata["normaliser"] == counts[family]
    assert 0 < work <= 0.3 * batches[0]["input_ids"].numel()
