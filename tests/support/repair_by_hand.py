"""A repair that is made by hand: what is done with one does not depend on how it was found."""

from __future__ import annotations

import torch

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.repair import Repair, Site
from hf_gradnas.repair.repairs import plan_digest
from hf_gradnas.running.hooks import tensor_at
from hf_gradnas.scores import model_fingerprint


def repair_by_hand(pruner: GradNASPruner, plan: Plan, *, seed: int = 0) -> Repair:
    """New weights for every out-projection that loses inputs: the old ones and some noise."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for axis in pruner.structure.axes:
        names = {part.tensor for part in axis.readers}
        biases = {f"{name.removesuffix('weight')}bias" for name in names}
        names |= biases & {name for name, _ in pruner.model.named_parameters()}
        for name in sorted(names) if len(plan.kept[axis.name]) < axis.size else ():
            whole = tensor_at(pruner.model, name).detach()
            noise = torch.randn(whole.shape, generator=draw, dtype=torch.float64)
            tensors[name] = (whole + 0.1 * noise.to(whole)).clone()
    sites = tuple(Site(name.rpartition(".")[0], 48, 12, 0.1, 0.5, 0.25) for name in tensors)
    return Repair(tensors, sites, plan_digest(plan), model_fingerprint(pruner.model), 0.3, 0.1, 64)
