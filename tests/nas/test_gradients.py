"""Gradients of masks: the data manager, set-up functions of users, and what a pass measures."""

import copy
from typing import ClassVar

import networks
import pytest
import torch
import zoo
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.bert import modeling_bert

from hf_gradnas import nas
from hf_gradnas.errors import ScoresError

SETUPS = nas.GradientBinarySearcher.SETUP_GRADIENT_FUNC
ONE = {
    "nn.Linear": {"feature_divisor": 1},
    "nn.Conv2d": {"channel_divisor": 1},
    "nn.BatchNorm2d": {"feature_divisor": 1},
}


@pytest.fixture
def setups(monkeypatch):
    """The registered set-up functions, restored after the test."""
    own = dict(SETUPS)
    monkeypatch.setattr(nas.GradientBinarySearcher, "SETUP_GRADIENT_FUNC", own)
    return own


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


# --- GradientDataManager --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "size"), [(3, (3,)), ((2, 1, 3), (2, 1, 3))])
def test_the_mask_is_ones_that_require_a_gradient(shape, size):
    data = nas.GradientDataManager(shape, nn.Linear(2, 2).double())
    assert data.mask.shape == size
    assert data.mask.requires_grad
    assert data.mask.is_leaf
    assert torch.equal(data.mask, torch.ones(size, dtype=torch.float64))
    assert torch.equal(data.score, torch.zeros(size, dtype=torch.float64))
    assert not data.score.requires_grad


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_mask_has_the_models_dtype_and_device_but_never_a_small_one(dtype, expected):
    data = nas.GradientDataManager(3, nn.Linear(2, 2).to(dtype))
    assert data.mask.dtype == expected
    assert data.mask.device == torch.device("cpu")
    meta = nas.GradientDataManager(3, nn.Linear(2, 2, device="meta"))
    assert meta.mask.device == torch.device("meta")


def test_process_gradient_adds_the_squared_gradient_and_clears_it():
    data = nas.GradientDataManager(3, nn.Linear(2, 2).double())
    for factors in ([1.0, 2.0, -3.0], [0.5, 0.0, 1.0]):
        (data.mask * torch.tensor(factors)).sum().backward()
        data.process_gradient()
        assert data.mask.grad is None
    assert data.score.tolist() == [1.25, 4.0, 10.0]


def test_reduce_func_brings_the_sum_of_squares_to_one_score_per_unit():
    data = nas.GradientDataManager((2, 3), nn.Linear(2, 2), reduce_func=lambda s: s.sum(dim=0))
    (data.mask * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    data.process_gradient()
    assert data.score.tolist() == [17.0, 29.0, 45.0]


def test_a_missing_gradient_is_an_error():
    data = nas.GradientDataManager(3, nn.Linear(2, 2))
    with pytest.raises(ScoresError, match=r"mask \(3,\): no gradient arrived; the hook must"):
        data.process_gradient()


# --- built-in masks -------------------------------------------------------------------------------


def test_scores_are_sums_of_squared_gradients_at_the_producers_outputs():
    model, _ = networks.build("residual")
    batches = [torch.randn(2, 3, 6, 6, dtype=torch.float64) for _ in range(3)]
    twin = copy.deepcopy(model)
    search(model, batches)
    places = {
        "stem.0.out_channels": ("stem.0", "first.2", "second.2"),  # one stream
        "first.0.out_channels": ("first.0",),
        "second.0.out_channels": ("second.0",),
    }
    for name, paths in places.items():
        mask = torch.ones(twin.get_submodule(paths[0]).out_channels, dtype=torch.float64)
        mask.requires_grad_()
        hooks = [
            twin.get_submodule(path).register_forward_hook(
                lambda module, args, output, mask=mask: output * mask[:, None, None]
            )
            for path in paths
        ]
        expected = sum(
            torch.autograd.grad(loss_of(twin(batch), batch), mask)[0].square() for batch in batches
        )
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(scores_of(model)[name], expected, rtol=1e-12, atol=0)


def test_a_gated_layer_scores_alike_whether_its_first_weights_are_one_layer_or_two():
    model, batch = zoo.build("llama", dtype=torch.float64)
    config = Phi3Config(
        hidden_size=model.config.hidden_size,
        intermediate_size=model.config.intermediate_size,
        num_hidden_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        num_key_value_heads=model.config.num_key_value_heads,
        vocab_size=model.config.vocab_size,
        rms_norm_eps=model.config.rms_norm_eps,
        pad_token_id=0,
    )
    fused = Phi3ForCausalLM(config).double().eval()
    state = model.state_dict()
    for index in range(model.config.num_hidden_layers):
        path = f"model.layers.{index}"
        attention = [state.pop(f"{path}.self_attn.{n}_proj.weight") for n in "qkv"]
        gated = [state.pop(f"{path}.mlp.{n}_proj.weight") for n in ("gate", "up")]
        state[f"{path}.self_attn.qkv_proj.weight"] = torch.cat(attention)
        state[f"{path}.mlp.gate_up_proj.weight"] = torch.cat(gated)
    fused.load_state_dict(state)
    found = []
    for each in (model, fused):
        nas.convert(each, [("gradnas", ONE)])
        nas.GradientBinarySearcher().search(
            each,
            {"flops": "90%"},
            {k: v for k, v in batch.items() if k != "labels"},
            settings([batch], loss_func=lambda output, given: output.loss),
        )
        found.append(scores_of(each))
    for name, values in found[0].items():
        other = found[1][name.replace("gate_proj", "gate_up_proj")]
        torch.testing.assert_close(values, other, rtol=1e-3, atol=0)  # softmax in float32


def test_a_layer_that_a_batch_does_not_reach_gets_nothing_from_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)
            )

        def forward(self, x, which=None):
            return sum(e(x) for i, e in enumerate(self.experts) if which in (None, i))

    model = Experts().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    nas.convert(model, [("gradnas", ONE)])
    config = settings([(x, {"which": 0}), (x, {"which": 0})], collect_func=lambda batch: batch)
    nas.GradientBinarySearcher().search(model, {"flops": "90%"}, x, config)
    scores = scores_of(model)
    assert scores["experts.0.0.out_features"].any()
    assert not scores["experts.1.0.out_features"].any()


# --- SETUP_GRADIENT_FUNC --------------------------------------------------------------------------


def on_output(module, place, size, **more):
    """A mask on the output of another module than the built-in one."""
    data = nas.GradientDataManager(size, module, **more)
    return data, place.register_forward_hook(lambda m, args, output: output * data.mask)


class Block(nn.Module):
    """A user's module: the units are masked after the activation."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def blocks(count=2):
    return nn.Sequential(*(Block() for _ in range(count)), nn.Linear(5, 2)).double()


def test_a_users_module_type_says_where_its_mask_stands(setups):
    model = blocks()
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(2)]
    twin = copy.deepcopy(model)
    seen = []

    def set_up_block(block):
        seen.append(block)
        return on_output(block, block.act, 8)

    setups[Block] = set_up_block
    search(model, batches)
    assert seen == [model[0], model[1]]
    for index in range(2):
        mask = torch.ones(8, dtype=torch.float64, requires_grad=True)
        hook = twin[index].act.register_forward_hook(lambda m, a, o, mask=mask: o * mask)
        expected = sum(torch.autograd.grad(loss_of(twin(x), x), mask)[0].square() for x in batches)
        hook.remove()
        found = scores_of(model)[f"{index}.up.out_features"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_nearest_enclosing_type_wins_and_subclasses_count(setups):
    class Special(nn.Linear):
        pass

    model = blocks(1)
    special = Special(5, 8).double()
    special.load_state_dict(model[0].up.state_dict())
    model[0].up = special
    called = []

    def note(name):
        def set_up(module):
            called.append(name)
            target = module if isinstance(module, nn.Linear) else module.act
            return on_output(module, target, 8)

        return set_up

    x = torch.randn(4, 5, dtype=torch.float64)
    for kinds, expected in (
        ((Block,), "Block"),
        ((Block, nn.Linear), "Linear"),
        ((Block, nn.Linear, Special), "Special"),
    ):
        setups.clear()
        setups.update({kind: note(kind.__name__) for kind in kinds})
        called.clear()
        search(copy.deepcopy(model), [x])
        assert called == [expected]


class Probabilities:
    """A mask on attention probabilities, as the reference's: the handle takes it off again."""

    masks: ClassVar = {}

    def __init__(self, module, mask):
        self.module = module
        self.masks[module] = mask

    def remove(self):
        del self.masks[self.module]

    @classmethod
    def attend(cls, module, query, key, value, attention_mask, scaling=None, **kwargs):
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        probabilities = (scores + (0 if attention_mask is None else attention_mask)).softmax(-1)
        probabilities = probabilities * cls.masks.get(module, 1)
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def test_the_references_mask_on_attention_probabilities_is_ours(setups, monkeypatch):
    model, batch = zoo.build("bert", dtype=torch.float64)
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model)
    monkeypatch.setattr(modeling_bert, "eager_attention_forward", Probabilities.attend)

    def set_up_attention(attention):
        shape = (attention.self.num_attention_heads, 1, 1)
        data = nas.GradientDataManager(shape, attention, reduce_func=torch.flatten)
        return data, Probabilities(attention.self, data.mask)

    dummy = {k: v for k, v in batch.items() if k != "labels"}
    for each in (plain, model):
        if each is model:
            setups[modeling_bert.BertAttention] = set_up_attention
        nas.convert(each, [("gradnas", ONE)])
        nas.GradientBinarySearcher().search(
            each,
            {"flops": "90%"},
            dummy,
            settings([batch], loss_func=lambda output, given: output.loss),
        )
    expected = scores_of(plain)
    for name, values in scores_of(model).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=0)
    assert not Probabilities.masks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda block: on_output(block, block.act, (8, 1), reduce_func=lambda s: s),
            r"0\.up\.out_features: the set-up function's scores have the shape \(8, 1\)",
        ),
        (
            lambda block: on_output(block, block.act, 8, reduce_func=lambda s: s.sum()),
            r"scores have the shape \(\), needed \(8,\); give its GradientDataManager a reduce",
        ),
        (
            lambda block: on_output(block, block.act, 8, reduce_func=lambda s: s / 0),
            r"0\.up\.out_features: 8 of 8 scores are not finite though the loss is",
        ),
        (
            lambda block: (
                nas.GradientDataManager(8, block),
                block.register_forward_hook(lambda m, a, o: o),
            ),
            r"0\.up\.out_features: no gradient arrived at the mask of its set-up function in 2",
        ),
    ],
)
def test_set_up_functions_that_do_not_fit_are_refused(setups, make, message):
    def place(block):
        data, handle = make(block) if block is model[0] else on_output(block, block.act, 8)
        if data.mask.ndim > 1:  # multiplies (batch, 8)
            handle.remove()
            handle = block.act.register_forward_hook(lambda m, a, o: o * data.mask.flatten())
        return data, handle

    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    setups[Block] = place
    with pytest.raises(ScoresError, match=message):
        search(model, [x, x])
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_set_up_function_that_fails_leaves_no_hook_behind(setups):
    def broken(block):
        if block is model[1]:
            raise RuntimeError("no such place")
        return on_output(block, block.act, 8)

    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    setups[Block] = broken
    with pytest.raises(RuntimeError, match="no such place"):
        search(model, [x])
    assert not any(m._forward_hooks for m in model.modules())


def test_a_checkpoint_of_other_masks_is_refused(setups, tmp_path):
    model, x = blocks(), torch.randn(4, 5, dtype=torch.float64)
    file = tmp_path / "search.safetensors"
    search(copy.deepcopy(model), [x], checkpoint=file)
    setups[Block] = lambda block: on_output(block, block.act, 8)
    with pytest.raises(ScoresError, match=r"other masks \(mask_place is .* remove the file"):
        search(model, [x], checkpoint=file)
    search(model, [x], checkpoint=tmp_path / "other")
    search(model, [x], checkpoint=tmp_path / "other")


def test_no_set_up_function_is_registered_from_the_start():
    assert SETUPS == {}
