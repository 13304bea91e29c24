"""Transformers' convolutional families: what is found, that cut is masked, and exact costs."""

import copy

import pytest
import torch
import zoo
from torch.utils.flop_counter import FlopCounterMode

from hf_gradnas import GradNASPruner, nas
from hf_gradnas.masks import masked
from hf_gradnas.surgery.cut import cut
from hf_gradnas.surgery.modeling_gradnas import resize
from hf_gradnas.verification import find_structure

# Axes per kind: a silent loss shows.
AXES = {
    "resnet": {"channels": 8},
    "resnet_bottleneck": {"channels": 14},
    "regnet": {"channels": 16},
    "convnext": {"neurons": 4, "channels": 3},
    "convnextv2": {"channels": 7},
    "mobilenet_v1": {"channels": 14},
    "mobilenet_v2": {"channels": 25},
    "efficientnet": {"channels": 12},
    "segformer": {"heads": 3, "channels": 6},
    "wav2vec2": {"heads": 2, "neurons": 2, "channels": 4},
    "wav2vec2_layer": {"heads": 2, "neurons": 2, "channels": 3},
    "hubert": {"heads": 2, "neurons": 2, "channels": 4},
}
STREAM = "they are the residual stream of attention layers"
INSIDE = "they are inside an attention, whose heads are pruned instead"
# All that is refused: module, and the start of the reason.
REFUSED = {
    "segformer": [
        ("segformer.stages.0.patch_embeddings.proj", STREAM),
        ("segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction", INSIDE),
        ("segformer.stages.1.patch_embeddings.proj", STREAM),
    ],
}


def irregular(axes):
    """About half of the units of every axis."""
    kept = {}
    for index, axis in enumerate(axes):
        generator = torch.Generator().manual_seed(index)
        order = torch.randperm(axis.size, generator=generator)[: max(axis.size // 2, 1)]
        kept[axis.name] = tuple(sorted(order.tolist()))
    return kept


def outputs(model, inputs):
    with torch.no_grad():
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits


@pytest.mark.parametrize("family", zoo.CONV_FAMILIES)
def test_cut_is_masked_for_all_axes_at_once_and_one_at_a_time(family):
    with zoo.float64_throughout():
        model, inputs = zoo.build(family)
        structure = find_structure(model, inputs)
        kinds = [str(axis.kind) for axis in structure.axes]
        assert {kind: kinds.count(kind) for kind in kinds} == AXES[family]
        refused = [(r.module, r.reason.partition(" (")[0]) for r in structure.refusals]
        assert refused == REFUSED.get(family, [])
        assert len({axis.name for axis in structure.axes}) == len(structure.axes)
        whole, kept = outputs(model, inputs), irregular(structure.axes)
        trials = [kept, *({name: units} for name, units in kept.items())]
        for trial in trials:
            twin = copy.deepcopy(model)
            with masked(twin, structure.axes, trial):
                expected = outputs(twin, inputs)
            record = cut(twin, structure.axes, trial)
            found = outputs(twin, inputs)
            scale = whole.abs().max()
            assert (found - expected).abs().max() <= 1e-10 * scale, trial.keys()
            assert (expected - whole).abs().max() > 1e-8 * scale, trial.keys()
        fresh = copy.deepcopy(model)
        resize(fresh, record)
        shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
        assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("family", "search"),
    [("resnet", "lagrangian"), ("resnet", "binary"), ("convnextv2", "lagrangian")],
)
def test_claimed_costs_are_real_and_the_result_trains(family, search):
    model, inputs = zoo.build(family, dtype=torch.float32)
    pruner = GradNASPruner(model, search=search)
    pruner.discover(inputs)
    pruner.score([inputs])
    plan = pruner.plan({"flops": "60%"})
    pruner.apply(plan)
    assert plan.costs["flops"] <= 0.6 * pruner.totals["flops"]
    assert plan.costs["params"] == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    sample = {k: v[:1] for k, v in inputs.items() if k != "labels"}
    with torch.no_grad(), counter:
        model(**sample)
    assert plan.costs["flops"] == counter.get_total_flops()
    model.train()
    model(**inputs).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    ("family", "layout", "keys"),
    [
        ("resnet", "stock", {"embedding_size", "hidden_sizes.1", "hidden_sizes.2"}),
        ("resnet_bottleneck", "per_layer", {"embedding_size"}),
        ("segformer", "per_layer", {"decoder_hidden_size"}),
        ("wav2vec2_layer", "per_layer", {"conv_dim.0", "conv_dim.1", "conv_dim.2"}),
        ("mobilenet_v2", "per_layer", set()),
    ],
)
def test_the_layout_is_stock_where_the_config_can_say_the_widths(family, layout, keys):
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    assert pruner.layout == layout
    found = {group.keys.get("channels") for group in pruner.prunable.space.groups} - {None}
    assert found - {"classifier_proj_size"} == keys


def test_a_stock_resnet_has_its_widths_in_the_config():
    model, inputs = zoo.build("resnet")
    before = list(model.config.hidden_sizes)
    config = model.config
    stages = config.hidden_sizes
    pruner = GradNASPruner(model)
    plan = pruner.prune([inputs], {"flops": "60%"})
    assert plan.layout == "stock"
    assert stages == before, "the list that others may hold is not changed"
    assert config.hidden_sizes != before
    assert config.embedding_size == config.hidden_sizes[0]
    fresh = type(model)(type(config).from_dict(config.to_dict()))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes


@pytest.mark.parametrize("family", ["resnet", "convnextv2", "mobilenet_v2", "wav2vec2"])
def test_the_references_calls_prune_and_save_them(family, tmp_path):
    model, inputs = zoo.build(family, dtype=torch.float32)
    key = next(name for name in inputs if name != "labels")
    fine = {"channels_ratio": [0.25, 0.5, 0.75], "channel_divisor": 1}
    rule = {"features_ratio": [0.25, 0.5, 0.75], "feature_divisor": 1}
    config = {"nn.Conv1d": fine, "nn.Conv2d": fine, "nn.BatchNorm2d": rule, "nn.LayerNorm": rule}
    _, history = nas.prune(
        model,
        [("gradnas", config | {"nn.Linear": rule, "nn.GroupNorm": {}})],
        {"flops": "70%"},
        ({key: inputs[key][:1]},),
        {
            "data_loader": [inputs],
            "collect_func": lambda batch: (batch,),
            "loss_func": lambda output, batch: output.loss,
            "verbose": False,
        },
    )
    assert history["best"]["constraints"]["flops"] <= 0.7 * history["original"]["flops"]
    suffixes = {name.rpartition(".")[2] for name in history["best"]["config"]}
    assert "out_channels" in suffixes
    model.save_pretrained(tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs), rtol=0, atol=1e-5)
