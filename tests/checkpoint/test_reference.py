"""What a checkpoint says of itself: digests, and outputs that come again; none of the data."""

import copy
import hashlib
import json
from types import SimpleNamespace

import handmade
import pytest
import torch
import transformers as tf
import zoo

from hf_gradnas.checkpoint import replay
from hf_gradnas.checkpoint.reference import (
    HALF_STEPS,
    Reference,
    make_reference,
    output_difference,
    output_limit,
    reference_inputs,
    special_tokens,
)
from hf_gradnas.checkpoint.save import save_pruned
from hf_gradnas.errors import CheckpointError, GradNASWarning
from hf_gradnas.surgery.cut import make_per_layer
from hf_gradnas.surgery.modeling_gradnas import resize
from hf_gradnas.types import Plan

PLAN = Plan(kept={"a:heads": (0, 2)}, sizes={"a:heads": 4}, layout="stock")


def reference(**changes):
    values = {
        "model_class": "BertModel",
        "auto_class": None,
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "inputs": {},
        "output": None,
    }
    return Reference(**{**values, **changes})


# --- tensors in JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.tensor([[True, False]]),
        torch.tensor([1.5, float("nan"), -float("inf")]),
        torch.tensor(2.0, dtype=torch.float64),
        torch.zeros(0, 3),
    ],
)
def test_tensors_come_back_from_json(tensor):
    back = replay.decode(json.loads(json.dumps(replay.encode(tensor))))
    assert back.dtype == tensor.dtype
    assert torch.equal(back.nan_to_num(7), tensor.nan_to_num(7))
    assert back.shape == tensor.shape


def test_uniform_numbers_never_change():
    drawn = replay.decode(replay.encode_uniform((1, 3), 0))
    expected = torch.tensor([[0.09762701, 0.43037873, 0.20552675]])
    assert torch.allclose(drawn, expected, rtol=0, atol=1e-8)
    assert replay.decode({"value": None}) is None


# --- outputs --------------------------------------------------------------------------------------


class Fake:
    """Gives what it was told, whatever the inputs."""

    device, dtype = torch.device("cpu"), torch.bfloat16

    def __init__(self, **outputs):
        self.outputs = outputs

    def __call__(self, **inputs):
        self.inputs = inputs
        return self.outputs


def test_entries_are_spread_from_the_first_to_the_last():
    numbers = torch.arange(1000.0).reshape(10, 100)
    fake = Fake(loss=torch.ones(()), ids=torch.ones(2).long(), logits=numbers)
    found = replay.run(fake, {"x": replay.encode_uniform((2,), 0), "cache": {"value": False}})
    assert (found["name"], found["shape"], found["largest"]) == ("logits", [10, 100], 999.0)
    values = replay.decode(found["values"])
    assert len(values) == replay.COMPARED
    assert (values[0], values[-1]) == (0, 999)
    assert values.diff().min() >= 3
    assert fake.inputs["x"].dtype == torch.bfloat16
    assert fake.inputs["cache"] is False


def test_small_and_infinite_outputs():
    found = replay.run(Fake(logits=torch.tensor([1.0, -torch.inf, 2.0])), {})
    assert found["largest"] == 2.0
    assert replay.decode(found["values"]).tolist() == [1.0, -torch.inf, 2.0]
    assert output_difference(found, found) == 0.0
    assert replay.run(Fake(logits=torch.zeros(0)), {})["largest"] == 0.0
    assert replay.run(Fake(loss=torch.ones(())), {}) is None


def test_differences_of_outputs():
    def output(*values):
        return replay.run(Fake(logits=torch.tensor(values)), {})

    assert output_difference(output(1.0, 2.0), output(1.0, 2.5)) == 0.5
    nan = float("nan")
    assert output_difference(output(1.0, nan), output(1.0, nan)) == 0.0
    for other in (output(1.0, nan), output(1.0), None):
        assert str(output_difference(output(1.0, 2.0), other)) == "nan"


@pytest.mark.parametrize(
    ("dtype", "device", "limit"),
    [
        ("float64", "cpu", 1e-8),
        ("float32", "cpu", 1e-4),
        ("float32", "cuda", 1e-3),
        ("bfloat16", "cpu", HALF_STEPS * 2**-7),
        ("float16", "cuda", HALF_STEPS * 2**-10),
    ],
)
def test_limits_follow_type_device_and_size(dtype, device, limit):
    for largest, scale in ((0.1, 1), (50.0, 50)):
        made = reference(dtype=dtype, output={"largest": largest})
        assert output_limit(made, device) == pytest.approx(scale * limit)
    assert output_limit(reference(), "cpu") == 1e-4


def bert(**config):
    return tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=0, **config)
    )


# --- inputs ---------------------------------------------------------------------------------------


def test_special_tokens_are_those_of_all_sub_configs():
    config = tf.BartConfig(pad_token_id=1, eos_token_id=[2, 9], decoder_start_token_id=7)
    assert special_tokens(config) >= {1, 2, 9, 7}
    nested = SimpleNamespace(
        to_dict=lambda: {"image_token_index": 5, "id2label": {0: "a"}, "text": {"pad_token_id": 6}}
    )
    assert special_tokens(nested) == {5, 6}


def test_inputs_hold_no_data_of_the_sample():
    model = bert(pad_token_id=0, eos_token_id=30)
    ids = torch.cat([torch.full((1, 40), 7), torch.tensor([[31, 30, 0]])], dim=1)
    pixels = torch.full((1, 3, 4, 4), 0.5)
    sample = {"input_ids": ids, "attention_mask": ids != 0, "pixel_values": pixels, "flag": True}
    sample["labels"] = torch.tensor([3])
    inputs = {key: replay.decode(spec) for key, spec in reference_inputs(sample, model).items()}
    assert set(inputs) == set(sample) - {"labels"}
    drawn = inputs["input_ids"]
    assert drawn.shape == ids.shape
    assert drawn[0, -2:].tolist() == [30, 0]
    assert drawn.max() <= 31
    assert not set(drawn[0, :-2].tolist()) & {0, 30}
    assert (drawn[0, :40] == 7).sum() < 10
    assert torch.equal(inputs["attention_mask"], sample["attention_mask"])
    assert inputs["pixel_values"].shape == pixels.shape
    assert inputs["pixel_values"].unique().numel() == pixels.numel()
    assert inputs["flag"] is True
    assert len(json.dumps(reference_inputs({"x": torch.rand(1, 3, 224, 224)}, model))) < 200


def test_tokens_that_are_all_special_stay():
    ids = torch.zeros(1, 4, dtype=torch.long)
    kept = reference_inputs({"input_ids": ids}, bert(pad_token_id=0))
    assert torch.equal(replay.decode(kept["input_ids"]), ids)


def test_labels_stay_only_as_tokens_of_a_decoder():
    model = handmade.build("t5", dtype=torch.float32)[0].model
    ids = torch.full((1, 8), 7)
    labels = torch.tensor([[9, 9, 9, 9, 9, 9, -100, model.config.pad_token_id]])
    drawn = replay.decode(reference_inputs({"input_ids": ids, "labels": labels}, model)["labels"])
    assert drawn[0, -2:].tolist() == labels[0, -2:].tolist()
    assert not torch.equal(drawn, labels)
    both = {"input_ids": ids, "labels": labels, "decoder_input_ids": ids}
    assert set(reference_inputs(both, model)) == {"input_ids", "decoder_input_ids"}


# --- files and documents --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"model_class": "x"},
        {**reference().to_dict(), "new": 1},
        reference(output={}).to_dict(),
        reference(
            inputs={"x": {"dtype": "float32", "shape": [2], "data": "?"}},
            output={"values": {"value": 1}},
        ).to_dict(),
    ],
)
def test_what_is_no_reference_is_refused(data):
    with pytest.raises(CheckpointError, match=r"gradnas\.json: its reference cannot be read"):
        Reference.from_dict(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_checkpoint_gives_its_reference_outputs_again(tmp_path, dtype):
    cut, sample = handmade.build("gpt2", dtype=dtype)
    save_pruned(cut.model, tmp_path / "a", plan=PLAN, document={"note": 1}, sample=sample)
    document = json.loads((tmp_path / "a" / "gradnas.json").read_text(encoding="utf-8"))
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert document["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    kept = Reference.from_dict(document["reference"])
    assert kept.model_class == type(cut.model).__name__
    assert kept.dtype == str(dtype).removeprefix("torch.")
    assert set(kept.inputs) == set(sample) - {"labels"}
    loaded = type(cut.model).from_pretrained(
        tmp_path / "a", dtype=dtype, attn_implementation=kept.attention
    )
    assert output_difference(kept.output, replay.run(loaded, kept.inputs)) == 0.0
    with torch.no_grad():
        next(loaded.parameters()).mul_(1.5)
    again = replay.run(loaded, kept.inputs)
    assert output_difference(kept.output, again) > output_limit(kept, "cpu")


def test_a_per_layer_checkpoint_names_its_stock_class(tmp_path):
    cut, sample = handmade.build("llama", dtype=torch.float32)
    model = copy.deepcopy(cut.model)
    resize(model, cut.record, rows=cut.rows, new_tensors=cut.new_tensors)
    make_per_layer(model, cut.record)
    save_pruned(model, tmp_path / "a", plan=PLAN, document={}, sample=sample)
    document = json.loads((tmp_path / "a" / "gradnas.json").read_text(encoding="utf-8"))
    assert set(document["sha256"]) == {"model.safetensors", "modeling_gradnas.py"}
    assert document["reference"]["model_class"] == "LlamaForCausalLM"
    assert document["reference"]["auto_class"] == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({"input_ids": torch.ones(1, 4).long(), "odd": [1]}, "odd is a list"),
        ({"attention_mask": torch.ones(1, 4).long()}, "input_ids"),
    ],
)
def test_inputs_that_cannot_be_kept_or_run_are_said(sample, why):
    model = handmade.build("gpt2", dtype=torch.float32)[0].model
    with pytest.warns(GradNASWarning, match=f"no reference outputs are kept.*{why}"):
        made = make_reference(model, sample)
    assert (made.inputs, made.output) == (None, None)


def test_without_a_sample_there_are_no_outputs():
    model = handmade.build("gpt2", dtype=torch.float32)[0].model
    made = make_reference(model, None)
    assert (made.inputs, made.output) == (None, None)
    assert Reference.from_dict(made.to_dict()) == made


def test_forwards_that_draw_numbers_give_the_same_outputs_again():
    model, sample = zoo.build("bert")
    forward = model.forward

    def noisy(**batch):
        logits = forward(**batch).logits
        return {"logits": logits + torch.randn_like(logits)}

    model.forward = noisy
    inputs = reference_inputs(sample, model)
    state = torch.get_rng_state()
    first, again = replay.run(model, inputs), replay.run(model, inputs)
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
