"""The searcher: its settings, its score, its steps, and what it shows."""

import copy
import json

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from hf_gradnas import nas
from hf_gradnas.errors import OrderError, StructureError
from hf_gradnas.nas.hparams import needed_space
from hf_gradnas.nas.scoring import Pass, measure_scores

ONE = {"nn.Linear": {"feature_divisor": 1}}


def loss_of(output, batch):
    return (output * 1.3).sin().mean() + output.square().mean()


def settings(batches, **more):
    return {"data_loader": batches, "loss_func": loss_of, "verbose": False, **more}


def search(model, batches, mode=ONE, limit="90%", **more):
    nas.convert(model, [("gradnas", mode)])
    searcher = nas.GradientBinarySearcher()
    searcher.search(model, {"flops": limit}, batches[0], settings(batches, **more))
    return searcher


def scores_of(model):
    """Scores by hparam name, in the order of the units."""
    found = {}
    for name, hparam in nas.named_hparams(model, configurable=True):
        found[name] = torch.empty_like(hparam.score_tensor)
        found[name][list(hparam.order)] = hparam.score_tensor
    return found


def blocks(count=2):
    layers = [nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5)) for _ in range(count)]
    return nn.Sequential(*layers, nn.Linear(5, 2)).double()


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_the_score_function_reduces_the_pruned_scores(reduce):
    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    searcher = search(model, [x], limit="70%", reduce=reduce)
    total = {"max": max, "sum": sum}[reduce]
    pruned = [
        float(hparam.score_tensor[hparam.active :].sum()) for _, hparam in nas.named_hparams(model)
    ]
    score = nas.GradientBinarySearcher.gradnas_score_func
    assert searcher.best["score"] == score(model) == -total(pruned) < 0
    for _, hparam in nas.named_hparams(model):
        hparam.active = hparam.max
    assert score(model) == 0.0
    with pytest.raises(OrderError, match="not converted; call convert"):
        score(blocks())


def test_hparam_names_for_search_say_what_is_searched():
    class OnlyHeads(nas.GradientBinarySearcher):
        @property
        def hparam_names_for_search(self):
            return {"num_attention_heads"}

    class Mode(nas.GradNASModeDescriptor):
        @property
        def search_algorithm(self):
            return OnlyHeads

    model, batch = zoo.build("bert", dtype=torch.float64)
    assert nas.GradientBinarySearcher().hparam_names_for_search == {
        "out_features",
        "out_channels",
        "num_attention_heads",
        "num_key_value_heads",
    }
    dummy = {k: v for k, v in batch.items() if k != "labels"}
    config = settings([batch], loss_func=lambda output, given: output.loss)
    _, history = nas.prune(model, [(Mode(), ONE)], {"flops": "80%"}, dummy, config)
    sizes = history["best"]["config"]
    assert {v for k, v in sizes.items() if k.endswith("out_features")} == {96}
    assert {v for k, v in sizes.items() if k.endswith("heads")} != {4}
    assert all(k.endswith("heads") for k in history["sensitivity_map"])


def test_the_settings_have_the_references_defaults():
    searcher = nas.GradientBinarySearcher()
    expected = {
        "checkpoint": None,
        "verbose": True,
        "forward_loop": None,
        "data_loader": None,
        "collect_func": None,
        "max_iter_data_loader": 128,
        "score_func": None,
        "loss_func": None,
        "deployment": None,
        "num_iters": None,
        "reduce": "max",
        "average_scores": False,
        "score_convergence_tol": None,
        "score_convergence_patience": 5,
        "score_convergence_min_updates": 10,
    }
    assert searcher.default_search_config == expected
    full = searcher.sanitize_search_config({"data_loader": [], "loss_func": loss_of})
    assert full["collect_func"]((1, 2)) == 1
    assert full.keys() == expected.keys()
    assert searcher.default_search_config == expected


def test_history_tells_every_step_of_the_bisection():
    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    nas.convert(model, [("gradnas", ONE)])
    _, history = nas.search(model, {"flops": "70%"}, x, settings([x]))
    steps = history["history"]
    assert history["iter_num"] == len(steps["threshold"]) == len(steps["satisfied"]) > 1
    limit = 0.7 * history["original"]["flops"]
    for costs, satisfied in zip(steps["constraints"], steps["satisfied"], strict=True):
        assert (costs["flops"] <= limit) is satisfied
    met = [t for t, ok in zip(steps["threshold"], steps["satisfied"], strict=True) if ok]
    missed = [t for t, ok in zip(steps["threshold"], steps["satisfied"], strict=True) if not ok]
    assert max(missed, default=-1) < min(met)
    assert -history["best"]["score"] <= min(met)
    assert history["best"]["is_satisfied"]
    json.dumps(history)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_choices_do_not_depend_on_the_unit_of_the_loss(factor):
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(3)
    model = blocks()
    twin = copy.deepcopy(model)
    found = search(model, [x], limit="70%")
    scaled = search(
        twin, [x], limit="70%", loss_func=lambda output, batch: factor * loss_of(output, batch)
    )
    assert scaled.best["config"] == found.best["config"]


def test_a_search_can_be_repeated_and_forgets_the_last_one():
    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    nas.convert(model, [("gradnas", ONE)])
    searcher = nas.GradientBinarySearcher()
    searcher.search(model, {"flops": "50%"}, x, settings([x]))
    steps = len(searcher.history["threshold"])
    searcher.search(model, {"flops": "90%"}, x, settings([x]))
    assert len(searcher.history["threshold"]) <= steps + 3
    fresh = copy.deepcopy(model)
    other = search(fresh, [x], limit="90%")
    assert other.best == searcher.best


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_shows_a_table_and_progress_on_stderr(verbose, capsys):
    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    nas.convert(model, [("gradnas", ONE)])
    constraints = {"flops": "70%", "params": "90%"}
    nas.search(model, constraints, x, settings([x], verbose=verbose))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert bool(shown.err) is verbose
    words = ("0.0.out_features", "degradation", "flops:", "params:", "Estimating gradient")
    assert all((word in shown.err) is verbose for word in words)


def test_measured_scores_are_float64_in_the_order_of_the_units():
    model, x = blocks(1).float(), torch.randn(4, 5)
    search(model, [x])
    hparams = needed_space(model).hparams
    work = Pass([x, x], loss_of, lambda batch: batch)
    found = measure_scores(model, hparams, work, setups={})
    for name, expected in scores_of(model).items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], 2 * expected, rtol=1e-6)


@pytest.mark.parametrize("is_transformers", [True, False])
def test_a_model_without_values_is_refused_before_it_is_scored(is_transformers):
    model, x = zoo.build("bert") if is_transformers else (blocks(), torch.randn(4, 5))
    model.to("meta")
    names = [name for name, _ in model.named_parameters()]
    batch = ({"input_ids": x["input_ids"]},) if is_transformers else x
    with pytest.raises(StructureError, match=r"search: .* is offloaded \(on the meta device\)"):
        search(model, [batch])
    assert names == [name for name, p in model.named_parameters() if p.is_meta]
