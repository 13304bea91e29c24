"""Files of converted and cut models: what restore brings back, and what it refuses."""

import copy
import json
import struct
import subprocess
import sys

import networks
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_gradnas import nas
from hf_gradnas.errors import CheckpointError, GradNASWarning
from hf_gradnas.nas.files import FORMAT_VERSION, KEY
from hf_gradnas.nas.hparams import space_of

ONE = {
    **{f"nn.Conv{d}d": {"channel_divisor": 1} for d in (1, 2, 3)},
    **{f"nn.ConvTranspose{d}d": {"channel_divisor": 1} for d in (1, 2, 3)},
    **{f"nn.BatchNorm{d}d": {"feature_divisor": 1} for d in (1, 2, 3)},
    **{f"nn.InstanceNorm{d}d": {"feature_divisor": 1} for d in (1, 2, 3)},
    "nn.SyncBatchNorm": {"feature_divisor": 1},
    "nn.GroupNorm": {"channel_divisor": 1},
    "nn.Linear": {"feature_divisor": 1},
    "nn.LayerNorm": {"feature_divisor": 1},
}


def plain_loss(output, batch):
    output = output["masks"] if isinstance(output, dict) else output
    return (output * 1.3).sin().mean() + output.square().mean()


def prune(model, args, constraints, mode=ONE, loss=plain_loss, batch=None):
    config = {
        "data_loader": [(args,) if batch is None else (batch,)],
        "collect_func": lambda given: given[0],
        "loss_func": loss,
        "verbose": False,
    }
    return nas.prune(model, [("gradnas", mode)], constraints, args, config)


def result(model, args):
    with torch.no_grad():
        output = model(*args)
    return output["masks"] if isinstance(output, dict) else output


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def edited(file, change, target):
    """A copy of a saved file whose state is changed."""
    with safe_open(file, framework="pt") as opened:
        state = json.loads(opened.metadata()[KEY])
    found = change(state)
    save_file(
        load_file(file), target, metadata={KEY: json.dumps(state if found is None else found)}
    )


@pytest.fixture
def saved(tmp_path):
    """A cut network, its inputs and its file."""
    model, args = networks.build("conv2d")
    prune(model, args, {"flops": "70%"})
    nas.save(model, tmp_path / "net.pt")
    return model, args, tmp_path / "net.pt"


# --- plain modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_cut_network_is_restored_bit_by_bit(name, tmp_path):
    model, args = networks.build(name)
    prune(model, args, {"flops": "70%"})
    nas.save(model, tmp_path / "net")
    fresh, _ = networks.build(name, seed=5)
    assert nas.restore(fresh, tmp_path / "net") is fresh
    assert torch.equal(result(fresh, args), result(model, args))
    assert is_unchanged(fresh, state_of(model))
    with safe_open(tmp_path / "net", framework="pt") as opened:
        assert json.loads(opened.metadata()[KEY])["format_version"] == FORMAT_VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_network_that_was_cut_twice_is_restored_into_a_fresh_one(tmp_path):
    model, args = networks.build("residual")
    first = prune(model, args, {"flops": "80%"})[1]
    second = prune(model, args, {"flops": "70%"})[1]
    assert second["original"]["flops"] == first["best"]["constraints"]["flops"]
    nas.save(model, tmp_path / "net")
    fresh = nas.restore(networks.build("residual", seed=5)[0], tmp_path / "net")
    assert torch.equal(result(fresh, args), result(model, args))
    # A restored model goes on where the saved one stood.
    third = [prune(m, args, {"flops": "80%"})[1]["best"] for m in (model, fresh)]
    assert third[0] == third[1]
    nas.save(fresh, tmp_path / "net")
    again = nas.restore(networks.build("residual", seed=6)[0], tmp_path / "net")
    assert torch.equal(result(again, args), result(model, args))


def test_a_converted_network_is_searchable_again_after_restore(tmp_path):
    model, args = networks.build("linears")
    mode = {"nn.Linear": {"features_ratio": (0.5,)}}
    nas.convert(model, {"gradnas": mode})
    nas.save(model, tmp_path / "net")
    fresh = nas.restore(networks.build("linears", seed=5)[0], tmp_path / "net")
    assert is_unchanged(fresh, state_of(model))
    assert space_of(fresh).config == nas.GradNASConfig(**mode)
    config = {"data_loader": [args], "loss_func": plain_loss, "verbose": False}
    _, history = nas.search(fresh, {"flops": "80%"}, args, config)
    assert set(history["best"]["config"].values()) <= {4, 8}


def test_a_network_that_was_never_converted_can_be_saved_too(tmp_path):
    model, args = networks.build("convs")
    nas.save(model, tmp_path / "net")
    fresh = nas.restore(networks.build("convs", seed=5)[0], tmp_path / "net")
    assert torch.equal(result(fresh, args), result(model, args))
    assert space_of(fresh) is None


def test_cut_buffers_outside_the_state_dict_and_tied_weights_come_back(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
            self.second.weight = self.first.weight
            self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
            self.norm._non_persistent_buffers_set.add("running_var")

        def forward(self, x):
            return self.head(self.norm(self.first(x) + torch.tanh(self.second(x))))

    def make(seed):
        torch.manual_seed(seed)
        model = Net().double().eval()
        model.norm.running_var.uniform_(0.5, 1.5)
        return model

    model, x = make(0), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert "norm.running_var" not in model.state_dict()
    prune(model, (x,), {"flops": "70%"})
    assert model.norm.running_var.numel() < 6
    nas.save(model, tmp_path / "net")
    fresh = nas.restore(make(1), tmp_path / "net")
    assert fresh.second.weight is fresh.first.weight
    assert torch.equal(fresh(x), model(x))
    assert "second.weight" not in load_file(tmp_path / "net")


def test_flags_and_dtype_of_the_fresh_network_stay(saved):
    file = saved[2]
    fresh = networks.build("conv2d", dtype=torch.float32)[0].train()
    fresh[0].weight.requires_grad_(False)
    nas.restore(fresh, file)
    assert fresh.training
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_a_file_is_restored_in_a_new_process(saved, tmp_path):
    model, args, file = saved
    torch_free = tmp_path / "input"
    save_file({"x": args[0], "y": result(model, args)}, torch_free)
    code = f"""
import sys
sys.path.insert(0, {str(networks.__file__.rpartition("/")[0])!r})
import networks, torch
from safetensors.torch import load_file
import hf_gradnas.nas as mtp
given = load_file({str(torch_free)!r})
torch.set_num_threads(1)
model = mtp.restore(networks.build("conv2d", seed=9)[0], {str(file)!r})
assert torch.equal(model(given["x"]), given["y"])
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# --- Transformers models --------------------------------------------------------------------------


@pytest.mark.leaves_state  # T5: layers with a position bias of their own keep a hook
@pytest.mark.parametrize(
    ("name", "mode", "limit"),
    [
        ("bert", {"nn.Linear": {"feature_divisor": 8}}, "80%"),
        ("llama", {"nn.Linear": {"feature_divisor": 8}}, "80%"),
        ("t5", {"nn.Linear": {"feature_divisor": 8}}, "80%"),
        ("albert", {"nn.Linear": {"feature_divisor": 8}}, "80%"),
        ("gpt2", {"nn.Linear": None, "hf.Attention": {"n_heads_ratio": (0.5,)}}, "95%"),
    ],
)
def test_a_cut_transformers_model_is_restored_bit_by_bit(name, mode, limit, tmp_path):
    model, batch = zoo.build(name, dtype=torch.float64)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    dummy = batch if name == "t5" else {k: v for k, v in batch.items() if k != "labels"}
    prune(model, dummy, {"params": limit}, mode, lambda output, given: output.loss, batch)
    nas.save(model, tmp_path / "model")
    assert nas.restore(fresh, tmp_path / "model") is fresh
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert is_unchanged(fresh, state_of(model))
    assert fresh.config.to_dict() == model.config.to_dict()
    fresh.save_pretrained(tmp_path / "folder")
    loaded = type(model).from_pretrained(
        tmp_path / "folder", dtype=torch.float64, attn_implementation="eager"
    )
    fresh.set_attn_implementation("eager")
    assert torch.equal(loaded(**batch).logits, fresh(**batch).logits)


def test_a_uniform_result_is_stock_and_needs_no_record(tmp_path):
    model, batch = zoo.build("bert", dtype=torch.float64)
    fresh, dummy = copy.deepcopy(model), {k: v for k, v in batch.items() if k != "labels"}
    mode = {"nn.Linear": {"features_ratio": (0.5,), "feature_divisor": 1}, "hf.Attention": None}
    loss = lambda output, given: output.loss  # noqa: E731 - as users write it
    with pytest.warns(GradNASWarning, match=r"params: 83% is near the lowest that can be reached"):
        _, history = prune(model, dummy, {"params": "83%"}, mode, loss, batch)
    assert {v for k, v in history["best"]["config"].items() if "dense" in k} == {48}
    assert model.config.intermediate_size == 48
    assert "gradnas" not in model.config.to_dict()
    assert type(model) is BertForSequenceClassification
    nas.save(model, tmp_path / "model")
    nas.restore(fresh, tmp_path / "model")
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    model.save_pretrained(tmp_path / "folder")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "folder", dtype=torch.float64
    )
    assert loaded.config.intermediate_size == 48


def test_a_converted_transformers_model_is_searchable_again_after_restore(tmp_path):
    model, batch = zoo.build("bert", dtype=torch.float64)
    fresh = copy.deepcopy(model)
    nas.convert(model, {"gradnas": {"hf.Attention": None}})
    nas.save(model, tmp_path / "model")
    nas.restore(fresh, tmp_path / "model")
    assert space_of(fresh).config == space_of(model).config
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_the_generation_config_of_the_fresh_model_stays(tmp_path):
    model, batch = zoo.build("llama", dtype=torch.float64)
    fresh, dummy = copy.deepcopy(model), {k: v for k, v in batch.items() if k != "labels"}
    fresh.generation_config.max_new_tokens = 77
    mode = {"nn.Linear": {"feature_divisor": 8}}
    prune(model, dummy, {"params": "80%"}, mode, lambda output, given: output.loss, batch)
    nas.save(model, tmp_path / "model")
    nas.restore(fresh, tmp_path / "model")
    assert fresh.generation_config.max_new_tokens == 77


# --- what is refused ------------------------------------------------------------------------------


def damage(file):
    file.write_bytes(file.read_bytes()[:-8])


def foreign(file):
    save_file({"x": torch.ones(2)}, file, metadata={"format": "pt"})


def not_json(file):
    save_file(load_file(file), file.with_suffix(".new"), metadata={KEY: "{"})
    file.with_suffix(".new").replace(file)


def with_state(change):
    def apply(file):
        edited(file, change, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    return apply


def huge_header(file):
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (damage, "cannot be read"),
        (huge_header, "cannot be read"),
        (foreign, "holds no hf_gradnas state; give a file that save"),
        (not_json, "cannot be read"),
        (with_state(lambda state: []), "cannot be read"),
        (with_state(lambda state: {}), "cannot be read"),
        (
            with_state(lambda state: state.update(format_version=2)),
            "has format_version 2, this hf_gradnas reads 1; upgrade hf_gradnas",
        ),
        (with_state(lambda state: state.pop("config") and None), "does not fit this Sequential"),
        (
            with_state(lambda state: state["config"].update({"nn.Linear": {"*": {"x": 1}}})),
            "does not fit this Sequential",
        ),
        (
            with_state(lambda state: state["metadata"]["record"].update(format_version=2)),
            "does not fit this Sequential",
        ),
        (
            with_state(lambda state: state["metadata"]["record"]["modules"]["0"].clear()),
            r"does not fit this Sequential \(.*build the model that was saved",
        ),
        (
            with_state(lambda state: state["metadata"].update(architecture="ResNet")),
            "the file is of a ResNet, the model is a Sequential; build the model that was saved",
        ),
        (with_state(lambda state: state["aliases"].update(x="y")), "does not fit this Sequential"),
        (
            with_state(lambda state: state["aliases"].update({"7.x": "0.weight"})),
            r"\(7\.x: found \[.*\], needed none\)",
        ),
    ],
)
def test_files_that_cannot_be_used_change_nothing(saved, spoil, message):
    file = saved[2]
    fresh, _ = networks.build("conv2d", seed=5)
    before, shown = state_of(fresh), str(fresh)
    spoil(file)
    with pytest.raises(CheckpointError, match=message):
        nas.restore(fresh, file)
    assert is_unchanged(fresh, before)
    assert str(fresh) == shown
    assert "gradnas_record" not in vars(fresh)


@pytest.mark.parametrize("name", ["convs", "reference", "conv3d"])
def test_a_model_of_other_sizes_is_refused_unchanged(saved, name):
    fresh, args = networks.build(name, seed=5)
    before, expected = state_of(fresh), result(fresh, args)
    with pytest.raises(CheckpointError, match="does not fit this Sequential"):
        nas.restore(fresh, saved[2])
    assert is_unchanged(fresh, before)
    assert torch.equal(result(fresh, args), expected)


def test_a_transformers_model_of_other_sizes_or_class_is_refused_unchanged(tmp_path):
    model, batch = zoo.build("bert", dtype=torch.float64)
    dummy = {k: v for k, v in batch.items() if k != "labels"}
    fresh = copy.deepcopy(model)
    mode = {"nn.Linear": {"feature_divisor": 8}}
    prune(model, dummy, {"params": "80%"}, mode, lambda output, given: output.loss, batch)
    nas.save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="is of a BertForSequenceClassification, the model"):
        nas.restore(fresh.bert, tmp_path / "model")

    def other_head(state):
        state["metadata"]["model_config"].pop("gradnas")

    before, parts = state_of(fresh), dict(fresh.named_modules())
    edited(tmp_path / "model", other_head, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"weight: found \[.*\], needed \[.*\]"):
        nas.restore(fresh, tmp_path / "other")
    assert is_unchanged(fresh, before)
    assert dict(fresh.named_modules()) == parts
    with pytest.raises(CheckpointError, match="is of a BertForSequenceClassification, the model"):
        nas.restore(networks.build("convs")[0], tmp_path / "model")


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    model, _ = networks.build("convs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "file" / "inside"):
        with pytest.raises(CheckpointError, match=r"cannot be written .* choose another path"):
            nas.save(model, path)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
    assert not list((tmp_path / "folder").iterdir())


def test_save_makes_folders_and_replaces_a_file(tmp_path):
    file = tmp_path / "new" / "folder" / "net"
    for seed in (0, 1):
        model, args = networks.build("convs", seed=seed)
        nas.save(model, str(file))
    fresh = nas.restore(networks.build("convs", seed=7)[0], str(file))
    assert torch.equal(result(fresh, args), result(model, args))


def test_save_replaces_only_what_save_wrote(tmp_path):
    model, _ = networks.build("convs")
    weights, notes = tmp_path / "model.safetensors", tmp_path / "notes.txt"
    save_file({"a": torch.ones(2)}, weights, metadata={"format": "pt"})
    notes.write_text("mine")
    before = weights.read_bytes()
    for file in (weights, notes, tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be written \(it .*is as it was"):
            nas.save(model, file)
    assert weights.read_bytes() == before
    assert notes.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, notes.name}


def test_a_saved_file_has_the_mode_of_the_umask(tmp_path):
    (tmp_path / "other").touch()
    nas.save(networks.build("convs")[0], tmp_path / "net")
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "other").stat().st_mode
