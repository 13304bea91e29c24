"""What a distillation compares: attention probabilities, paired by module."""

import copy
import re

import pytest
import torch
import transformers as tf
import zoo
from repair_cases import EXAMPLES, NO_DROPOUT, collate_unlabelled, cut, loss_of, pair
from score_examples import examples_of

from hf_gradnas.errors import StructureError
from hf_gradnas.repair import recover
from hf_gradnas.repair.objective import find_sites, pair_attentions

CLEAN = {
    "bert": NO_DROPOUT,
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0},
}
ATTENTION = {"alpha": 0.0, "attention_weight": 0.4}


def _by_hand(found, wanted, real):
    """Loops over layers, real queries and real keys."""
    layers = []
    for student, teacher in zip(found, wanted, strict=True):
        q, p = student.mean(1), teacher.mean(1)
        rows = []
        for example, length in enumerate(real):
            for query in range(length):
                kl = sum(
                    p[example, query, key]
                    * (p[example, query, key].log() - q[example, query, key].log())
                    for key in range(length)
                    if p[example, query, key] > 0
                )
                rows.append(kl)
        layers.append(torch.stack(rows).mean())
    return torch.stack(layers).mean()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_attention_is_a_mean_over_layers_and_real_queries(family, tmp_path):
    student, teacher, batch = pair(family, **CLEAN[family])
    with torch.no_grad():
        found, wanted = (m(**batch, output_attentions=True) for m in (student, teacher))
    expected = found.loss + 0.4 * _by_hand(found.attentions, wanted.attentions, zoo.LENGTHS)
    loss = loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    tolerance = 1e-10 if family == "bert" else 1e-6  # GPT-2's loss is computed in float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=tolerance, atol=0)


STREAMS = {
    "attentions": r"^(?:transformer|model)\.(?:h|layers)\.(\d+)\.(?:attn|self_attn)$",
    "encoder_attentions": r"encoder\.(?:block|layers)\.(\d+)\.",
    "decoder_attentions": r"decoder\..*?\.(\d+)\..*(?:SelfAttention|self_attn)$",
    "cross_attentions": r"decoder\..*?\.(\d+)\..*(?:EncDecAttention|encoder_attn)$",
}


def _kept_layers(pruner, stream):
    """Numbers of the layers whose attention in a stream keeps a head."""
    heads = {name: units for name, units in pruner._plan.kept.items() if name.endswith(":heads")}
    found = {re.search(STREAMS[stream], name.removesuffix(":heads")): heads[name] for name in heads}
    return sorted(int(match[1]) for match, units in found.items() if match and len(units))


def _divergence(student, teacher, weights):
    q, p = student.mean(1), teacher.mean(1)
    rows = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)
    return (rows.nan_to_num() * weights).sum() / weights.sum()


@pytest.mark.leaves_state
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_cut_model_is_compared_where_it_has_attention_left(family, tmp_path):
    pruner, teacher = cut(family, flops="30%", **CLEAN.get(family, {}))
    student, (_, batch) = pruner.model, zoo.build(family)
    with torch.no_grad():
        own, other = (m(**batch, output_attentions=True) for m in (student, teacher))
    terms, missing = [], 0
    for stream in STREAMS:
        if not other.get(stream):
            continue
        kept = _kept_layers(pruner, stream)
        missing += len(other[stream]) - len(kept)
        for tensor, layer in zip(own[stream], kept, strict=True):
            decodes = stream in ("decoder_attentions", "cross_attentions")
            weights = torch.ones(tensor.shape[0], tensor.shape[2])
            terms.append(
                _divergence(
                    tensor, other[stream][layer], weights if decodes else batch["attention_mask"]
                )
            )
    assert missing
    expected = own.loss + 0.4 * torch.stack(terms).mean()
    loss = loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_windows_share_the_weight_of_their_example(tmp_path):
    config = tf.SwinConfig(
        **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2]},
        **{"window_size": 4, "drop_path_rate": 0.0, "attn_implementation": "eager"},
    )
    student, teacher = (tf.SwinForImageClassification(config).eval() for _ in range(2))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        found, wanted = (m(**batch, output_attentions=True) for m in (student, teacher))
    assert found.attentions[0].shape[0] == 8
    terms = [
        _divergence(s, t, torch.ones(s.shape[0], s.shape[2]))
        for s, t in zip(found.attentions, wanted.attentions, strict=True)
    ]
    expected = found.loss + 0.4 * torch.stack(terms).mean()
    loss = loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_a_student_like_its_teacher_has_nothing_to_learn(tmp_path):
    for family in ("albert", "vit", "whisper"):  # a layer that runs three times, no mask, two sides
        student, batch = zoo.build(family)
        _without_dropout(student)
        teacher = copy.deepcopy(student)
        options = {"alpha": 1.0, "attention_weight": 1.0}
        assert abs(loss_of(student, teacher, [batch], tmp_path, **options)) < 1e-6
        other, _ = zoo.build(family, seed=1)
        _without_dropout(other)
        without = loss_of(other, teacher, [batch], tmp_path, alpha=1.0)
        assert loss_of(other, teacher, [batch], tmp_path, **options) > without + 1e-6


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout", "dropout", "activation_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def test_adapters_bring_attention_closer(tmp_path):
    student, teacher, batch = pair("bert", dtype=torch.float32, **NO_DROPOUT)
    del batch["labels"]

    def attention():
        with_it = loss_of(student, teacher, [batch], tmp_path, attention_weight=1.0)
        return (with_it - loss_of(student, teacher, [batch], tmp_path)).item()

    before, rows = attention(), examples_of("bert", EXAMPLES)
    options = {"epochs": 12, "batch_size": EXAMPLES, "learning_rate": 3e-2, "lora": 4}
    options |= {"attention_weight": 10.0, "data_collator": collate_unlabelled}
    recover(student, teacher, rows, **options)
    assert attention() < 0.8 * before


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_that_returns_no_attention_is_refused(tmp_path):
    student, teacher, batch = pair("bert", attn="sdpa")
    with pytest.raises(StructureError, match=r"\(the teacher\) returns no attention.*'eager'"):
        loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    teacher.set_attn_implementation("eager")
    with pytest.raises(StructureError, match=r"the student at .*self\) returns no .*'eager'"):
        loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    student.eval()


def test_dropped_attention_is_refused(tmp_path):
    student, teacher, batch = pair("bert")
    with pytest.raises(StructureError, match=r"off from a sum of 1 .* by .*dropout at 0"):
        loss_of(student, teacher, [batch], tmp_path, **ATTENTION)
    student.eval()


def test_a_model_without_any_or_of_other_positions_is_refused(tmp_path):
    student, teacher, batch = pair("bert", **NO_DROPOUT)
    sites = find_sites(teacher, batch)
    assert [site.path for site in sites] == [
        f"bert.encoder.layer.{i}.attention.self" for i in (0, 1, 2)
    ]
    whole = torch.ones(2, 4, 5, 5)
    mine, theirs = ({site: [w] for site in sites} for w in (whole, whole[..., :4]))
    with pytest.raises(StructureError, match=r"is over \[\(2, 5, 5\)\], the teacher's .*4\)\]"):
        pair_attentions(student, mine, teacher, theirs)
    with pytest.raises(StructureError, match="has none of the 3 attentions of the teacher"):
        pair_attentions(student, {}, teacher, theirs)
