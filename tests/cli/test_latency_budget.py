"""Budgets in milliseconds and bytes on the command line."""

from __future__ import annotations

import json

import pytest
import yaml

from hf_gradnas.cli.app import main
from hf_gradnas.costs import measured
from hf_gradnas.types import LatencyTable

TINY = ["--num-examples", "8", "--batch-size", "4", "--no-report"]


@pytest.fixture
def quick(monkeypatch):
    """As few forwards as can be, of times that no noise changes."""

    def ms(model):
        return 1.0 + 1e-3 * sum(p.numel() for n, p in model.named_parameters() if ".layer." in n)

    def times(models, inputs, **more):
        return [ms(model) for model in models]

    monkeypatch.setattr(measured, "in_turn", times)


def test_a_table_is_measured_and_serves_the_next_run(prune, bert, tsv, tmp_path, quick):
    options = ("--model", bert, "--dataset", tsv, "--repair", "none", "--no-eval", *TINY)
    options += ("--target", "latency_ms=90%", "--target", "memory=80%")
    code, out, err = prune(*options, "--latency-batch-size", "2")
    assert code == 0, out + err
    table = LatencyTable.load(tmp_path / "bert-gradnas.latency.json")
    assert (table.batch_size, table.length, table.phase) == (2, 40, "prefill")
    assert "bert-gradnas.latency.json (--latency-table)" in out
    document = json.loads((tmp_path / "bert-gradnas" / "gradnas.json").read_text())
    assert document["plan"]["costs"]["latency_ms"] <= 0.9 * table.total_ms
    assert "latency_ms" in (tmp_path / "bert-gradnas" / "README.md").read_text()
    recipe = yaml.safe_load((tmp_path / "bert-gradnas" / "recipe.yaml").read_text())
    assert recipe["latency_batch_size"] == 2
    code, out, _ = prune(
        *options, "--dry-run", "--latency-table", "bert-gradnas.latency.json", "--output", "again"
    )
    assert code == 0
    assert "Latency is planned in ms of a batch of 2 x 40 tokens" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--latency-phase", "decode"), "no budget is in milliseconds"),
        (("--latency-table", "none.json", "--target", "latency_ms=60%"), "there is no such file"),
        (
            ("--latency-table", "x", "--latency-phase", "decode", "--target", "latency_ms=60%"),
            "--latency-table says for what it was measured",
        ),
        (("--target", "kv_cache=60%"), "is 0: this model keeps no keys"),
    ],
)
def test_what_has_no_effect_or_is_missing_is_refused(prune, bert, tsv, more, said):
    code, out, err = prune("--model", bert, "--dataset", tsv, *TINY, *more)
    assert code == 2
    assert said in " ".join((out + err).split())


def test_a_file_that_is_no_table_is_not_replaced(prune, bert, tsv, tmp_path):
    (tmp_path / "bert-gradnas.latency.json").write_text("{}")
    code, out, err = prune("--model", bert, "--dataset", tsv, *TINY, "--target", "latency_ms=60%")
    assert code == 2
    assert "only tables are replaced" in " ".join((out + err).split())


def test_a_sweep_measures_one_table_for_all_its_budgets(capsys, bert, tsv, tmp_path, quick):
    options = ["--model", bert, "--dataset", tsv, "--num-examples", "8", "--batch-size", "4"]
    options += ["--repair", "none", "--targets", "latency_ms=90%,80%", "--latency-batch-size", "4"]
    assert main(["sweep", *map(str, options)]) == 0
    out = capsys.readouterr().out
    assert "Measuring latency" in out or "The whole model takes" in out
    table = LatencyTable.load(tmp_path / "bert-sweep.latency.json")
    assert table.batch_size == 4
    points = json.loads((tmp_path / "bert-sweep" / "sweep.json").read_text())["points"]
    shares = [point["costs"]["latency_ms"] / table.total_ms for point in points]
    assert len(shares) == 2
    assert shares[0] <= 0.9
    assert shares[1] <= 0.8
