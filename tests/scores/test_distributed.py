"""One process ≡ two processes ≡ gradient accumulation, on 101 examples in batches of 8."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import distributed_scores as script
import numpy as np
import pytest
import torch
import zoo
from distributed_scores import BUDGET, COUNT, EXAMPLES, SIZE, loader
from overflows import marked, overflowing
from ranks import launch
from repair_by_hand import repair_by_hand
from score_examples import build, examples_of, in_batches

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import GradNASWarning
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.scores import collect_scores, model_fingerprint

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every case on two processes."""
    return launch(script.__file__, tmp_path_factory.mktemp("two"))


def alone(batches: Any = None, *, family: str = "bert", **options: Any) -> dict[str, np.ndarray]:
    """Scores of a single process, without an Accelerator."""
    model, axes, _ = build(family, dtype=options.pop("dtype", torch.float64))
    batches = in_batches(EXAMPLES, SIZE) if batches is None else batches
    return dict(collect_scores(model, axes, batches, **options).values)


def assert_same(found: Any, expected: dict[str, np.ndarray], rtol: float = 1e-9) -> None:
    """Equal up to `rtol` of each axis's largest score, over all examples."""
    for name, values in expected.items():
        difference = np.abs(np.array(found[name]) - values).max()
        assert difference <= rtol * np.abs(values).max(), name


@pytest.mark.parametrize("case", ["plain", "of_a_list", "of_a_stream", "dispatched"])
def test_every_example_counts_once_however_batches_are_dealt(two: Found, case: str) -> None:
    assert two[0][case] == two[1][case]
    assert two[0][case]["examples"] == str(COUNT)
    assert_same(two[0][case], alone())


def test_a_prepared_loader_is_used_as_it_is(two: Found) -> None:
    assert two[0]["prepared"] == two[1]["prepared"]
    assert_same(two[0]["prepared"], alone(method="taylor"))


def test_single_precision(two: Found) -> None:
    expected = alone(dtype=torch.float32)
    assert_same(two[0]["single_precision"], expected, rtol=1e-5)


def test_labels_are_drawn_per_example_whoever_scores_it(two: Found) -> None:
    expected = alone(labels="model", seed=5, num_examples=37)
    assert two[0]["sampled_labels"]["examples"] == "37"
    assert_same(two[0]["sampled_labels"], expected)


def test_heads_in_groups(two: Found) -> None:
    with zoo.float64_throughout():
        batches = in_batches(examples_of("llama", COUNT), SIZE)
        assert_same(two[0]["grouped_heads"], alone(batches, family="llama"))


def test_rows_of_equal_weight(two: Found) -> None:
    assert two[0]["rows_of_equal_weight"] == two[1]["rows_of_equal_weight"]
    of_examples, of_positions = two[0]["rows_of_equal_weight"]
    assert_same(of_examples, alone(method="balanced"))
    with zoo.float64_throughout():
        batches = in_batches(examples_of("llama", COUNT, longest=40), SIZE)
        assert_same(of_positions, alone(batches, family="llama", method="balanced"))


def test_rows_of_tempered_weight(two: Found) -> None:
    found, other = (one["rows_of_tempered_weight"] for one in two)
    assert found == other
    with zoo.float64_throughout():
        model, axes, _ = build("llama", dtype=torch.float64)
        batches = in_batches(examples_of("llama", COUNT, longest=40), SIZE)
        expected = collect_scores(model, axes, batches, method="tempered")
    assert_same(found, dict(expected.values))
    assert found["ratio"] == expected.metadata["effective_ratio"]
    assert np.allclose(found["sums"], expected.sums["tempered"], rtol=1e-9, atol=0)


def test_all_processes_choose_the_same_score(two: Found) -> None:
    first, second = (found["chosen"] for found in two)
    assert first == second
    model, axes, _ = build("bert", dtype=torch.float64)
    batches = in_batches(EXAMPLES, SIZE)
    held_out = batches[8:10]  # one step of two processes
    pruner = GradNASPruner(model, score="fisher")
    pruner.discover(batches[0])
    plans = {}
    for method in first["tried"]:
        rest = [*batches[:8], *batches[10:]]
        pruner.use_scores(collect_scores(model, axes, rest, method=method))
        plans[method] = pruner.plan(BUDGET)
    variants = [partial(pruner.masked, plan) for plan in plans.values()]
    expected = divergences(model, held_out, variants)
    assert list(first["tried"].values()) == pytest.approx(expected, rel=1e-9)
    best = min(first["tried"], key=first["tried"].get)
    assert first["kept"] == {name: list(units) for name, units in plans[best].kept.items()}


def test_neurons_are_swapped_by_the_batches_of_all_processes(two: Found) -> None:
    first, second = (found["swapped"] for found in two)
    assert first["kept"] == second["kept"]
    assert first["told"]
    assert not second["told"]
    model, _, _ = build("bert", dtype=torch.float64)
    pruner = GradNASPruner(model, score="fisher")
    pruner.score(loader(EXAMPLES))
    plan = pruner.plan(BUDGET)
    swapped = pruner.swap(plan, loader(EXAMPLES))
    assert swapped.kept != plan.kept
    assert first["kept"] == {name: list(units) for name, units in swapped.kept.items()}


def test_gradnas_is_the_same_for_the_same_global_batches(two: Found) -> None:
    expected = alone(method="gradnas")
    assert two[0]["global_batches"] == two[1]["global_batches"]
    for found in two[0]["global_batches"]:
        assert_same(found, expected)


def test_scores_of_weights_alone(two: Found) -> None:
    expected = alone((), method="magnitude")
    assert_same(two[0]["weights"], expected, rtol=0)
    assert_same(two[1]["weights"], expected, rtol=0)


def test_a_pass_that_broke_off_goes_on_from_the_joint_sums(two: Found) -> None:
    first, second = (found["resumed"] for found in two)
    assert first["scores"] == second["scores"]
    assert_same(first["scores"], alone())
    assert (first["calls"], second["calls"]) == (7 - 4, 6 - 4)
    assert first["files"] == ["resumed-2.safetensors"]


def test_an_error_of_one_process_is_the_error_of_all(two: Found) -> None:
    first, second = ({name: rest for name, *rest in found["failures"]} for found in two)
    of_another = "Process 1 failed, so all 2 stop. "
    assert second["batch"][0] == first["batch"][0] == "DataError"
    assert first["batch"][1] == of_another + second["batch"][1]
    assert second["model"][0] == first["model"][0] == "DataError"
    assert first["model"][1] == of_another + second["model"][1]
    assert "out of luck" in second["model"][1]
    assert first["interrupt"] == second["interrupt"] == ["KeyboardInterrupt", ""]
    assert first["progress"] == ["ValueError", "a broken bar"]
    assert second["progress"][1].startswith("Process 0 failed, so all 2 stop. ValueError")
    for name, message in {
        "order": "the processes read different batches",
        "weights": "process 1 has other weights than process 0",
        "settings": "process 1 has other num_examples than process 0",
    }.items():
        assert first[name] == second[name]
        assert message in first[name][1]


def test_all_processes_cut_alike_and_one_writes(two: Found) -> None:
    first, second = (found["pruned"] for found in two)
    model, _ = zoo.build("bert", dtype=torch.float32)
    pruner = GradNASPruner(model, score="fisher")
    plan = pruner.prune(in_batches(EXAMPLES, SIZE), BUDGET)
    assert first == second
    assert first["kept"] == {name: list(units) for name, units in plan.kept.items()}
    assert first["shapes"] == [list(parameter.shape) for parameter in model.parameters()]
    assert first["again"] == []
    type(model).from_pretrained(first["saved"])
    repair, record = pruner._repair, json.loads((Path(first["saved"]) / "gradnas.json").read_text())
    assert repair is not None
    assert record["repair"]["examples"] == repair.examples == len(EXAMPLES)
    assert record["repair"]["kl_after"] < 0.5 * record["repair"]["kl_before"]


def test_scoring_leaves_ddp_as_it_was(two: Found) -> None:
    assert two[0]["trained_afterwards"] == two[1]["trained_afterwards"]


def test_a_sharded_model_is_scored_as_shards_and_cut_whole(two: Found) -> None:
    assert_pruned_as_shards(*(found["sharded"] for found in two), "sharded by FSDP2")


def test_shards_run_where_a_process_has_no_label(two: Found) -> None:
    batches = script.without_labels(in_batches(examples_of("llama", 40), SIZE))
    expected = alone(batches, family="llama", dtype=torch.float32)
    assert_same(two[0]["sharded_without_labels"], expected, rtol=1e-5)


def test_examples_that_overflow_are_skipped_and_counted_over_all_processes(two: Found) -> None:
    first, second = (found["overflowed"] for found in two)
    assert first["found"] == second["found"]
    assert (first["told"], second["told"]) == (1, 0)  # the main process warns
    few, many = first["found"]
    assert "3 of 24 examples overflow in float16, more than 10%" in many
    model, axes, _ = build("bert", dtype=torch.float16)
    batches = in_batches(marked(24, bad=script.OVERFLOWS[0]), 4)
    also = ("tempered", "gradnas")
    with overflowing(model), pytest.warns(GradNASWarning, match="2 of 24"):
        expected = collect_scores(model, axes, batches, also=also)
    for method in ("fisher", "tempered"):
        assert_same(few[method], dict(expected.of(method).values), rtol=1e-15)
    loss = float(few["said"].pop("loss_sum"))
    assert loss == pytest.approx(float(expected.metadata["loss_sum"]), rel=1e-15)
    assert few["said"] == {
        "skipped_examples": "2",
        "labels_scored": "22",
        "examples": "24",
    }


def test_what_the_hosts_have_is_summed_by_them(two: Found) -> None:
    for found in two:
        numbers, sums = [[0, 2.0**53 - 1], [1, 2.0**53 - 1]], [0.2, 1.0]
        assert found["by_host"] == {"found": [numbers, sums, numbers, sums], "made": 1}


def test_orders_that_differ_between_processes_are_refused(two: Found) -> None:
    for found in two:
        assert found["unseeded"].count("the processes read different batches") == 2


@pytest.mark.long
def test_a_partitioned_model_is_scored_as_parts_and_cut_whole(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    two = launch(script.__file__, tmp_path, "partitioned")
    assert_pruned_as_shards(*(found["partitioned"] for found in two), "partitioned by ZeRO-3")


def assert_pruned_as_shards(first: Any, second: Any, what: str) -> None:
    """Scores, plan and cut model of two processes are those of a single, whole one."""
    assert first == second
    model, inputs = zoo.build("bert", dtype=torch.float32)
    assert first["model"] == model_fingerprint(model)
    assert len(loader(EXAMPLES)) % 2 == 1
    batches = in_batches(EXAMPLES, SIZE)
    assert_same(first["scores"], alone(dtype=torch.float32), rtol=1e-5)
    assert f"bert.embeddings.word_embeddings.weight is {what}" in first["refused"][0]
    assert "but a repair is found and tried with whole weights" in first["refused"][1]
    assert first["is_plain"]
    whole = GradNASPruner(model, score="fisher")
    whole.score(batches)
    plan = whole.plan(BUDGET)
    whole.apply(plan, repair_by_hand(whole, plan))
    assert first["kept"] == {name: list(units) for name, units in plan.kept.items()}
    for cut in (model, type(model).from_pretrained(first["saved"])):
        assert torch.allclose(cut.eval()(**inputs).logits, torch.tensor(first["logits"]), atol=1e-6)
