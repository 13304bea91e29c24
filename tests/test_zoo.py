import pytest
import torch
import zoo


@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.MIXTURES])
def test_every_family_builds_and_has_a_finite_loss(name):
    model, inputs = zoo.build(name)
    with torch.no_grad(), zoo.float64_throughout():
        output = model(**inputs)
    assert torch.isfinite(output.loss)
    assert output.logits.dtype == torch.float64
    assert output.logits.std() > 0.1
    assert not model.training


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_kernel_gives_the_same_logits(name):
    logits = []
    for kernel in zoo.FAMILIES[name].kernels:
        model, inputs = zoo.build(name, attn=kernel)
        assert model.config._attn_implementation == kernel
        with torch.no_grad(), zoo.float64_throughout():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(logits[0], logits[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_all_parameters_are_random(name):
    model, _ = zoo.build(name)
    constant = [path for path, p in model.named_parameters() if p.numel() > 1 and p.std() < 0.01]
    assert constant == []


def test_seed_decides_parameters_and_batch():
    first, again, other = (zoo.build("bert", seed=seed) for seed in (3, 3, 4))
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first[0].get_parameter(weight), again[0].get_parameter(weight))
    assert torch.equal(first[1]["input_ids"], again[1]["input_ids"])
    assert not torch.equal(first[0].get_parameter(weight), other[0].get_parameter(weight))
    assert not torch.equal(first[1]["input_ids"], other[1]["input_ids"])


def test_dtype_and_overrides_reach_the_model():
    model, inputs = zoo.build("vit", dtype=torch.float32, num_hidden_layers=1)
    assert inputs["pixel_values"].dtype == torch.float32
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 1


@pytest.mark.parametrize("name", [name for name, f in zoo.FAMILIES.items() if f.generates])
def test_generating_families_generate(name):
    model, inputs = zoo.build(name)
    prompt = {key: value[:1, :4] for key, value in inputs.items() if key != "labels"}
    if "input_features" in inputs:
        prompt = {"input_features": inputs["input_features"][:1]}
    tokens = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] >= 2
