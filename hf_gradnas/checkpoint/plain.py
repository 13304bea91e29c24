"""Checks that the weights of a module are plain floating-point numbers, and all there is.

Knows what other libraries make of weights: adapters, quantised numbers, masks. Needs no config, so
that it serves modules that are no Transformers models too.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedConfig

from ..errors import StructureError
from ..running.shards import is_partitioned
from ..running.wrappers import check_no_adapters

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISERS = (
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "gptqmodel",
    "hqq",
    "optimum",
    "quanto",
    "torch.ao",
    "torchao",
)
"""Libraries whose modules hold numbers of another kind."""


def check_plain(model: nn.Module) -> None:
    """Check that the weights of a module are plain floating-point numbers, and all there is.

    Args:
        model: Any module, unwrapped.

    Raises:
        StructureError: It holds adapters, quantised weights, pruning masks, tensors of
            ``torch.inference_mode`` or lazy ones.
    """
    check_no_adapters(model)
    _check_not_quantised(model)
    for path, module in model.named_modules():
        masks = [h for h in module._forward_pre_hooks.values() if isinstance(h, BasePruningMethod)]
        if masks:
            name = masks[0]._tensor_name
            raise StructureError(
                f"{path or 'model'}: its {name} is made from {name}_orig and {name}_mask by "
                "torch.nn.utils.prune at every forward, needed is a plain parameter; call "
                f"torch.nn.utils.prune.remove(module, {name!r}) on it first."
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):  # others are extra states
            _check_tensor(name, tensor)


def made_by(module: nn.Module) -> str:
    """What makes a weight of a module anew at every forward, in words; "" when nothing does."""
    if is_parametrized(module):
        chains = cast(nn.ModuleDict, module.parametrizations).values()
        kinds = [type(each).__name__ for chain in chains for each in chain.children()]
        return f"torch.nn.utils.parametrize ({', '.join(kinds)})"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            return f"torch.nn.utils.{'weight' if isinstance(hook, WeightNorm) else 'spectral'}_norm"
    return ""


def _check_not_quantised(model: nn.Module) -> None:
    """Check what says that a model is quantised, besides its numbers."""
    advice = "prune the model first, in 16 or 32 bits, and quantise the result"
    for path, module in model.named_modules():
        if vars(module).get("hf_quantizer") is not None:
            raise StructureError(
                f"{path or 'model'}: is quantised (by {type(module.hf_quantizer).__name__}), "
                f"needed are plain floating-point weights; {advice}."
            )
        library = type(module).__module__
        found = next((q for q in QUANTISERS if f"{library}.".startswith(f"{q}.")), None)
        if found is not None:
            raise StructureError(
                f"{path or 'model'}: is a {type(module).__name__} of {found}, needed are plain "
                f"floating-point weights; {advice}."
            )
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and vars(config).get("quantization_config"):
            raise StructureError(
                f"{path or 'model'}: its config has a quantization_config, so that what is saved "
                f"would be quantised when it is loaded; {advice}. If the weights were dequantised, "
                "take the key out: del model.config.quantization_config."
            )


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Check one parameter or buffer."""
    if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
        raise StructureError(
            f"{name}: has no shape yet, needed is an initialised parameter; run the model once."
        )
    if tensor.is_inference():
        raise StructureError(
            f"{name}: was made under torch.inference_mode(), which forbids gradients and changes "
            "in place for good; build or load the model outside of it (torch.no_grad() will do)."
        )
    if not isinstance(tensor, nn.Parameter):
        return
    is_plain = isinstance(tensor, DTensor) or type(tensor.data) is torch.Tensor
    if is_partitioned(tensor) or (is_plain and tensor.dtype in PLAIN):
        return
    kind = type(tensor.data).__name__ if not is_plain else str(tensor.dtype).split(".")[-1]
    raise StructureError(
        f"{name}: holds numbers of kind {kind}, needed are plain floating-point weights (16, 32 or "
        "64 bits); prune the model first, and quantise the result."
    )
