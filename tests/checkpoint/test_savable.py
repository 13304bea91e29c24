"""What cannot be saved and loaded is refused before any work; what can is never refused."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from families import spread
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_gradnas import GradNASPruner
from hf_gradnas.checkpoint.savable import check_savable
from hf_gradnas.checkpoint.twin import kernels_of
from hf_gradnas.errors import CheckpointError, DataError, StructureError

pytestmark = pytest.mark.leaves_state  # the models are changed on purpose
Change = Callable[[Any], Any]


def llama(**options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    return zoo.build("llama", dtype=torch.float32, **options)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a check must leave as it is."""
    modules = dict(model.named_modules())
    return {
        "tensors": {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()},
        "marks": {n: dict(vars(p)) for n, p in model.named_parameters()},
        "flags": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "training": [module.training for module in modules.values()],
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        "config": repr(vars(model.config)),
        "random": torch.get_rng_state().tolist(),
    }


def refused(model: nn.Module, batch: Any, message: str, error: type[Exception]) -> None:
    """Check that a model is refused, and that nothing of it changed."""
    before = state_of(model)
    with pytest.raises(error, match=message):
        check_savable(model, batch)
    assert state_of(model) == before


def mlp(model: Any) -> Any:
    return model.model.layers[0].mlp


def weight(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def set_weight(module: Any, tensor: torch.Tensor) -> None:
    module.weight = weight(tensor)


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


class Numbers(torch.Tensor):
    """A tensor of another class, as torchao has them."""


# --- names and shapes -----------------------------------------------------------------------------

SHAPES: dict[str, tuple[Change, str]] = {
    "head": (
        lambda m: setattr(m, "lm_head", nn.Linear(64, 7, bias=False)),
        r"lm_head\.weight: has shape \[7, 64\].* builds \[160, 64\].*config\.vocab_size = 7",
    ),
    "head of two layers": (
        lambda m: setattr(m, "lm_head", nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 160))),
        r"lm_head\.0: .* found lm_head\.0\.weight \[8, 64\].* needed lm_head\.weight \[160, 64\]",
    ),
    "embeddings": (
        lambda m: m.set_input_embeddings(nn.Embedding(170, 64)),
        r"embed_tokens\.weight: has shape \[170, 64\].* set model\.config\.vocab_size = 170",
    ),
    "layers taken out": (
        lambda m: setattr(m.model, "layers", m.model.layers[:2]),
        r"model\.layers\.2\.\S+: the model is not what .* found nothing more .* needed model\.lay",
    ),
    "config that was changed": (
        lambda m: setattr(m.config, "num_attention_heads", 8),
        r"q_proj\.weight: has shape \[64, 64\], but LlamaForCausalLM builds \[128, 64\]",
    ),
    "added parameter": (
        lambda m: m.register_parameter("soft_prompt", nn.Parameter(torch.ones(3))),
        r"found soft_prompt \[3\] \(1 in all\), needed nothing more .* Take out what was added",
    ),
    "added buffer": (
        lambda m: m.register_buffer("steps", torch.ones(3)),
        r"found steps \[3\] \(1 in all\), needed nothing more",
    ),
    "added module": (
        lambda m: mlp(m).add_module("adapter", nn.Linear(3, 3)),
        r"model\.layers\.0\.mlp\.adapter: .* found model\.layers\.0\.mlp\.adapter\.weight \[3, 3\]",
    ),
    "parametrised": (
        lambda m: parametrizations.weight_norm(mlp(m).up_proj),
        r"layers\.0\.mlp\.up_proj: its weight is made by torch\.nn\.utils\.parametrize \(_WeightN",
    ),
    "orthogonal": (
        lambda m: parametrizations.orthogonal(mlp(m).up_proj),
        r"mlp\.up_proj: .* \(_Orthogonal\) .*remove_parametrizations",
    ),
    "old weight norm": (
        lambda m: nn.utils.weight_norm(mlp(m).up_proj),
        r"mlp\.up_proj: its weight is made by torch\.nn\.utils\.weight_norm .*remove_weight_norm",
    ),
    "old spectral norm": (
        lambda m: nn.utils.spectral_norm(mlp(m).up_proj),
        r"mlp\.up_proj: its weight is made by torch\.nn\.utils\.spectral_norm",
    ),
    "config that builds nothing": (
        lambda m: setattr(m.config, "hidden_act", "no such"),
        r"LlamaForCausalLM: cannot be built from its config.*KeyError: 'no such'",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SHAPES)
def test_what_the_config_does_not_build_is_named(name: str) -> None:
    change, message = SHAPES[name]
    model, batch = llama()
    change(model)
    refused(model, batch, message, StructureError)
    refused(model, None, message, StructureError)


def test_labels_of_a_head_replaced_by_hand_are_not_what_is_wrong() -> None:
    model, batch = zoo.build("bert")
    model.classifier = torch.nn.Linear(model.config.hidden_size, 7)
    batch["labels"] = torch.full_like(batch["labels"], 6)
    with pytest.raises(StructureError, match=r"classifier\.weight: has .*num_labels = 7"):
        GradNASPruner(model).score([batch])
    fresh, batch["labels"] = zoo.build("bert")[0], torch.full_like(batch["labels"], 6)
    with pytest.raises(DataError, match="labels with the id 6"):
        GradNASPruner(fresh).score([batch])


def test_a_head_replaced_by_hand_names_the_number_of_labels() -> None:
    model, batch = zoo.build("bert", dtype=torch.float32)
    model.classifier = nn.Linear(64, 5)
    message = r"classifier\.weight: has shape \[5, 64\].* set model\.config\.num_labels = 5, then"
    refused(model, batch, message, StructureError)
    model.config.num_labels = 5
    check_savable(model.eval(), batch)


# --- weights --------------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[Change, str]] = {
    "8 bits": (
        lambda m: set_weight(mlp(m).up_proj, torch.ones(96, 64, dtype=torch.int8)),
        r"mlp\.up_proj\.weight: holds numbers of kind int8.* prune the model first, and quantise",
    ),
    "float of 8 bits": (
        lambda m: set_weight(mlp(m).up_proj, torch.ones(96, 64).to(torch.float8_e4m3fn)),
        r"up_proj\.weight: holds numbers of kind float8_e4m3fn",
    ),
    "complex": (
        lambda m: set_weight(mlp(m).up_proj, torch.ones(96, 64, dtype=torch.complex64)),
        r"up_proj\.weight: holds numbers of kind complex64",
    ),
    "tensor of another class": (
        lambda m: set_weight(mlp(m).up_proj, torch.ones(96, 64).as_subclass(Numbers)),
        r"up_proj\.weight: holds numbers of kind Numbers",
    ),
    "quantiser": (
        lambda m: setattr(m, "hf_quantizer", object()),
        r"model: is quantised \(by object\).* prune the model first",
    ),
    "quantised when it is loaded": (
        lambda m: setattr(m.config, "quantization_config", {"quant_method": "fp8"}),
        r"model: its config has a quantization_config.* del model\.config\.quantization_config",
    ),
    "module of a quantiser": (
        lambda m: setattr(mlp(m), "act_fn", type("Linear4", (nn.ReLU,), {"__module__": "awq.x"})()),
        r"mlp\.act_fn: is a Linear4 of awq, needed are plain floating-point weights",
    ),
    "mask": (
        lambda m: prune.l1_unstructured(mlp(m).up_proj, "weight", amount=0.5),
        r"mlp\.up_proj: its weight is made from weight_orig and weight_mask .*prune\.remove\(m",
    ),
    "lazy": (
        lambda m: setattr(m, "lm_head", nn.LazyLinear(160)),
        r"lm_head\.weight: has no shape yet.* run the model once",
    ),
    "not a number": (
        lambda m: m.model.norm.weight.data.fill_(float("nan")),
        r"model\.norm\.weight: holds NaN, needed are numbers",
    ),
    "digits that a load would cast away": (
        lambda m: (m.to(torch.bfloat16), m.lm_head.float().weight.data.add_(1e-3)),
        r"lm_head\.weight: is torch\.float32, but most of the model is torch\.bfloat16",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_plain_are_named(name: str) -> None:
    change, message = WEIGHTS[name]
    model, batch = llama()
    change(model)
    refused(model, batch, message, StructureError)


def test_weights_made_in_inference_mode_are_named_and_nothing_changes() -> None:
    with torch.inference_mode():
        config = transformers.LlamaConfig(**zoo.FAMILIES["llama"].kwargs)
        model = transformers.LlamaForCausalLM(config)
    _, batch = llama()
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    message = r"embed_tokens\.weight: was made under torch\.inference_mode\(\).* outside of it"
    with pytest.raises(StructureError, match=message):
        GradNASPruner(model).discover(batch)
    after = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert after == flags


SHARED: dict[str, Change] = {
    "layers": lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", mlp(m).up_proj.weight),
    "gate and up": lambda m: setattr(mlp(m).gate_proj, "weight", mlp(m).up_proj.weight),
    "key and value": lambda m: setattr(
        m.model.layers[0].self_attn.k_proj, "weight", m.model.layers[0].self_attn.v_proj.weight
    ),
    "one storage": lambda m: set_weight(mlp(m).gate_proj, mlp(m).up_proj.weight.data),
    "overlapping parts": lambda m: [
        set_weight(module, rows)
        for rows in [torch.ones(120, 64)]
        for module, rows in ((mlp(m).gate_proj, rows[:96]), (mlp(m).up_proj, rows[24:]))
    ],
    "one module twice": lambda m: m.model.layers.__setitem__(2, m.model.layers[1]),
    "undeclared embeddings": lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight),
}


@pytest.mark.parametrize("name", SHARED)
def test_numbers_with_two_owners_are_refused_by_both_names(name: str) -> None:
    model, batch = llama()
    SHARED[name](model)
    refused(model, batch, r"(\S+) and (?!\1:)\S+: share their numbers, but Llama", StructureError)


@pytest.mark.parametrize("share", ["90%", "50%"])
def test_tied_layers_are_refused_by_every_step_that_begins(share: str) -> None:
    model, batch = zoo.build("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    before = state_of(model)
    message = r"layer\.0\.intermediate\.dense\.weight and bert\.encoder\.layer\.1\.intermediate"
    for begin in (
        lambda: GradNASPruner(model).score([batch]),
        lambda: GradNASPruner(model).prune([batch], {"flops": share}),
    ):
        with pytest.raises(StructureError, match=message):
            begin()
    assert state_of(model) == before


# --- configs --------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Change, str]] = {
    "temperature": (
        lambda m: setattr(m.generation_config, "temperature", 0.5),
        r"its generation_config cannot be saved .*`do_sample=True` or unset `temperature`",
    ),
    "none": (
        lambda m: setattr(m, "generation_config", None),
        r"its generation_config cannot be saved",
    ),
    "token as a tensor": (
        lambda m: setattr(m.generation_config, "eos_token_id", torch.tensor(3)),
        r"its generation_config cannot be saved .*Tensor is not JSON serializable",
    ),
    "tensor": (
        lambda m: setattr(m.config, "prior", torch.ones(2)),
        r"its config cannot be saved .*Tensor is not JSON serializable.* that JSON can hold",
    ),
    "function": (
        lambda m: setattr(m.config, "act", print),
        r"its config cannot be saved .*not JSON serializable",
    ),
    "key of generation": (
        lambda m: setattr(m.config, "num_beams", 3),
        r"its config cannot be saved .*should go into `model.generation_config`",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_saved_is_an_error(name: str) -> None:
    change, message = CONFIGS[name]
    model, batch = llama()
    change(model)
    before = {name: vars(model)[name] for name in ("config", "generation_config")}
    with pytest.raises(CheckpointError, match=message):
        GradNASPruner(model).discover(batch)
    assert all(vars(model)[name] is value for name, value in before.items())


# --- outputs --------------------------------------------------------------------------------------

OUTPUTS: dict[str, tuple[Change, str]] = {
    "activation": (
        lambda m: setattr(mlp(m), "act_fn", nn.ReLU()),
        r"layers\.0\.mlp\.act_fn is a ReLU, the config builds a SiLU",
    ),
    "hook": (
        lambda m: mlp(m).register_forward_hook(doubled),
        r"gives other logits.* the hook doubled on model\.layers\.0\.mlp",
    ),
    "pre-hook": (
        lambda m: mlp(m).register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        r"the hook <lambda> on model\.layers\.0\.mlp",
    ),
    "forward": (
        lambda m: setattr(mlp(m), "forward", torch.zeros_like),
        r"a forward of its own on model\.layers\.0\.mlp",
    ),
    "class": (
        lambda m: setattr(
            mlp(m), "__class__", type("Half", (type(mlp(m)),), {"forward": lambda self, x: x / 2})
        ),
        r"model\.layers\.0\.mlp is a Half, the config builds a LlamaMLP",
    ),
    "number": (
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.1),
        r"model\.norm\.variance_epsilon is 0\.1, the config gives 1e-06",
    ),
    "buffer that no file holds": (
        lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
        r"model\.rotary_emb\.inv_freq, which a load gives other values",
    ),
    "config": (
        lambda m: setattr(m.config, "hidden_act", "relu"),
        r"act_fn is a SiLU\w*, the config builds a ReLU",
    ),
    "added module that computes": (
        lambda m: (
            m.add_module("noise", nn.Tanh()),
            m.lm_head.register_forward_hook(lambda module, args, output: m.noise(output)),
        ),
        r"the hook <lambda> on lm_head; noise \(a Tanh\)",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_load_would_not_compute_is_named(name: str) -> None:
    change, message = OUTPUTS[name]
    model, batch = llama()
    change(model)
    model.eval()
    before = state_of(model)
    with pytest.raises(StructureError, match="computes what a load would not restore.*" + message):
        GradNASPruner(model).discover(batch)
    assert state_of(model) == before


# --- what is never refused ------------------------------------------------------------------------


def views(model: Any) -> None:
    parts = torch.randn(2, 96, 64)
    set_weight(mlp(model).up_proj, parts[0])
    set_weight(mlp(model).gate_proj, parts[1])


FINE: dict[str, Change] = {
    "nothing": lambda m: m,
    "logging hook": lambda m: mlp(m).register_forward_hook(lambda module, args, output: None),
    "hook that acts in training": lambda m: m.model.embed_tokens.register_forward_hook(
        lambda module, args, output: output + 1 if module.training else output
    ),
    "forward of the same values": lambda m: setattr(
        mlp(m), "forward", types.MethodType(type(mlp(m)).forward, mlp(m))
    ),
    "activation of another class": lambda m: setattr(mlp(m), "act_fn", nn.SiLU()),
    "parts of one storage": views,
    "transposed": lambda m: set_weight(mlp(m).up_proj, torch.randn(64, 96).t()),
    "buffer that nothing reads": lambda m: m.register_buffer("x", torch.ones(3), persistent=False),
    "frozen": lambda m: m.requires_grad_(False),
    "checkpointing": lambda m: (
        m.activation_checkpointing_enable(),
        m.enable_input_require_grads(),
    ),
    "resized": lambda m: m.resize_token_embeddings(170),
    "kernel": lambda m: m.set_attn_implementation("sdpa"),
    "cast and back": lambda m: m.half().float(),
    "one module in other digits": lambda m: (m.to(torch.bfloat16), m.float(), m.lm_head.double()),
    "sampling": lambda m: m.generation_config.update(do_sample=True, temperature=0.5),
    "tuples": lambda m: setattr(m.config, "return_dict", False),
    "module without weights": lambda m: setattr(m, "loss", nn.CrossEntropyLoss()),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_saved_passes(name: str) -> None:
    model, batch = llama()
    FINE[name](model)
    before = state_of(model)
    check_savable(model, batch)
    assert state_of(model) == before


@pytest.mark.parametrize("factor", [1, 2])
def test_a_declared_tie_may_be_there_or_undone(factor: int) -> None:
    model, batch = llama(tie_word_embeddings=True)
    check_savable(model, batch)
    model.lm_head.weight = weight(factor * model.lm_head.weight.detach().clone())
    check_savable(model, batch)


@pytest.mark.parametrize("name", spread([*zoo.FAMILIES, *zoo.CONV_FAMILIES]))
def test_every_family_passes_in_every_type(name: str) -> None:
    model, batch = zoo.build(name)
    check_savable(model, batch)
    for dtype in (torch.bfloat16, torch.float32):
        cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
        check_savable(model.to(dtype), cast)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "wav2vec2"])
def test_what_was_loaded_trained_and_wrapped_passes(name: str, tmp_path: Any) -> None:
    model, batch = zoo.build(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    check_savable(loaded, batch)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(loaded.train())
    prepared(**batch).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=1e-3).step()
    assert "_original_forward" in vars(loaded)
    check_savable(loaded, batch)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "layout"), [("bert", "stock"), ("llama", "per_layer"), ("t5", "per_layer")]
)
def test_what_was_cut_passes_again(name: str, layout: str) -> None:
    model, batch = zoo.build(name, dtype=torch.float32)
    for share in ("90%", "80%"):
        GradNASPruner(model, layout=layout).prune([batch], {"params": share})
        check_savable(model, batch)
    assert ("gradnas" in vars(model.config)) is (layout == "per_layer")
    mlp_or_layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    mlp_or_layer.register_parameter("more", nn.Parameter(torch.ones(1)))
    refused(model, batch, r"found \S+\.more \[1\]", StructureError)


def test_a_model_that_is_not_equal_to_itself_passes() -> None:
    model, batch = llama()
    mlp(model).register_forward_hook(lambda module, args, output: output + next(drawn))
    drawn = iter(range(100))
    check_savable(model, batch)


def test_other_modules_are_checked_for_plain_weights_only() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    check_savable(net)
    prune.random_unstructured(net[1], "weight", amount=0.5)
    with pytest.raises(StructureError, match=r"^1: its weight is made from weight_orig"):
        check_savable(net)


class Needy(transformers.LlamaForCausalLM):
    """A class that cannot be built from its config alone."""

    def __init__(self, config: Any, more: int) -> None:
        super().__init__(config)


def test_a_class_that_needs_more_than_its_config_is_an_error() -> None:
    model, batch = llama()
    model.__class__ = Needy
    refused(model, batch, r"Needy: cannot be built from its config.*TypeError", StructureError)


class Derived(transformers.LlamaForCausalLM):
    """A class that makes in its constructor what no checkpoint holds, and no load makes again."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.lm_head.register_forward_hook(lambda head, args, output: head.scale * output)


def test_a_buffer_that_no_load_fills_is_named() -> None:
    _, batch = llama()
    model = Derived(transformers.LlamaConfig(**zoo.FAMILIES["llama"].kwargs)).eval()
    message = r"lm_head\.scale, which no load fills \(the _init_weights of its class has to\)"
    refused(model, batch, message, StructureError)


class Unfilled(Derived):
    """A class that a load cannot fill."""

    def _init_weights(self, module: nn.Module) -> None:
        raise NotImplementedError("later")


def test_a_class_whose_weights_cannot_be_initialised_is_an_error() -> None:
    _, batch = llama()
    model = Derived(transformers.LlamaConfig(**zoo.FAMILIES["llama"].kwargs)).eval()
    model.__class__ = Unfilled
    refused(model, batch, r"Unfilled: its _init_weights fails.*NotImpl.*later", StructureError)


class TiedInside(transformers.LlamaForCausalLM):
    """A class that ties without declaring it, which upstream does not save."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        mlp(self).gate_proj.weight = mlp(self).up_proj.weight


def test_a_tie_that_the_class_makes_but_does_not_declare_is_refused(tmp_path: Any) -> None:
    _, batch = llama()
    model = TiedInside(transformers.LlamaConfig(**zoo.FAMILIES["llama"].kwargs)).eval()
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path)
    refused(model, batch, r"gate_proj\.weight and \S+up_proj\.weight: share", StructureError)


def test_the_message_is_one_line() -> None:
    model, batch = llama()
    model.generation_config.temperature = 0.5
    with pytest.raises(CheckpointError) as caught:
        check_savable(copy.deepcopy(model), batch)
    assert not re.search(r"\n", str(caught.value))


def test_every_part_keeps_its_own_attention_kernel(tmp_path: Any) -> None:
    stages = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "embedding_size": 8}
    backbone = transformers.ResNetConfig(**stages, out_features=["stage4"])
    sizes = {"d_model": 16, "num_queries": 3, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "backbone_config": backbone}
    config = transformers.ConditionalDetrConfig(**sizes, **heads, **widths)
    transformers.ConditionalDetrModel(config).save_pretrained(tmp_path)
    model = transformers.ConditionalDetrModel.from_pretrained(tmp_path)
    assert kernels_of(model.config) == {"": "sdpa", "backbone_config": "eager"}
    assert kernels_of(backbone) == backbone._attn_implementation
    check_savable(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    torch.nn.init.constant_(model.query_position_embeddings.weight, float("nan"))
    refused(model, None, r"query_position_embeddings\.weight: holds NaN", StructureError)
