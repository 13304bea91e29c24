"""The facade end to end, on every family: score, plan, cut, save, and load again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
import zoo
from families import spread
from transformers import Trainer, TrainingArguments

from hf_gradnas import GradNASPruner, Plan, Scores
from hf_gradnas.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    OrderError,
    PlanError,
    ScoresError,
    StructureError,
)

GENERATORS = sorted(name for name, family in zoo.FAMILIES.items() if family.generates)


def numel(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def logits_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def without_first_attention(pruner: GradNASPruner) -> Plan:
    """All units but those of the first decoder self-attention, and half of the FFNs."""
    axes = pruner.structure.axes
    decoder = [a for a in axes if a.removal is not None and not a.removal.cross]
    first = next((a for a in decoder if "decoder" in a.name), decoder[0])
    kept = {a.name: tuple(range(0, a.size, 1 if a.size < 96 else 2)) for a in axes}
    kept[first.name] = ()
    if first.parent is not None:
        kept[first.parent] = ()
    return Plan(kept=kept, sizes={a.name: a.size for a in axes}, layout="per_layer")


@pytest.mark.leaves_state
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", spread(GENERATORS))
def test_generate_without_the_first_layers_attention(family: str, cache: str) -> None:
    model, inputs = zoo.build(family, dtype=torch.float64)
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.discover(inputs)
    plan = without_first_attention(pruner)
    model.generation_config.eos_token_id = None
    prompt = {k: v[:2] for k, v in inputs.items() if k not in ("labels", "decoder_input_ids")}
    if zoo.FAMILIES[family].inputs == "causal":
        prompt = {"input_ids": inputs["input_ids"][:1]}
    options = {"max_new_tokens": 6, "do_sample": False}
    with zoo.float64_throughout():
        with pruner.masked(plan):
            expected = model.generate(**prompt, **options, use_cache=False)
        pruner.apply(plan)
        how = {"cache_implementation": "static", "disable_compile": True}
        found = model.generate(**prompt, **options, **(how if cache == "static" else {}))
    assert torch.equal(found, expected)


@pytest.fixture
def llama() -> tuple[GradNASPruner, dict]:
    model, inputs = zoo.build("llama")
    return GradNASPruner(model), inputs


@pytest.mark.leaves_state
def test_eager_and_sdpa_agree_after_the_cut() -> None:
    for family in ("llama", "bert", "phi3"):
        model, inputs = zoo.build(family)
        GradNASPruner(model, layout="per_layer").prune([inputs], {"params": "70%"})
        with zoo.float64_throughout():
            model.set_attn_implementation("eager")
            eager = logits_of(model, inputs)
            model.set_attn_implementation("sdpa")
            sdpa = logits_of(model, inputs)
        real = inputs["attention_mask"].bool() if eager.ndim > 2 else slice(None)
        assert (eager[real] - sdpa[real]).abs().max() < 1e-10


@pytest.mark.leaves_state
@pytest.mark.long
def test_pruning_a_pruned_checkpoint_composes(tmp_path: Any) -> None:
    for family in ("bert", "llama", "t5", "phi3"):
        model, inputs = zoo.build(family, dtype=torch.float32)
        first = GradNASPruner(model, layout="per_layer")
        first.prune([inputs], {"params": "80%"})
        first.save_pretrained(tmp_path / family)
        again = type(model).from_pretrained(tmp_path / family).eval()
        second = GradNASPruner(again)
        plan = second.prune([inputs], {"params": "80%"})
        assert plan.layout == "per_layer"
        assert numel(again) == plan.costs["params"] <= 0.8 * numel(model)
        second.save_pretrained(tmp_path / f"{family}-twice")
        last = type(model).from_pretrained(tmp_path / f"{family}-twice").eval()
        assert (logits_of(last, inputs) - logits_of(again, inputs)).abs().max() <= 1e-5


def test_auto_keeps_every_axis(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    pruner.discover(inputs)
    assert pruner.layout == "stock"
    assert "stock" in pruner.layout_reason
    model, inputs = zoo.build("bert")
    bert = GradNASPruner(model)
    bert.discover(inputs)
    assert bert.layout == "per_layer"
    assert "heads" in bert.layout_reason
    ffn_only = GradNASPruner(model, rules={"*attention*": None})
    ffn_only.discover(inputs)
    assert ffn_only.layout == "stock"


def test_masked_tries_a_plan_and_leaves_the_model(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    pruner.score([inputs])
    plan = pruner.plan({"params": "85%"})
    before = logits_of(pruner.model, inputs)
    with pruner.masked(plan):
        assert not torch.equal(logits_of(pruner.model, inputs), before)
    assert torch.equal(logits_of(pruner.model, inputs), before)


def test_scores_and_plans_round_trip(llama: tuple[GradNASPruner, dict], tmp_path: Any) -> None:
    pruner, inputs = llama
    scores = pruner.score([inputs], file=tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.metadata["method"] == "tempered"
    assert again.values.keys() == scores.values.keys()
    other = GradNASPruner(pruner.model)
    other.discover(inputs)
    other.use_scores(again)
    plan = other.plan({"params": "85%"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == pruner.plan({"params": "85%"})


def test_rules_keep_what_they_say(llama: tuple[GradNASPruner, dict]) -> None:
    model, inputs = llama[0].model, llama[1]
    pruner = GradNASPruner(
        model,
        layout="per_layer",
        rules={"*": {"min": 1}, "*layers.1*": None, "*mlp": {"multiple": 16}},
    )
    pruner.score([inputs])
    plan = pruner.plan({"params": "80%"})
    assert all(plan.kept.values())
    assert len(plan.kept["model.layers.1.self_attn:heads"]) == 4
    assert all(len(u) % 16 == 0 for n, u in plan.kept.items() if n.endswith("neurons"))


@pytest.mark.parametrize("word", ["score", "search", "layout"])
def test_unknown_choices_are_refused(word: str) -> None:
    model, _ = zoo.build("bert")
    with pytest.raises(PlanError, match=f"{word}='best' is not known; choose one of"):
        GradNASPruner(model, **{word: "best"})


def test_a_wrong_order_names_the_missing_call(
    llama: tuple[GradNASPruner, dict], tmp_path: Any
) -> None:
    pruner, inputs = llama
    for read in ("structure", "costs", "totals"):
        with pytest.raises(OrderError, match=r"call discover\(batch\) or score"):
            getattr(pruner, read)
    pruner.discover(inputs)
    with pytest.raises(OrderError, match=r"call score\(dataloader\) or use_scores"):
        pruner.plan({"params": "80%"})
    with pytest.raises(OrderError, match=r"call apply\(plan\) first"):
        pruner.save_pretrained(tmp_path / "x")


@pytest.mark.leaves_state
def test_what_is_no_folder_or_tokenizer_is_refused(
    llama: tuple[GradNASPruner, dict], tmp_path
) -> None:
    pruner, inputs = llama
    pruner.prune([inputs], {"params": "85%"})
    for folder in (None, "", 3):
        with pytest.raises(CheckpointError, match=r"^directory=.*: needed the path of a folder"):
            pruner.save_pretrained(folder)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"^processing_class='bert': found a name, needed"):
        pruner.save_pretrained(tmp_path / "x", "bert")
    file = tmp_path / "data.tsv"
    file.write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is a file, needed a folder"):
            pruner.save_pretrained(file, overwrite=overwrite)
    assert file.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.leaves_state
def test_a_second_cut_by_the_same_pruner_is_refused(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    plan = pruner.prune([inputs], {"params": "85%"})
    left, scores = numel(pruner.model), pruner.scores
    calls = {
        "apply": lambda: pruner.apply(plan),
        "masked": lambda: pruner.masked(plan),
        "score": lambda: pruner.score([inputs]),
        "discover": lambda: pruner.discover(inputs),
        "prune": lambda: pruner.prune([inputs], {"params": "80%"}),
    }
    for step, call in calls.items():
        with pytest.raises(PlanError, match=f"^{step}: this model was cut already.*a new GradNASP"):
            call()
    assert numel(pruner.model) == left
    assert pruner.scores is scores


def test_bad_input_is_refused_before_scoring(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    before = numel(pruner.model)
    with pytest.raises(DataError, match="yields no batch"):
        pruner.prune([], {"params": "80%"})
    with pytest.raises(DataError, match="batch 0 is a tuple"):
        pruner.prune([(1, 2)], {"params": "80%"})
    long = {name: value.repeat(1, 6) for name, value in inputs.items()}
    with pytest.raises(DataError, match="72 tokens, but LlamaConfig has max_position_embeddings"):
        pruner.prune([inputs, long], {"params": "80%"})
    with pytest.raises(BudgetError, match="cannot be reached in layout 'stock'; the lowest is"):
        pruner.prune([inputs], {"params": "1%"})
    with pytest.raises(BudgetError, match="50%"):
        pruner.prune([inputs], {"params": 0.5})
    with pytest.raises(BudgetError):
        pruner.prune([inputs], {"params": "120%"})
    with pytest.raises(StructureError, match=r"\['\*nowhere\*'\] \(--exclude\) matches no axis"):
        GradNASPruner(pruner.model, rules={"*nowhere*": None}).score([inputs])
    with pytest.raises(PlanError, match="give None to keep"):
        GradNASPruner(pruner.model, rules={"*": {"most": 3}})
    for rules in ([("*", None)], "*", {3: None}, {"*": {"min": True}}, {"*": {"multiple": 10**30}}):
        with pytest.raises(PlanError, match="rules"):
            GradNASPruner(pruner.model, rules=rules)
    assert pruner._scores is None
    assert numel(pruner.model) == before


def test_scores_of_another_model_are_refused(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    scores = pruner.score([inputs])
    model, inputs = zoo.build("llama", seed=1)
    other = GradNASPruner(model)
    other.discover(inputs)
    with pytest.raises(ScoresError):
        other.use_scores(scores)


@pytest.mark.leaves_state
def test_an_existing_target_needs_overwrite(
    llama: tuple[GradNASPruner, dict], tmp_path: Any
) -> None:
    pruner, inputs = llama
    pruner.prune([inputs], {"params": "85%"})
    pruner.save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match="overwrite"):
        pruner.save_pretrained(tmp_path / "x")
    pruner.save_pretrained(tmp_path / "x", overwrite=True)


@pytest.mark.parametrize("search", ["lagrangian", "binary"])
@pytest.mark.parametrize("score", ["fisher", "gradnas", "taylor", "magnitude", "random"])
@pytest.mark.parametrize("family", spread(["bert", "qwen2", "t5"]))
def test_every_score_and_search_plans(family: str, score: str, search: str) -> None:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, score=score, search=search)
    scores = pruner.score([inputs])
    assert all((values >= 0).all() and values.any() for values in scores.values.values())
    plan = pruner.plan({"params": "80%"})
    assert plan.costs["params"] <= plan.budgets[0].limit
    assert (plan.score, plan.search) == (score, search)


def test_a_generator_of_batches_is_read_once(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    scores = pruner.score(batch for batch in [inputs, inputs])
    assert scores.metadata["examples"] == "8"


@pytest.mark.leaves_state
def test_trainers_own_checkpoints_load(tmp_path: Any) -> None:
    model, inputs = zoo.build("bert", dtype=torch.float32)
    GradNASPruner(model).prune([inputs], {"params": "70%"})
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(len(inputs["labels"]))]
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 2}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    again = type(model).from_pretrained(tmp_path / "tuned").eval()
    model.eval()
    assert (logits_of(again, inputs) - logits_of(model, inputs)).abs().max() <= 1e-5
    assert (tmp_path / "tuned" / "modeling_gradnas.py").is_file()


@pytest.mark.leaves_state
def test_a_plan_that_the_class_cannot_express_changes_nothing() -> None:
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model, layout="stock")
    pruner.discover(inputs)
    kept = {a.name: tuple(range(a.size)) for a in pruner.structure.axes}
    kept["model.layers.1.mlp:neurons"] = (1, 2, 3)
    plan = Plan(kept=kept, sizes={a.name: a.size for a in pruner.structure.axes}, layout="stock")
    before, config = numel(model), model.config.to_dict()
    with pytest.raises(PlanError):
        pruner.apply(plan)
    assert numel(model) == before
    assert model.config.to_dict() == config
    with pytest.raises(PlanError, match="layout 'other' of the plan"):
        pruner.apply(Plan(kept=kept, sizes=plan.sizes, layout="other"))


def test_a_plan_of_another_model_is_refused(llama: tuple[GradNASPruner, dict]) -> None:
    pruner, inputs = llama
    pruner.score([inputs])
    plan = pruner.plan({"params": "85%"})
    model, inputs = zoo.build("llama", intermediate_size=128)
    other = GradNASPruner(model)
    other.discover(inputs)
    for use in (other.apply, other.masked):
        with pytest.raises(PlanError, match="counts 96 units, this model has 128"):
            use(plan)


@pytest.mark.leaves_state
def test_the_document_names_the_plan_that_was_applied(
    llama: tuple[GradNASPruner, dict], tmp_path: Any
) -> None:
    pruner, inputs = llama
    plan = pruner.prune([inputs], {"params": "85%"})
    folder = pruner.save_pretrained(tmp_path / "x")
    document = json.loads((folder / "gradnas.json").read_text())
    assert Plan.from_dict(document["plan"]) == plan


@pytest.mark.leaves_state
def test_half_precision_by_cast_saves(tmp_path: Any) -> None:
    model, inputs = zoo.build("llama", dtype=torch.float32)
    model.to(torch.bfloat16)
    pruner = GradNASPruner(model)
    pruner.prune([inputs], {"params": "85%"})
    pruner.save_pretrained(tmp_path / "x")


@pytest.mark.parametrize("name", ["BartForSequenceClassification", "BartForConditionalGeneration"])
@pytest.mark.leaves_state
def test_heads_that_look_for_the_last_token(name: str) -> None:
    config = transformers.BartConfig(**zoo.FAMILIES["bart"].kwargs, num_labels=3)
    model = getattr(transformers, name)(config).eval()
    ids = torch.randint(3, 100, (4, 40))
    ids[:, -1] = config.eos_token_id
    labels = torch.tensor([0, 1, 2, 0]) if "Classification" in name else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    plan = GradNASPruner(model).prune([batch], {"params": "90%"})
    assert numel(model) == plan.costs["params"]


def test_only_transformers_models_are_taken() -> None:
    with pytest.raises(StructureError, match="found a Linear, needed a Transformers"):
        GradNASPruner(torch.nn.Linear(2, 2))
