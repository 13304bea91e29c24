"""What users may ask for: recipes, budgets, rules, the configuration of `nas`."""
