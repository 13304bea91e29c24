"""The reference's calls on Transformers models: its choices, and none of its defects."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_gradnas import nas
from hf_gradnas.errors import BudgetError, DataError, GradNASWarning, OrderError, PlanError
from hf_gradnas.nas.hparams import choices_of

FINE = {"nn.Linear": {"*": {"feature_divisor": 8}}}


def loss_of(output, batch):
    return output.loss


def whole(batch):
    return (batch,)


def settings(batches, **more):
    return {
        "data_loader": batches,
        "loss_func": loss_of,
        "collect_func": whole,
        "verbose": False,
        **more,
    }


def build(name="bert", batches=3):
    model, batch = zoo.build(name, dtype=torch.float64)
    rows = [{k: v.roll(i, 0) for k, v in batch.items()} for i in range(batches)]
    return model, [{k: v[: 2 + i % 2] for k, v in r.items()} for i, r in enumerate(rows)]


def dummy_of(batch):
    return ({k: v[:1] for k, v in batch.items() if k != "labels"},)


def reference_scores(model, batches):
    """What the reference measures, written down anew: squared gradients of each batch's loss."""
    masks, hooks = {}, []
    for index, layer in enumerate(model.bert.encoder.layer):
        heads = torch.ones(4, dtype=torch.float64, requires_grad=True)
        width = torch.ones(96, dtype=torch.float64, requires_grad=True)
        prefix = f"bert.encoder.layer.{index}"
        masks[f"{prefix}.attention.num_attention_heads"] = heads
        masks[f"{prefix}.intermediate.dense.out_features"] = width
        hooks += [
            layer.attention.output.dense.register_forward_pre_hook(
                lambda module, args, mask=heads: (args[0] * mask.repeat_interleave(16),)
            ),
            layer.intermediate.dense.register_forward_hook(
                lambda module, args, output, mask=width: output * mask
            ),
        ]
    scores = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(masks.values()))
        for name, gradient in zip(masks, gradients, strict=True):
            scores[name] += gradient.square()
    for hook in hooks:
        hook.remove()
    return scores


def reference_choices(scores, limit, flops_of):
    """Smallest choices whose pruned sum is at most the smallest threshold that meets the limit."""
    ordered = {name: s.sort(descending=True).values for name, s in scores.items()}
    ratios = [0.05 * i for i in range(1, 21)]
    sums = {
        name: {
            c: float(s[c:].sum())
            for c in (range(1, 5) if "heads" in name else choices_of(96, ratios, 8))
        }
        for name, s in ordered.items()
    }
    for threshold in sorted({v for found in sums.values() for v in found.values()}):
        config = {
            n: min(c for c, v in found.items() if v <= threshold) for n, found in sums.items()
        }
        if flops_of(config) <= limit:
            return config
    raise AssertionError("no threshold meets the limit")


@pytest.mark.parametrize("limit", ["90%", "70%", "50%", "35%"])
def test_choices_are_those_of_the_references_algorithm(limit):
    model, batches = build()
    scores = reference_scores(copy.deepcopy(model), batches)

    def flops_of(config):
        length, total = batches[0]["input_ids"].shape[1], 0
        for name, size in config.items():
            per_unit = 4 * 64 * 16 + 2 * length * 16 if "heads" in name else 2 * 64
            total += 2 * length * size * per_unit
        return total + 2 * (64 * 64 + 64 * 3)  # pooler and classifier

    sizes = {n: 4 if "heads" in n else 96 for n in scores}
    expected = reference_choices(scores, float(limit[:-1]) / 100 * flops_of(sizes), flops_of)
    _, history = nas.prune(
        model, [("gradnas", FINE)], {"flops": limit}, dummy_of(batches[0]), settings(batches)
    )
    assert history["best"]["config"] == expected
    assert history["best"]["constraints"]["flops"] == flops_of(expected)
    assert history["best"]["score"] == -max(
        float(scores[n].sort(descending=True).values[size:].sum()) for n, size in expected.items()
    )


def test_the_pruned_model_keeps_the_best_units_and_saves_with_save_pretrained(tmp_path):
    model, batches = build()
    original = copy.deepcopy(model)
    scores = reference_scores(copy.deepcopy(model), batches)
    pruned, history = nas.prune(
        model, "gradnas", {"flops": "60%"}, dummy_of(batches[0]), settings(batches)
    )
    assert pruned is model
    for index, layer in enumerate(model.bert.encoder.layer):
        name = f"bert.encoder.layer.{index}.intermediate.dense.out_features"
        kept = (
            scores[name].argsort(descending=True)[: history["best"]["config"][name]].sort().values
        )
        before = original.bert.encoder.layer[index].intermediate.dense.weight
        assert torch.equal(layer.intermediate.dense.weight, before[kept])
    model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "pruned", dtype=torch.float64, attn_implementation="eager"
    )
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.leaves_state  # T5: layers with a position bias of their own keep a hook
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "opt"])
def test_every_family_prunes_with_the_same_call(name):
    model, batches = build(name, batches=2)
    before = sum(p.numel() for p in model.parameters())
    dummy = dummy_of(batches[0]) if name != "t5" else (batches[0],)
    model, history = nas.prune(
        model, [("gradnas", FINE)], {"params": "80%"}, dummy, settings(batches)
    )
    after = sum(p.numel() for p in model.parameters())
    assert after <= 0.8 * before
    assert history["best"]["constraints"]["params"] == after
    suffixes = {key.rpartition(".")[2] for key in history["best"]["config"]}
    assert suffixes <= nas.GradientBinarySearcher().hparam_names_for_search
    assert torch.isfinite(model(**batches[0]).loss)


def test_several_constraints_hold_at_once():
    model, batches = build()
    total = sum(p.numel() for p in model.parameters())
    model, history = nas.prune(
        model,
        [("gradnas", FINE)],
        {"flops": "75%", "params": 0.7 * total},
        dummy_of(batches[0]),
        settings(batches),
    )
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * total
    assert history["best"]["constraints"]["params"] <= 0.7 * total


def test_the_sum_of_degradations_is_never_larger_than_under_max():
    totals = {}
    for reduce in nas.arguments.REDUCTIONS:
        model, batches = build()
        nas.convert(model, [("gradnas", FINE)])
        _, history = nas.search(
            model, {"flops": "60%"}, dummy_of(batches[0]), settings(batches, reduce=reduce)
        )
        values = [h.degradation(h.active) for _, h in nas.named_hparams(model)]
        totals[reduce] = sum(values)
        expected = sum(values) if reduce == "sum" else max(values)
        assert history["best"]["score"] == -expected
    assert totals["sum"] <= totals["max"] * (1 + 1e-12)


def test_a_glob_keeps_layers_whole():
    model, batches = build()
    config = {
        "nn.Linear": {"*": {"features_ratio": [0.5], "feature_divisor": 1}, "*layer.1.*": None},
        "hf.Attention": None,
    }
    _, history = nas.prune(
        model, {"gradnas": config}, {"flops": "88%"}, dummy_of(batches[0]), settings(batches)
    )
    sizes = history["best"]["config"]
    assert sizes["bert.encoder.layer.1.intermediate.dense.out_features"] == 96
    assert {v for k, v in sizes.items() if k.endswith("heads")} == {4}
    assert set(sizes.values()) == {4, 48, 96}


def test_more_batches_than_there_can_be_are_all_that_there_are():
    model, batches = build(batches=1)
    config = settings(batches, max_iter_data_loader=10**30)
    nas.prune(model, [("gradnas", FINE)], {"flops": "90%"}, dummy_of(batches[0]), config)


@pytest.mark.parametrize(("given", "read"), [({}, 128), ({"max_iter_data_loader": 3}, 3)])
def test_max_iter_data_loader_means_what_it_says(given, read):
    model, batches = build(batches=1)
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield batches[0]

    nas.prune(
        model,
        [("gradnas", FINE)],
        {"flops": "90%"},
        dummy_of(batches[0]),
        settings(endless(), **given),
    )
    assert len(seen) == read


def test_the_callers_config_is_not_edited():
    model, batches = build()
    config, constraints = settings(batches), {"flops": "80%"}
    mode = [("gradnas", copy.deepcopy(FINE))]
    before = dict(config)
    nas.prune(model, mode, constraints, dummy_of(batches[0]), config)
    assert config == before
    assert constraints == {"flops": "80%"}
    assert mode == [("gradnas", FINE)]


def test_an_exception_leaves_the_model_as_it_was():
    model, batches = build()
    model.train()
    model.bert.pooler.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def broken(output, batch):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        nas.prune(
            model,
            "gradnas",
            {"flops": "80%"},
            dummy_of(batches[0]),
            settings(batches, loss_func=broken),
        )
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model.bert.pooler.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()


def test_raw_batches_reach_the_loss_function_and_collect_func_the_model():
    model, batches = build()
    raw = [(b["input_ids"], b["attention_mask"], b["labels"]) for b in batches]
    seen = []

    def loss(output, batch):
        seen.append(batch)
        return F.cross_entropy(output.logits, batch[2])

    config = {
        "data_loader": raw,
        "loss_func": loss,
        "collect_func": lambda batch: (batch[0], {"attention_mask": batch[1]}),
        "verbose": False,
    }
    first = nas.prune(model, "gradnas", {"flops": "70%"}, dummy_of(batches[0]), config)[1]
    assert all(a is b for a, b in zip(seen, raw, strict=True))
    again, _ = build()
    second = nas.prune(again, "gradnas", {"flops": "70%"}, dummy_of(batches[0]), settings(batches))[
        1
    ]
    assert first["best"]["config"] == second["best"]["config"]


def test_a_checkpoint_resumes_the_sensitivity_map(tmp_path):
    file = tmp_path / "search.safetensors"
    model, batches = build()
    twin = copy.deepcopy(model)
    first = nas.prune(
        model,
        "gradnas",
        {"flops": "70%"},
        dummy_of(batches[0]),
        settings(batches, checkpoint=str(file)),
    )[1]

    def unread():
        raise AssertionError("scores were to be resumed")
        yield

    second = nas.prune(
        twin,
        "gradnas",
        {"flops": "70%"},
        dummy_of(batches[0]),
        settings(unread(), checkpoint=str(file)),
    )[1]
    assert second["sensitivity_map"] == first["sensitivity_map"]
    assert second["best"] == first["best"]
    found = nas.scoring.Scores.load(file).metadata
    assert json.loads(found["sensitivity_map"]) == json.loads(json.dumps(first["sensitivity_map"]))
    assert found["mask_place"] == "producer_output,attention_probabilities"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    file = tmp_path / "search.safetensors"
    for seed in range(2):
        model, batches = build()
        config = settings(batches, checkpoint=str(file))
        if not seed:
            nas.prune(model, "gradnas", {"flops": "90%"}, dummy_of(batches[0]), config)
            continue
        with torch.no_grad():
            model.classifier.weight += 1
        with pytest.raises(ValueError, match="written for another model"):
            nas.prune(model, "gradnas", {"flops": "90%"}, dummy_of(batches[0]), config)


def test_scores_can_be_averaged_and_stop_once_they_settle():
    found = {}
    for average in (True, False):
        model, batches = build(batches=1)
        nas.convert(model, [("gradnas", FINE)])
        config = settings(
            batches * 20,
            average_scores=average,
            score_convergence_tol=1e-6,
            score_convergence_patience=2,
            score_convergence_min_updates=3,
        )
        nas.search(model, {"flops": "80%"}, dummy_of(batches[0]), config)
        found[average] = np.concatenate([h.score_tensor for _, h in nas.named_hparams(model)])
    # Equal batches settle at once: after max(min_updates, 2) + patience - 1 = 4 of them.
    np.testing.assert_allclose(found[False], 4 * found[True], rtol=1e-12)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"flops": "1%"}, r"constraint flops: 1% .* cannot be met; the smallest choices"),
        ({"latency": 3.0}, "unknown cost 'latency'"),
        ({"flops": 0.6}, "a bare number is an absolute limit"),
    ],
)
def test_constraints_are_checked_before_scoring(constraints, message):
    model, batches = build()

    def unread():
        raise AssertionError("scored before the constraints were checked")
        yield

    with pytest.raises(BudgetError, match=message):
        nas.prune(model, "gradnas", constraints, dummy_of(batches[0]), settings(unread()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data_loader": None}, DataError, "data_loader is missing, needed for gradnas"),
        ({"loss_func": None}, DataError, "loss_func is missing, needed for gradnas"),
        ({"forward_loop": print}, DataError, "forward_loop cannot be used by gradnas"),
        ({"reduce": "mean"}, PlanError, "reduce='mean'; choose one of"),
        ({"max_iter_data_loader": 0}, PlanError, "max_iter_data_loader=0; give a number"),
        ({"batch_size": 3}, PlanError, "batch_size is no setting of the search"),
        ({"score": "balanced"}, PlanError, "score is no setting of the search, whose score is gra"),
        ({"data_loader": []}, DataError, "yields no batch"),
        ({"loss_func": lambda o, b: o.logits}, DataError, "Batch 0: loss_func returned shape"),
        ({"loss_func": lambda o, b: o.loss.detach()}, DataError, "scalar tensor that depends on"),
        ({"loss_func": lambda o, b: o.loss * float("nan")}, DataError, "the loss is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, error, message):
    model, batches = build()
    with pytest.raises(error, match=message):
        nas.prune(
            model, "gradnas", {"flops": "80%"}, dummy_of(batches[0]), settings(batches, **change)
        )


def test_a_given_score_func_is_warned_about():
    config = settings([], score_func=len)
    with pytest.warns(GradNASWarning, match="score_func is not used by gradnas"):
        full = nas.GradientBinarySearcher().sanitize_search_config(config)
    assert full["score_func"] is nas.GradientBinarySearcher.gradnas_score_func
    assert config["score_func"] is len


def test_scores_that_are_all_zero_are_warned_about():
    model, batches = build()
    config = settings(batches, loss_func=lambda output, batch: output.loss * 0)
    with pytest.warns(GradNASWarning, match="All scores are zero after 3 batches"):
        nas.prune(model, "gradnas", {"flops": "80%"}, dummy_of(batches[0]), config)


def test_order_of_calls():
    model, batches = build()
    with pytest.raises(OrderError, match="not converted; call convert"):
        nas.search(model, {"flops": "80%"}, dummy_of(batches[0]), settings(batches))
    with pytest.raises(OrderError, match="not converted"):
        nas.GradientBinarySearcher.gradnas_score_func(model)
    nas.convert(model, "gradnas")
    assert nas.GradientBinarySearcher.gradnas_score_func(model) == 0.0
    with pytest.raises(DataError, match="dummy_input: found none"):
        nas.search(model, {"flops": "80%"}, None, settings(batches))
    nas.search(model, {"flops": "80%"}, dummy_of(batches[0]), settings(batches))
    with pytest.raises(OrderError, match="was searched and cut already; convert it again"):
        nas.search(model, {"flops": "80%"}, dummy_of(batches[0]), settings(batches))
    before = sum(p.numel() for p in model.parameters())
    nas.prune(model, "gradnas", {"flops": "80%"}, dummy_of(batches[0]), settings(batches))
    assert sum(p.numel() for p in model.parameters()) < before


@pytest.mark.parametrize(
    "mode",
    [
        "gradnas",
        ["gradnas"],
        [("gradnas", None)],
        ("gradnas", {}),
        {"gradnas": {}},
        nas.GradNASModeDescriptor(),
        nas.GradNASModeDescriptor,
        [(nas.GradNASModeDescriptor(), nas.GradNASConfig())],
    ],
)
def test_a_mode_can_be_given_in_every_form_of_the_reference(mode):
    model = nn.Linear(2, 2)
    assert nas.convert(model, mode) is model
    assert nas.hparams.needed_space(model).config == nas.GradNASConfig()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fastnas", "mode 'fastnas': not known"),
        (["gradnas", "quantize"], "found 2 modes, needed one"),
        ([], "found 0 modes"),
    ],
)
def test_an_unknown_mode_is_refused(mode, message):
    with pytest.raises(PlanError, match=message):
        nas.convert(nn.Linear(2, 2), mode)


def test_the_mode_describes_itself():
    mode = nas.GradNASModeDescriptor()
    assert mode.name == "gradnas"
    assert mode.config_class is nas.GradNASConfig
    assert mode.search_algorithm is nas.GradientBinarySearcher
    assert mode.next_modes == {"export"}
    assert mode.export_mode == "export"
    model = nn.Linear(2, 2)
    same, metadata = mode.convert(model, nas.GradNASConfig())
    assert same is model
    mode.update_for_save(model, nas.GradNASConfig(), metadata)
    assert metadata == {"architecture": "Linear", "record": None}
    fresh = nn.Linear(2, 2)
    assert mode.restore(fresh, nas.GradNASConfig(), metadata) is fresh
    with pytest.raises(ValueError, match="has no parameters"):
        mode.convert(nn.ReLU(), nas.GradNASConfig())
