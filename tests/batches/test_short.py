"""Small inputs follow the tokens and leave the rest alone."""

from __future__ import annotations

import torch

from hf_gradnas.batches.longest import flops_inputs, probe_inputs


def batch_of(length: int) -> dict:
    return {
        "input_ids": torch.arange(5 * length).reshape(5, length),
        "attention_mask": torch.tensor([[1] * (length - 2) + [0, 0]] * 5),
        "pixel_values": torch.zeros(5, 3, length, length),
        "labels": torch.zeros(5, 30, dtype=torch.long) - 100,
        "return_dict": True,
    }


def test_the_probe_takes_the_first_tokens_and_the_last() -> None:
    small = probe_inputs(batch_of(40))
    assert small["input_ids"].tolist() == [[*range(15), 37], [*range(40, 55), 77]]
    assert small["attention_mask"].tolist() == [[1] * 16] * 2
    assert small["pixel_values"].shape == (2, 3, 40, 40)
    assert small["return_dict"] is True
    assert "labels" not in small
    assert all(v.is_contiguous() for v in small.values() if isinstance(v, torch.Tensor))


def test_a_decoder_gets_its_labels_as_tokens() -> None:
    small = probe_inputs(batch_of(40), decoder=True)
    assert small["decoder_input_ids"].tolist() == [[0] * 16] * 2
    short = {"labels": torch.tensor([[5], [6], [7]])}
    varied = probe_inputs(short, decoder=True)["decoder_input_ids"]
    assert varied.tolist() == [[5, 6, 7, 0], [6, 7, 0, 1]]
    classes = {"input_ids": torch.ones(2, 6), "labels": torch.tensor([0, 1])}
    assert set(probe_inputs(classes, decoder=True)) == {"input_ids"}


def test_flops_are_counted_for_one_full_sequence() -> None:
    one = flops_inputs(batch_of(4), 7, decoder=True)
    assert one["input_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert one["attention_mask"].tolist() == [[1] * 7]
    assert one["decoder_input_ids"].shape == (1, 7)
    assert one["pixel_values"].shape == (1, 3, 4, 4)
    assert flops_inputs(batch_of(4), None)["input_ids"].shape == (1, 4)


def test_examples_of_several_rows_stay_together() -> None:
    packed = {"pixels": torch.arange(24).view(24, 1), "grid": torch.tensor([[1, 4, 3]] * 2)}
    assert flops_inputs(packed, None)["pixels"].flatten().tolist() == list(range(12))
    assert probe_inputs(packed)["pixels"].shape == (24, 1)
    one_image = {"pixels": torch.arange(16).view(16, 1), "grid": torch.tensor([[1, 4, 4]])}
    assert flops_inputs(one_image, None)["pixels"].shape == (16, 1)
    odd = {**packed, "pixels": torch.zeros(25, 1)}
    assert flops_inputs(odd, None)["pixels"].shape == (25, 1)
    codebooks = {"input_ids": torch.ones(2, 6), "decoder_input_ids": torch.ones(8, 6)}
    assert flops_inputs(codebooks, None, decoder=True)["decoder_input_ids"].shape == (4, 6)


def test_only_attention_masks_are_filled_with_ones() -> None:
    places = torch.tensor([[0, 1, 1, 0]] * 5)
    one = flops_inputs({**batch_of(4), "image_position_mask": places}, None)
    assert one["image_position_mask"].tolist() == [[0, 1, 1, 1]]
    assert one["attention_mask"].tolist() == [[1] * 4]
