"""A repair as data: in a file, in a model for a while, and in a model that is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from repair_by_hand import repair_by_hand
from safetensors.torch import load_file, save_file

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.errors import (
    CutError,
    DataError,
    GradNASWarning,
    PlanError,
    RepairError,
    StructureError,
)
from hf_gradnas.repair import Repair, Site
from hf_gradnas.repair.repairs import (
    attempted,
    check_repair,
    check_unsharded,
    install_repair,
    is_repair,
    plan_digest,
    repaired,
)
from hf_gradnas.running.processes import Processes

FAMILIES = ["bert", "gpt2", "llama", "gpt_neox", "t5", "bart", "vit", "whisper"]


def planned(family: str, *, layout: str = "per_layer", dtype: torch.dtype = torch.float64):
    """A pruner, a plan that prunes in every kind of axis, and inputs."""
    model, inputs = zoo.build(family, dtype=dtype)
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(inputs)
    kept = {axis.name: tuple(range(-(-axis.size // 2))) for axis in pruner.structure.axes}
    sizes = {axis.name: axis.size for axis in pruner.structure.axes}
    return pruner, Plan(kept=kept, sizes=sizes, layout=layout), inputs


def logits_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad(), zoo.float64_throughout():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def llama():
    return planned("llama")


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.leaves_state
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in zoo.FAMILIES])
def test_masked_and_repaired_is_cut_and_repaired(family: str) -> None:
    pruner, plan, inputs = planned(family)
    repair = repair_by_hand(pruner, plan)
    assert repair.tensors
    whole = logits_of(pruner.model, inputs)
    with pruner.masked(plan):
        masked = logits_of(pruner.model, inputs)
    with pruner.masked(plan, repair):
        wanted = logits_of(pruner.model, inputs)
    assert (wanted - masked).abs().max() > 1e-6
    assert torch.equal(logits_of(pruner.model, inputs), whole)
    pruner.apply(plan, repair)
    assert (logits_of(pruner.model, inputs) - wanted).abs().max() < 1e-10


@pytest.mark.leaves_state
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_repaired_model_loads_again_and_its_record_says_so(layout: str, tmp_path: Path) -> None:
    pruner, plan, inputs = planned("llama", layout=layout, dtype=torch.float32)
    pruner.apply(plan, repair_by_hand(pruner, plan))
    expected = logits_of(pruner.model, inputs)
    pruner.save_pretrained(tmp_path / "cut")
    again = type(pruner.model).from_pretrained(tmp_path / "cut", attn_implementation="eager").eval()
    assert (logits_of(again, inputs) - expected).abs().max() <= 1e-5
    record = json.loads((tmp_path / "cut" / "gradnas.json").read_text(encoding="utf-8"))["repair"]
    assert record["is_accepted"]
    assert record["method"] == "least squares"
    assert (record["kl_before"], record["kl_after"], record["examples"]) == (0.3, 0.1, 64)
    assert record["plan"] == plan_digest(plan)
    assert record["sites"][0]["module"] == "model.layers.0.self_attn.o_proj"
    assert "tensors" not in record
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert "the KL divergence from the original's predictions fell from 0.3 to 0.1" in card


@pytest.mark.leaves_state
def test_what_becomes_of_the_model_does_not_reach_the_repair() -> None:
    pruner, plan, _ = planned("llama")
    again, _, _ = planned("llama")  # a repair belongs to the weights that it was made from
    repair = repair_by_hand(pruner, plan)
    before = {name: tensor.clone() for name, tensor in repair.tensors.items()}
    with torch.no_grad():
        with pruner.masked(plan, repair):
            for parameter in pruner.model.parameters():
                parameter.mul_(2)
        for parameter in again.apply(plan, repair).parameters():
            parameter.zero_()
    assert all(torch.equal(repair.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.leaves_state
def test_a_repair_that_was_not_accepted_changes_nothing() -> None:
    pruner, plan, inputs = planned("bert")
    nothing = replace(repair_by_hand(pruner, plan), tensors={}, kl_after=0.4)
    assert not nothing.is_accepted
    with pruner.masked(plan):
        wanted = logits_of(pruner.model, inputs)
    with pruner.masked(plan, nothing):
        assert torch.equal(logits_of(pruner.model, inputs), wanted)
    pruner.apply(plan, nothing)
    assert (logits_of(pruner.model, inputs) - wanted).abs().max() < 1e-10


def test_weights_come_back_after_an_error(llama) -> None:
    pruner, plan, inputs = llama
    before = logits_of(pruner.model, inputs)

    def fail() -> None:
        with pruner.masked(plan, repair_by_hand(pruner, plan)):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(logits_of(pruner.model, inputs), before)


def test_a_cut_that_fails_before_it_begins_leaves_the_old_weights(llama, monkeypatch) -> None:
    pruner, plan, inputs = llama
    before = logits_of(pruner.model, inputs)

    def fail(*_: object, **__: object) -> None:
        raise CutError("stop")

    monkeypatch.setattr("hf_gradnas.checkpoint.apply.cut", fail)
    with pytest.raises(CutError, match="stop"):
        pruner.apply(plan, repair_by_hand(pruner, plan))
    assert torch.equal(logits_of(pruner.model, inputs), before)


def test_install_is_for_good() -> None:
    pruner, plan, inputs = planned("bert")
    repair, model = repair_by_hand(pruner, plan), pruner.model
    with repaired(model, repair):
        wanted = logits_of(model, inputs)
    install_repair(model, repair)
    assert torch.equal(logits_of(model, inputs), wanted)


# --- of another plan or model ---------------------------------------------------------------------


def test_a_repair_of_another_plan_is_refused_and_changes_nothing(llama) -> None:
    pruner, plan, inputs = llama
    repair = repair_by_hand(pruner, plan)
    name = next(name for name in plan.kept if name.endswith("neurons"))
    other = replace(plan, kept={**plan.kept, name: plan.kept[name][1:]})
    before = logits_of(pruner.model, inputs)
    for call in (pruner.apply, pruner.masked):
        with pytest.raises(RepairError, match=r"made for the plan .* weights fit one plan only"):
            call(other, repair)
    assert torch.equal(logits_of(pruner.model, inputs), before)
    assert not pruner._applied


def test_a_repair_that_does_not_fit_the_model_is_refused(llama) -> None:
    pruner, plan, _ = llama
    repair = repair_by_hand(pruner, plan)
    name, tensor = next(iter(repair.tensors.items()))
    for tensors, found in (
        ({name: tensor[:-1]}, r"the model has the shape \(64, 64\); use it with the whole model"),
        ({"model.nowhere": tensor}, "the model has no such parameter"),
    ):
        with pytest.raises(RepairError, match=found):
            pruner.apply(plan, replace(repair, tensors=tensors))
    with pytest.raises(RepairError, match=r"found a str, needed what pruner\.repair"):
        pruner.masked(plan, "auto")  # type: ignore[arg-type]
    check_repair(repair, pruner.model, plan)


def test_a_repair_of_another_model_of_the_same_shapes_is_refused(llama) -> None:
    pruner, plan, inputs = llama
    repair = repair_by_hand(pruner, plan)
    other = GradNASPruner(zoo.build("llama", seed=1)[0], layout="per_layer")
    other.discover(inputs)
    before = logits_of(other.model, inputs)
    for call in (other.masked, other.apply):
        with pytest.raises(RepairError, match=r"from other weights \(fingerprint .*repair this"):
            call(plan, repair)
    assert torch.equal(logits_of(other.model, inputs), before)
    assert not other._applied
    pruner.masked(plan, repair)
    with other.masked(plan, replace(repair, tensors={})):  # changes nothing, of whatever model
        pass


@pytest.mark.leaves_state
def test_after_the_cut_there_is_nothing_to_repair() -> None:
    pruner, plan, _ = planned("bert")
    repair = repair_by_hand(pruner, plan)
    pruner.apply(plan)
    with pytest.raises(PlanError, match=r"^apply: this model was cut already"):
        pruner.apply(plan, repair)


def test_a_model_in_shards_is_refused_where_the_weights_must_be_whole(llama, monkeypatch) -> None:
    pruner, plan, _ = llama
    monkeypatch.setattr("hf_gradnas.repair.repairs.is_sharded", lambda _: True)
    with pytest.raises(StructureError, match=r"^masked: LlamaForCausalLM is sharded .* omit it"):
        pruner.masked(plan, repair_by_hand(pruner, plan))
    with pytest.raises(StructureError, match=r"or omit it \(repair='none'\)"):
        check_unsharded(pruner.model, "repair")


@pytest.mark.parametrize("error", [RepairError, StructureError])
def test_an_attempt_that_fails_is_a_warning(error: type[Exception]) -> None:
    def fail() -> Repair:
        raise error("layer 3: stop.")

    with pytest.warns(GradNASWarning, match="pruned without a repair. layer 3: stop"):
        assert attempted(fail, Processes()) is None


def test_what_nobody_foresaw_is_a_warning_for_one_process_alone() -> None:
    def fail() -> Repair:
        raise RuntimeError("shapes\ndo not match")

    with pytest.warns(GradNASWarning, match=r"failed \(RuntimeError: shapes\); report it with"):
        assert attempted(fail, Processes()) is None
    several = Processes()
    several.count = 2
    with pytest.raises(RuntimeError, match="shapes"):
        attempted(fail, several)


def test_an_error_that_is_not_the_repairs_is_one() -> None:
    def fail() -> Repair:
        raise DataError("dataloader: yields no batch.")

    with pytest.raises(DataError, match="no batch"):
        attempted(fail, Processes())


# --- in a file ------------------------------------------------------------------------------------


@pytest.fixture
def repair() -> Repair:
    sites = (
        Site("a.b", 40, 7, 0.1, 0.5, 0.2),
        Site("a.c", 40, 0, reason="nothing is left of it"),  # errors are not known
    )
    tensors = {"a.b.weight": torch.randn(3, 4), "a.b.bias": torch.randn(3)}
    return Repair(tensors, sites, "a plan", "a model", 0.3, 0.1, 64)


def test_a_repair_round_trips(repair: Repair, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    repair.save(file)
    again = Repair.load(file)
    assert again.tensors.keys() == repair.tensors.keys()
    assert all(torch.equal(again.tensors[name], repair.tensors[name]) for name in repair.tensors)
    assert again.record() == repair.record()
    assert is_repair(file)
    repair.save(file)  # its own kind is replaced


def test_a_record_is_plain_json(repair: Repair) -> None:
    record = json.loads(json.dumps(repair.record(), allow_nan=False))
    assert record["sites"][1]["error_before"] is None
    assert record["sites"][1]["reason"] == "nothing is left of it"
    assert record["is_accepted"]


def test_a_damaged_file_is_refused(repair: Repair, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    repair.save(file)
    whole = file.read_bytes()
    for content in (b"", whole[:-5], b"nothing"):
        file.write_bytes(content)
        with pytest.raises(RepairError, match=r"cannot be read .*; it is missing, damaged or no"):
            Repair.load(file)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RepairError, match="was changed since it was written"):
        Repair.load(file)
    with pytest.raises(RepairError, match="cannot be read"):
        Repair.load(tmp_path / "missing")
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(RepairError, match="cannot be read"):
        Repair.load(file)


def test_other_files_are_not_replaced(repair: Repair, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(RepairError, match=r"cannot be written .* was there is as it was"):
        repair.save(file)
    assert load_file(file)["a"].shape == (2,)
    assert not is_repair(file)
    assert not is_repair(tmp_path / "missing")
