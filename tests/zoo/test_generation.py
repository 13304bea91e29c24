"""Decoders without some layers write the tokens of the masked model, with every cache and kernel.

``pytest -m zoo tests/zoo/test_generation.py``; the families of tests/support/zoo.py run by default,
in tests/test_whole_layers.py.
"""

import pytest
import torch
import whole_loop
from tiny_configs import all_types

from hf_gradnas import GradNASPruner
from hf_gradnas.types import Kind, Plan

# Dense, with windows, grouped, ALiBi, mixtures, latent attention, scans and hybrids.
DECODERS = (
    "gpt2 gpt_neo gptj gpt_neox opt bloom falcon mpt codegen ctrl llama mistral qwen2 qwen3 phi3 "
    "gemma3_text gemma3n_text gemma4_text olmo2 starcoder2 stablelm nemotron mixtral qwen3_moe "
    "gpt_oss glm4_moe llama4_text dbrx deepseek_v2 deepseek_v3 longcat_flash minimax kimi_linear "
    "qwen3_next granitemoehybrid jamba bamba nemotron_h lfm2 mamba2 t5gemma bart xlnet"
).split()
ONLY_LAYERS = {f"*:{kind}": None for kind in Kind if kind is not Kind.LAYERS}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
@pytest.mark.parametrize("name", DECODERS)
def test_tokens_without_layers_are_those_of_the_masked_model(name, layout):
    if name not in all_types():
        pytest.skip("this version does not have it")
    model, batches = whole_loop.build(name)
    pruner = GradNASPruner(model, layers=True, rules=ONLY_LAYERS)
    structure = pruner.discover(batches[0])
    layers = [axis.name for axis in structure.axes if axis.is_layer]
    refused = pruner.prunable.space.refused
    able = [layer for layer in layers if layout == "per_layer" or layer not in refused]
    gone = able[:1] if layout == "per_layer" else able[-2:-1]
    if layout == "stock" and not gone:
        pytest.skip(f"stock: {refused.get(layers[0])}")
    kept = {
        axis.name: () if {axis.name, axis.within} & {*gone} else tuple(range(axis.size))
        for axis in structure.axes
    }
    plan = Plan(kept, {axis.name: axis.size for axis in structure.axes}, layout)
    ids = batches[0]["input_ids"]
    with pruner.masked(plan):
        wanted = generated(model, ids)
    found = generated(pruner.apply(plan), ids)
    assert wanted
    assert found.keys() == wanted.keys()
    for way, tokens in wanted.items():
        assert torch.equal(found[way], tokens), way


def generated(model, ids) -> dict[tuple[str, str], torch.Tensor]:
    """Tokens by attention kernel and kind of cache, as far as the class has them."""
    found = {}
    for kernel in ("eager", "sdpa"):
        for cache in ("dynamic", "static"):
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            try:
                model.set_attn_implementation(kernel)
                tokens = model.generate(ids, cache_implementation=cache, pad_token_id=0, **options)
            except (ValueError, NotImplementedError):  # the class does not have it
                continue
            found[kernel, cache] = tokens
    model.set_attn_implementation("eager")
    return found
