"""Areas of Python arguments: loaders, budgets, rules, models, and the surface of `nas`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import zoo
from fuzzing import ODD_NUMBERS, Case
from torch.utils.data import DataLoader

from hf_gradnas import GradNASPruner, nas

GENERATOR = torch.Generator()  # of its own, since a loader draws a number at each start
SETTINGS = ("labels", "num_examples", "seed", "file", "progress")


class Loaders:
    """Loaders of batches that a classifier or a language model cannot be scored with."""

    def __init__(self) -> None:
        self.built = {family: zoo.build(family) for family in ("bert", "llama", "t5", "vit")}

    def loader(self, draw: random.Random) -> Case:
        family = draw.choice(list(self.built))
        model, inputs = self.built[family]
        batches: Any = [dict(inputs), dict(inputs)]
        at = draw.randrange(2)
        is_nonsense = True
        kind = draw.choice(("column", "column", "column", "value", "batch", "loader", "setting"))
        options: dict[str, Any] = {}
        if kind == "column":
            name = draw.choice(list(inputs))
            batches[at][name], what = _odd_column(inputs[name], draw)
            is_nonsense = False
            what = f"{name} {what}"
        elif kind == "value":
            batches[at], what, is_nonsense = _odd_values(dict(inputs), model, draw)
        elif kind == "batch":
            odd = draw.choice((
                None, "text", 3, [], (), {}, [1, 2], tuple(inputs.values()), {"x": 1}, {1: 2}, torch.zeros(2),
                {"input_ids": None}, {"labels": torch.zeros(0)}, {k: v[:0] for k, v in inputs.items()},
                {**inputs, 3: torch.ones(4)}, {**inputs, "unknown": torch.ones(4)},
                {k: v.tolist() for k, v in inputs.items()}, {k: v.numpy() for k, v in inputs.items()},
                {k: v[0] for k, v in inputs.items()}, {k: [v] for k, v in inputs.items()},
            ))  # fmt: skip
            is_nonsense = not (isinstance(odd, dict) and "unknown" in odd)
            batches[at], what = odd, f"{type(odd).__name__} {str(odd)[:60]}"
        elif kind == "loader":
            batches, what = draw.choice((
                (None, "None"), (3, "3"), ("text", "a text"), ([], "no batch"), (iter(()), "an empty iterator"),
                (dict(inputs), "a batch"), (model, "a model"), (inputs.get("labels", 1), "a tensor"),
                (DataLoader([], batch_size=2, generator=GENERATOR), "an empty DataLoader"),
                (DataLoader([{"input_ids": torch.zeros(i + 2).long()} for i in range(4)], batch_size=2, generator=GENERATOR), "a ragged DataLoader"),
                (DataLoader([1, "a"], batch_size=2, generator=GENERATOR), "a DataLoader of anything"),
                (lambda: None, "a function"), (list, "a class"),
            ))  # fmt: skip
        else:
            key = draw.choice(SETTINGS)
            odd = draw.choice(ODD_NUMBERS)
            if key == "file" and isinstance(odd, str) and odd:
                odd = None  # a file of that name would be written
            options = {key: odd}
            what = f"{key}={odd!r}"
            is_nonsense = not _is_fine(key, odd)
        labels = draw.choice(("data", "data", "model"))
        options = {"labels": labels, **options}

        def use() -> None:
            pruner = GradNASPruner(model)
            scores = pruner.score(batches, **options)
            assert all(np.isfinite(v).all() for v in scores.values.values())

        shown = f"{family}, batch {at}: {what}, {options}"
        return Case(shown, use, (is_nonsense and kind != "value") or is_nonsense, model=model)


def _is_fine(key: str, odd: Any) -> bool:
    if odd is None:
        return key not in {"labels", "seed"}
    if key == "num_examples":
        return type(odd) is int and odd > 0
    if key == "seed":
        return type(odd) is int and odd >= 0
    return key == "file" and isinstance(odd, str) and odd != ""


def _odd_column(value: torch.Tensor, draw: random.Random) -> tuple[Any, str]:
    real = value.is_floating_point()
    makers: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "a list": value.tolist,
        "numpy": value.numpy,
        "a number": lambda: 3,
        "a text": lambda: "text",
        "0-d": lambda: value.flatten()[0],
        "1-d": value.flatten,
        "empty": lambda: value[:0],
        "without tokens": lambda: value[:, :0] if value.ndim > 1 else value[:0],
        "one row less": lambda: value[:-1],
        "one token more": lambda: torch.cat([value, value[:, :1]], 1) if value.ndim > 1 else value,
        "nested in a list": lambda: [value],
        "a nested tensor": lambda: torch.nested.nested_tensor(
            [torch.ones(2), torch.ones(3)], layout=torch.jagged
        ),
        "sparse": value.to_sparse,
        "complex": lambda: value.to(torch.complex64),
        "bool": value.bool,
        "float": lambda: value.float() + (0 if real else 0.5),
        "int8": lambda: value.to(torch.int8),
        "int32": value.int,
        "meta": lambda: value.to("meta"),
        "4-d": lambda: value.reshape(*value.shape, *[1] * max(0, 4 - value.ndim)),
        "negative": lambda: -value - 1,
        "-5": lambda: torch.full_like(value, -5),
        "huge": lambda: torch.full_like(value, 10**6),
        "nan": lambda: torch.full_like(value, float("nan")) if real else value.double() * torch.nan,
        "inf": lambda: torch.full_like(value, float("inf")) if real else value.double() + torch.inf,
    }
    name = draw.choice(list(makers))
    return makers[name](), name


def _odd_values(
    batch: dict[str, Any], model: Any, draw: random.Random
) -> tuple[dict[str, Any], str, bool]:
    """One entry of a column that is out of range."""
    name = draw.choice([k for k in batch if k in ("input_ids", "labels", "pixel_values")])
    value = batch[name].clone()
    odd = draw.choice((-1, -5, -101, 10**6, 2**40))
    if value.is_floating_point():
        odd = draw.choice((float("nan"), float("inf")))
    value.view(-1)[draw.randrange(value.numel())] = odd
    batch[name] = value
    # A first label of a language model is shifted away, and predicts nothing.
    return batch, f"{name} with {odd}", name == "input_ids"


class Budgets:
    """Budgets and rules for a model that is scored."""

    def __init__(self) -> None:
        self.model, inputs = zoo.build("bert")
        self.pruner = GradNASPruner(self.model)
        self.pruner.score([inputs])

    def budget(self, draw: random.Random) -> Case:
        name = draw.choice(
            ("params", "params", "flops", "latency", "", "Params", "params ", 1, None)
        )
        limit = draw.choice((
            *ODD_NUMBERS, "50", "50%", "150%", "0%", "-5%", "nan%", "inf%", "1e-9%", "５０%", "٥٠%", "1_0%",
            "50%%", "%", "%50", " 60 %", "60%\n", "0x10", "1e999", "1K%", "66m", "66Mi", "1 000", "60,5%",
            np.float64(0.5), np.int64(5), np.bool_(True), np.array(5), np.array([5]), torch.tensor(5),
            Fraction(1, 2), 10**400, 10**6000, complex(1), object(), lambda: 1, "9" * 400 + "%", 70, 0.999, 1, 1.0,
        ))  # fmt: skip
        budget: Any = {name: limit}
        if draw.random() < 0.15:
            budget = draw.choice(
                (*ODD_NUMBERS, "params=50%", [("params", "50%")], {"params"}, object())
            )
        good = name in ("params", "flops") and limit in ("60 %", " 60 %", "60%\n", "50%")
        if isinstance(limit, np.ndarray | torch.Tensor):
            good = False

        def use() -> None:
            plan = self.pruner.plan(budget)
            for found in plan.budgets:
                assert plan.costs[found.cost] <= found.limit <= found.total

        return Case(f"budget {_shown(budget)}", use, not good and not _may_pass(budget), self.model)

    def rules(self, draw: random.Random) -> Case:
        glob = draw.choice(("*", "*layer.0*", "[", "**", "", "nowhere", 1, None, ("*",)))
        rule = draw.choice((
            *ODD_NUMBERS, {"min": 1}, {"min": -1}, {"min": True}, {"min": 1.0}, {"min": "1"}, {"min": None},
            {"min": 10**30}, {"min": float("nan")}, {"multiple": 0}, {"multiple": 2.5}, {"multiple": 10**30},
            {"multiple": "8"}, {"max": 1}, {"min": [1]}, {1: 2},
        ))  # fmt: skip
        rules: Any = {glob: rule}
        if draw.random() < 0.15:
            rules = draw.choice((*ODD_NUMBERS, [("*", None)], "*", {"*"}))
        more = {}
        if draw.random() < 0.2:
            rules, key = None, draw.choice(("score", "search", "layout", "accelerator"))
            more = {key: draw.choice(ODD_NUMBERS)}

        def use() -> None:
            pruner = GradNASPruner(self.model, rules=rules, **more)
            pruner._prunable = replace(self.pruner.prunable, layout="per_layer")
            from hf_gradnas.config.limits import check_rules

            check_rules(pruner.rules, self.pruner.structure)
            pruner._scores = self.pruner._scores
            pruner.plan({"params": "95%"})

        number = isinstance(rule, dict) and any(
            isinstance(v, bool | str | float | list) for v in rule.values()
        )
        return Case(
            f"rules {rules!r:.120} {more}", use, number and rules == {glob: rule}, self.model
        )


def _shown(budget: Any) -> str:
    try:
        return f"{budget!r:.120}"
    except ValueError:  # Python prints no integer of so many digits
        return "an integer of many digits"


def _may_pass(budget: Any) -> bool:
    if not isinstance(budget, Mapping):
        return False
    ((name, limit),) = budget.items() if len(budget) == 1 else (("", None),)
    if name not in ("params", "flops"):
        return False
    return isinstance(limit, int | float | np.integer | np.floating | Fraction | str) and not (
        isinstance(limit, bool | np.bool_)
        or limit
        in ("５０%", "٥٠%", "1_0%", "١", "1_0", "0x10", "50%%", "150%", "0%", "-5%", "", "x")
        or (isinstance(limit, float) and math.isnan(limit))
    )


class Models:
    """Models that are odd, though Transformers builds them."""

    def model(self, draw: random.Random) -> Case:
        family = draw.choice(("bert", "llama", "gpt2", "vit"))
        model, inputs = zoo.build(family)
        what = draw.choice(list(_ODD_MODELS))
        odd = _ODD_MODELS[what](model, draw)
        if odd is not None and not isinstance(odd, torch.nn.Module):
            model = odd
        step = draw.choice(("discover", "prune", "save"))

        def use() -> None:
            pruner = GradNASPruner(model, score=draw.choice(("fisher", "magnitude")))
            if step == "discover":
                pruner.discover(inputs)
                return
            pruner.score([inputs])
            plan = pruner.plan({"params": "95%"})
            if step == "save":
                pruner.apply(plan)
                found = sum(p.numel() for p in pruner.model.parameters())
                assert found == plan.costs["params"], (found, plan.costs["params"])
                model(**inputs)

        kept = model if isinstance(model, torch.nn.Module) and step != "save" else None
        return Case(f"{family}, {what}, {step}", use, model=kept)


def _weights(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1]


def _fill(value: float) -> Callable[[Any, random.Random], None]:
    def change(model: Any, draw: random.Random) -> None:
        weight = draw.choice(_weights(model))
        with torch.no_grad():
            weight.view(-1)[0] = value

    return change


def _inference(model: Any, draw: random.Random) -> None:
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    copy = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    module._parameters[name] = copy


def _integers(model: Any, draw: random.Random) -> None:
    linear = draw.choice([m for m in model.modules() if isinstance(m, torch.nn.Linear)] or [None])
    if linear is not None:
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def _tie(model: Any, draw: random.Random) -> None:
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    first = draw.choice(linears) if linears else None
    others = [m for m in linears if first is not None and m.weight.shape == first.weight.shape]
    if first is not None:
        draw.choice(others).weight = first.weight


def _empty(model: Any, draw: random.Random) -> None:
    linear = draw.choice([m for m in model.modules() if isinstance(m, torch.nn.Linear)] or [None])
    if linear is not None:
        linear.weight = torch.nn.Parameter(linear.weight[:0])


def _mixed(model: Any, draw: random.Random) -> None:
    draw.choice([m for m in model.modules() if isinstance(m, torch.nn.Linear)] or [model]).half()


def _meta(model: Any, draw: random.Random) -> None:
    model.to("meta")


def _double(model: Any, draw: random.Random) -> None:
    model.double()


def _some_training(model: Any, draw: random.Random) -> None:
    for module in draw.sample(list(model.modules()), 5):
        module.training = True


def _frozen(model: Any, draw: random.Random) -> None:
    for parameter in draw.sample(list(model.parameters()), 5):
        parameter.requires_grad_(False)


def _odd_config(model: Any, draw: random.Random) -> None:
    name = draw.choice(("num_attention_heads", "intermediate_size", "hidden_size", "num_labels"))
    if name in model.config.to_dict():
        setattr(model.config, name, draw.choice((0, -1, 7, 3)))


_ODD_MODELS: dict[str, Callable[[Any, random.Random], Any]] = {
    "nan in a weight": _fill(float("nan")),
    "inf in a weight": _fill(float("inf")),
    "1e38 in a weight": _fill(1e38),
    "inference-mode weights": _inference,
    "integer weights": _integers,
    "tied layers": _tie,
    "an empty layer": _empty,
    "half a layer": _mixed,
    "meta": _meta,
    "float64": _double,
    "modules in training": _some_training,
    "frozen parameters": _frozen,
    "another config": _odd_config,
    "a class": lambda model, _: type(model),
    "a config": lambda model, _: model.config,
    "a name": lambda model, _: "bert-base-uncased",
    "nothing": lambda model, _: 3,
}


class Searches:
    """The reference's surface with nonsense."""

    def __init__(self) -> None:
        torch.manual_seed(0)

    def search(self, draw: random.Random) -> Case:
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 4),
        )  # fmt: skip
        images = torch.randn(4, 3, 8, 8)
        data = [(images, torch.tensor([0, 1, 2, 3]))]
        odd = draw.choice((*ODD_NUMBERS, object(), {"flops": "60%"}, {"nothing": "60%"}))
        arguments: dict[str, Any] = {
            "model": model,
            "constraints": {"flops": "70%"},
            "dummy_input": images,
            "config": {"data_loader": data, "loss_func": lambda out, batch: out.square().mean()},
        }
        kind = draw.choice(("constraints", "dummy_input", "config", "key", "convert", "model"))
        if kind == "key":
            name = draw.choice(
                (
                    "data_loader",
                    "loss_func",
                    "checkpoint",
                    "max_iter_data_loader",
                    "x",
                    "collect_func",
                )
            )
            arguments["config"] = {**arguments["config"], name: odd}
            kind = f"config[{name}]"
        elif kind == "convert":
            act = lambda: nas.convert(model, odd)  # noqa: E731
            return Case(f"convert(model, {odd!r:.60})", act)
        else:
            arguments[kind] = odd

        def use() -> None:
            converted = nas.convert(
                arguments["model"], [("gradnas", {"nn.Conv2d": {"*": {"channel_divisor": 1}}})]
            )
            nas.search(
                converted, arguments["constraints"], arguments["dummy_input"], arguments["config"]
            )

        return Case(f"search, {kind} = {odd!r:.60}", use)
