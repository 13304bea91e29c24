"""Call conventions: batches and dummy inputs become arguments of a forward."""

import pytest
import torch
import zoo
from torch import nn

from hf_gradnas import nas
from hf_gradnas.errors import DataError, PlanError
from hf_gradnas.nas.arguments import (
    call_arguments,
    first_element,
    named_arguments,
    probe_arguments,
    sanitize,
)

X, Y = torch.ones(2, 3), torch.zeros(2)


class Two(nn.Module):
    """A forward with a positional and an optional argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, scale=None, **more):
        return self.layer(x)


class Bare(Two):
    """A forward whose one argument is a dict."""

    def forward(self, batch):
        return self.layer(batch["x"])


def bert():
    return zoo.build("bert")[0]


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X,), (X,), {}),
        ((X, Y), (X, Y), {}),
        ((X, {"scale": Y}), (X,), {"scale": Y}),
        (({"x": X},), (), {"x": X}),
        (({"x": X, "scale": Y},), (), {"x": X, "scale": Y}),
        (({"x": X}, {}), ({"x": X},), {}),
        ((X, {"x": X}, {}), (X, {"x": X}), {}),
        ({"x": X}, (), {"x": X}),
        ({"other": X}, ({"other": X},), {}),
        ({}, ({},), {}),
        ([X, Y], ([X, Y],), {}),
        ((), (), {}),
    ],
)
def test_arguments_are_taken_as_the_onnx_export_takes_them(given, args, kwargs):
    found = call_arguments(Two(), given)
    assert str(found) == str((args, kwargs))


def test_a_bare_dict_is_one_argument_where_the_forward_has_no_such_names():
    assert call_arguments(Bare(), {"x": X})[0][0].keys() == {"x"}
    assert call_arguments(Bare(), {"batch": {"x": X}})[1]["batch"].keys() == {"x"}


def test_a_transformers_model_takes_a_bare_dict_as_keywords():
    model = bert()
    assert call_arguments(model, {"input_ids": X, "unknown": Y})[1].keys() == {
        "input_ids",
        "unknown",
    }


def test_arguments_move_to_the_models_device():
    model = Two().to("meta")
    args, kwargs = call_arguments(model, (X, {"scale": Y, "names": ["a", (Y, 3)]}))
    assert args[0].device == kwargs["scale"].device == torch.device("meta")
    assert kwargs["names"][1][0].device == torch.device("meta")
    assert kwargs["names"][0] == "a"
    assert call_arguments(nn.ReLU(), X)[0][0] is X


@pytest.mark.parametrize(
    ("batch", "expected"),
    [((1, 2), 1), ([1, 2], 1), ({"a": 1}, {"a": 1}), (3, 3)],
)
def test_the_default_takes_the_first_element_of_a_tuple(batch, expected):
    assert first_element(batch) == expected
    full = sanitize({"data_loader": [], "loss_func": max}, nas.arguments.DEFAULTS, max)
    assert full["collect_func"](batch) == expected


def test_named_arguments_have_the_names_of_the_forward():
    found = named_arguments(Two(), (X, {"scale": Y, "further": X}))
    assert found.keys() == {"x", "scale", "further"}
    assert torch.equal(found["scale"], Y)


def test_arguments_that_do_not_fit_are_refused():
    class ByPosition(Two):
        def forward(self, x, /):
            return self.layer(x)

    class Any(Two):
        def forward(self, *inputs):
            return self.layer(inputs[0])

    with pytest.raises(DataError, match=r"dummy_input: does not fit Two\.forward.* give a tensor"):
        named_arguments(Two(), (X, Y, X))
    with pytest.raises(DataError, match=r"Two\.forward.*missing a required argument: 'x'"):
        named_arguments(Two(), ({"scale": X},))
    for model, name in ((ByPosition(), "x"), (Any(), "inputs")):
        with pytest.raises(DataError, match=f"takes {name} by position only, needed arguments"):
            named_arguments(model, X)


def test_constant_inputs_vary_in_the_probe():
    found = probe_arguments(Two(), (X, {"scale": Y, "attention_mask": X, "ids": Y.long()}))
    assert found["x"].unique().numel() == 6
    assert found["scale"].unique().numel() == 2
    assert torch.equal(found["attention_mask"], X)
    assert torch.equal(found["ids"], Y.long())
    assert torch.equal(probe_arguments(Two(), X)["x"], found["x"])
    varied = torch.arange(6.0).view(2, 3)
    assert probe_arguments(Two(), varied)["x"] is varied
    one = torch.ones(1, 1)
    assert probe_arguments(Two(), one)["x"] is one


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_constant_token_ids_vary_in_the_probe_of_a_transformers_model(fill, name):
    model, _ = zoo.build(name)
    ids = fill(1, 12, dtype=torch.long)
    dummy = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        dummy["decoder_input_ids"] = ids
    found = probe_arguments(model, (dummy,))
    for key, value in found.items():
        assert value.shape == ids.shape
        assert value.unique().numel() == (1 if "mask" in key else 12)


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_constant_dummy_input_finds_the_axes_that_real_tokens_find(fill, name):
    config = {"nn.Linear": {"feature_divisor": 8}}
    found = []
    for constant in (True, False):
        model, batch = zoo.build(name, dtype=torch.float64)
        ids = batch["input_ids"]
        dummy = fill(1, ids.shape[1], dtype=torch.long) if constant else ids[:1]
        _, history = nas.prune(
            model,
            [("gradnas", config)],
            {"flops": "80%"},
            dummy,
            {"data_loader": [batch], "loss_func": lambda output, b: output.loss, "verbose": False},
        )
        found.append(history["best"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data_loader": 3}, DataError, "data_loader is a int, needed an iterable of batches"),
        ({"loss_func": "loss"}, PlanError, "loss_func is a str, needed a function; give"),
        ({"collect_func": 3}, PlanError, "collect_func is a int, needed a function"),
        ({"checkpoint": 3}, PlanError, "checkpoint=3; give the path of a file, or None"),
        ({"score_convergence_tol": 0}, PlanError, "score_convergence_tol=0; give a relative"),
        ({"score_convergence_tol": "1"}, PlanError, "score_convergence_tol='1'; give a"),
        ({"max_iter_data_loader": True}, PlanError, "max_iter_data_loader=True; give a number"),
        ({"max_iter_data_loader": 1.5}, PlanError, r"max_iter_data_loader=1\.5; give a number"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(change, error, message):
    config = {"data_loader": [], "loss_func": max, **change}
    with pytest.raises(error, match=message):
        nas.GradientBinarySearcher().sanitize_search_config(config)
