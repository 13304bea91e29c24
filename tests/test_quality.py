"""The benchmark of quality: peers' rules against their equations, and what a row says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from cli_cases import save_bert, save_llama, write_text
from places import EXAMPLES

from hf_gradnas import GradNASPruner
from hf_gradnas.masks import multiplied, out_projection

sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import peers
import quality
import tasks

BUDGET = {"flops": "70%"}


@pytest.fixture(params=["bert", "llama"])
def pruner(request: pytest.FixtureRequest) -> GradNASPruner:
    model, inputs = zoo.build(request.param)
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.discover(inputs)
    return pruner


def calibration() -> list[dict[str, torch.Tensor]]:
    """Three batches of unequal length; one example of each is padded on the right."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (9, 7, 12):
        ids = torch.randint(3, zoo.VOCAB, (4, length), generator=generator)
        real = torch.ones_like(ids)
        real[-1, length - 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": real})
    return batches


def inputs_of(pruner: GradNASPruner, path: str) -> torch.Tensor:
    """Inputs ``(positions, entries)`` of an out-projection, without padding."""
    seen: list[torch.Tensor] = []
    module = pruner.model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in calibration():
        pruner.model(**batch)
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in calibration()]
    return torch.cat([x[mask] for x, mask in zip(seen, real, strict=True)])


@pytest.mark.parametrize("rule", ["flap", "wanda"])
def test_statistics_are_their_formulas(pruner: GradNASPruner, rule: str) -> None:
    values = peers.PEERS[rule].values(pruner, calibration())
    for axis in pruner.structure.axes:
        x, weight = (
            inputs_of(pruner, axis.taps[0].module),
            out_projection(pruner.model, axis).weight,
        )
        if rule == "flap":
            metric = x.var(0, unbiased=False) * weight.norm(dim=0).square()
            metric = (metric - metric.mean()) / metric.std()
            wanted = metric.view(axis.size, -1).mean(1)
        else:
            wanted = (weight.abs() * x.norm(dim=0)).sum(0).view(axis.size, -1).sum(1)
        assert np.allclose(values[axis.name], wanted.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("rule", peers.PEERS)
def test_plans_meet_the_budget_from_below_and_run(pruner: GradNASPruner, rule: str) -> None:
    method = peers.PEERS[rule]
    if method.values is None:
        assert method.choose is None
        return
    plan = method.choose(pruner, method.values(pruner, calibration()), BUDGET)
    assert 0.5 < plan.costs["flops"] / pruner.totals["flops"] <= 0.7
    for axis in pruner.structure.axes:
        if axis.parent:
            groups, heads = set(plan.kept[axis.parent]), axis.size // 2
            assert set(plan.kept[axis.name]) == {
                h for h in range(axis.size) if h // heads in groups
            }
    with pruner.masked(plan):
        assert pruner.model(**calibration()[0]).logits.isfinite().all()


def test_wanda_keeps_the_same_share_everywhere(pruner: GradNASPruner) -> None:
    values = {a.name: np.arange(a.size, dtype=float) for a in pruner.structure.axes}
    plan = peers.same_share(pruner, values, BUDGET)
    assert {len(plan.kept[a.name]) for a in pruner.structure.axes if a.kind == "neurons"} == {
        len(plan.kept[pruner.structure.axes[-1].name])
    }
    for axis in peers.outer(pruner):
        assert plan.kept[axis.name] == tuple(range(axis.size))[-len(plan.kept[axis.name]) :]


def test_flap_has_one_threshold_and_a_uniform_variant_for_stock(pruner: GradNASPruner) -> None:
    values = peers.fluctuation(pruner, calibration())
    plan = peers.one_threshold(pruner, values, BUDGET)
    kept = [v for a in peers.outer(pruner) for v in values[a.name][list(plan.kept[a.name])]]
    lost = [
        value
        for axis in peers.outer(pruner)
        for unit, value in enumerate(values[axis.name])
        if unit not in plan.kept[axis.name]
    ]
    assert min(kept) > max(lost)
    pruner.layout = "stock"
    assert peers.one_threshold(pruner, values, BUDGET) == peers.same_share(pruner, values, BUDGET)


def test_flaps_bias_holds_the_mean_of_what_went(pruner: GradNASPruner) -> None:
    axis = peers.outer(pruner)[-1]
    kept = {a.name: tuple(range(a.size)) for a in pruner.structure.axes}
    plan = peers.same_share(pruner, {a.name: np.ones(a.size) for a in peers.outer(pruner)}, BUDGET)
    plan = type(plan)({**kept, axis.name: (0, 1)}, plan.sizes, plan.layout)
    outputs: list[torch.Tensor] = []
    real = [batch["attention_mask"].bool() for batch in calibration()]
    pruned = peers.mean_bias(pruner, plan, calibration())
    weight = out_projection(pruner.model, axis)
    whole = weight(inputs_of(pruner, axis.taps[0].module)).mean(0)
    with pruned():
        handle = weight.register_forward_hook(lambda _, args, output: outputs.append(output))
        for batch in calibration():
            pruner.model(**batch)
        handle.remove()
    found = torch.cat([x[mask] for x, mask in zip(outputs, real, strict=True)]).mean(0)
    assert torch.allclose(found, whole, rtol=1e-9)


def test_kwons_masks_are_the_least_squares_of_the_stream(pruner: GradNASPruner) -> None:
    axes, model = pruner.structure.axes, pruner.model
    values = {a.name: np.arange(a.size, dtype=float) for a in axes}
    plan = peers.same_share(pruner, values, BUDGET)
    found: dict[str, torch.Tensor] = {}

    def keep(model: Any, axes: Any, masks: dict[str, torch.Tensor]) -> None:
        found.update(masks)

    with pytest.MonkeyPatch.context() as patch:
        run = peers.tuned_masks(pruner, plan, calibration())
        patch.setattr(peers, "multiplied", keep)
        run()
    parents = {axis.parent for axis in axes}
    first = next(axis for axis in axes if axis.name not in parents)
    masks = {a.name: torch.zeros(a.size).double() for a in axes}
    for axis in axes:
        masks[axis.name][list(plan.kept[axis.name])] = 1.0

    columns, missing = [], []
    weight = out_projection(model, first).weight.detach()
    for batch in calibration():
        _, whole = peers.inputs_and_stream(model, first, batch)
        with multiplied(model, axes, masks):
            x, stream = peers.inputs_and_stream(model, first, batch)
        parts = x.view(len(x), first.size, first.width)
        by_unit = weight.view(-1, first.size, first.width)
        columns.append(torch.einsum("puw,ouw->pou", parts, by_unit).flatten(0, 1))
        missing.append((whole - stream).flatten())
    kept = list(plan.kept[first.name])
    a = torch.cat(columns)[:, kept].detach()
    damped = torch.cat([a, torch.eye(len(kept)).double()])
    right = torch.cat([*missing, torch.zeros(len(kept)).double()]).detach()
    wanted = 1 + torch.linalg.lstsq(damped, right[:, None]).solution[:, 0]
    assert torch.allclose(found[first.name][kept], wanted, rtol=1e-6)
    assert all(
        not mask[i] for n, mask in found.items() for i in range(len(mask)) if i not in plan.kept[n]
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """Options of a tiny run of each task."""
    for name in ("train", "dev"):
        rows = [f"the film was {word}\t{label}" for label, word in enumerate(["bad", "good"])] * 8
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    text = str(write_text(tmp_path / "text.txt"))
    bert, llama = save_bert(tmp_path / "bert"), save_llama(tmp_path / "llama")
    classify = ["classify", "--model", str(bert), "--length", "8", "--examples", "8"]
    classify += ["--train", str(tmp_path / "train.tsv"), "--dev", str(tmp_path / "dev.tsv")]
    classify += ["--budget", "flops=80%", "flops=60%", "--subsets", "2", "--batch-size", "4"]
    language = ["language", "--model", str(llama), "--length", "8", "--examples", "4"]
    language += ["--train", text, "--dev", text, "--eval-from", "end", "--eval-examples", "3"]
    language += ["--budget", "blocks=80%", "--subsets", "1", "--batch-size", "4"]
    return {"classify": classify, "language": language}


@pytest.mark.parametrize("task", ["classify", "language"])
@pytest.mark.long
def test_a_run_keeps_its_rows_and_measures_nothing_twice(
    task: str, files: dict[str, list[str]], tmp_path: Path, capsys, monkeypatch
) -> None:
    results = tmp_path / "rows.jsonl"
    options = [*files[task], "--score", "fisher", "auto", "--results", str(results)]
    rows = quality.main(options)
    said = capsys.readouterr().out
    assert [json.loads(line) for line in results.read_text().splitlines()] == rows
    whole = [row for row in rows if row["method"] == "unpruned"]
    assert len(whole) == 1
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-6)
    methods = {row["method"] for row in rows if "budget" in row}
    assert methods == {"fisher", "auto", *peers.PEERS}
    assert {row["score"] for row in rows if row["method"] == "auto"} <= {"tempered", "fisher"}
    assert all(row["achieved"] <= 1 and row["kl"] > -1e-6 for row in rows if "budget" in row)
    repair = "swap" if task == "language" else "yes"
    assert said.count(f"| fisher | lagrangian | {repair} |") == 2
    monkeypatch.setattr(quality, "trials", None)  # would be called for a row that is missing
    assert quality.main(options) == rows


@pytest.mark.parametrize("repair", ["weights", "swap", "none"])
def test_cut_is_masked(repair: str, files: dict[str, list[str]], capsys) -> None:
    options = [*files["language"], "--score", "fisher", "--peer", "--repair", repair]
    (_, masked), (_, cut) = quality.main(options), quality.main([*options, "--cut"])
    capsys.readouterr()
    assert cut["metric"] == pytest.approx(masked["metric"], rel=1e-5)
    assert cut["kl"] == pytest.approx(masked["kl"], rel=1e-3)


def test_a_peers_repair_is_not_cut(files: dict[str, list[str]], capsys) -> None:
    with pytest.raises(SystemExit):
        quality.main([*files["language"], "--cut"])
    assert "--cut: a peer's repair is run masked only" in capsys.readouterr().err


def test_too_few_examples_for_the_subsets(files: dict[str, list[str]]) -> None:
    with pytest.raises(SystemExit, match="3 subsets of 8 examples need 24, but there are 16"):
        quality.main([*files["classify"], "--subsets", "3"])


def test_the_end_of_a_text_that_is_measured_on_is_not_calibrated_on(
    files: dict[str, list[str]],
) -> None:
    args = quality.parse(files["language"])
    data = tasks.read_blocks(args, quality.AutoTokenizer.from_pretrained(args.model))
    text = Path(args.dev).read_text(encoding="utf-8")
    tokens = quality.AutoTokenizer.from_pretrained(args.model)(text)["input_ids"]
    assert data.evaluation.flatten().tolist() == tokens[-24:]
    seen = data.calibration.flatten().tolist()
    assert seen == tokens[: len(seen)]
    assert len(seen) <= len(tokens) - 24
    first, second = data.subset(0, args), data.subset(1, args)
    assert first[0]["input_ids"].flatten().tolist() == tokens[:32]
    assert second[0]["input_ids"].flatten().tolist() == tokens[32:64]


def test_blocks_are_the_parameters_without_embeddings() -> None:
    model, inputs = zoo.build("llama", tie_word_embeddings=False)
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    tables = sum(
        p.numel() for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n
    )
    total = sum(p.numel() for p in model.parameters())
    assert tables == 2 * zoo.VOCAB * 64
    limit = quality.limit_of("blocks=75%", pruner)
    assert limit == {"params": pytest.approx(total - (total - tables) / 4)}
    assert quality.limit_of("flops=50%", pruner) == {"flops": "50%"}
