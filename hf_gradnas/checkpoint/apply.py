"""Cut a Transformers model to a plan and rewrite its config: its own save_pretrained then works."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig, PreTrainedModel

from ..structure.config_values import locate_axes
from ..structure.modeling_gradnas import make_per_layer, translated
from ..surgery import cut, merge_records
from ..types import Plan, StockSpace, Structure
from .rewrite import write_per_layer, write_stock


def apply_plan(model: PreTrainedModel, plan: Plan, structure: Structure, space: StockSpace) -> None:
    """Cut a model in place and rewrite its config; a plan that does not fit changes nothing.

    Args:
        model: The model that the others were found on, not cut yet.
        plan: Kept units and layout.
        structure: Its axes.
        space: What its class can express.

    Raises:
        PlanError: The plan does not fit the model or, in layout ``stock``, its class.
    """
    # On a copy first: what fails does so before anything is cut.
    _write_config(copy.deepcopy(model.config), model, plan, structure, space)
    earlier = vars(model.config).get("gradnas")
    record = cut(model, structure.axes, plan.kept, layout=plan.layout)
    _write_config(model.config, model, plan, structure, space)
    if plan.layout == "per_layer":
        if earlier is not None:
            record = merge_records(translated(earlier, model), record)
        make_per_layer(model, record)


def _write_config(
    config: PreTrainedConfig,
    model: PreTrainedModel,
    plan: Plan,
    structure: Structure,
    space: StockSpace,
) -> None:
    if plan.layout == "stock":
        write_stock(config, plan, structure, space)
    else:
        keys = locate_axes(model, structure, space)
        write_per_layer(config, plan, structure, keys, space=space)
