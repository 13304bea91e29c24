"""From scores, costs and budgets to a plan. numpy only; knows neither torch nor transformers."""

from __future__ import annotations

from .solver import STRATEGIES, check_budgets, find_plan, find_plans, lowest_costs

__all__ = ["STRATEGIES", "check_budgets", "find_plan", "find_plans", "lowest_costs"]
