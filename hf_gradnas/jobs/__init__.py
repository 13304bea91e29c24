"""What one run of a recipe is made of: what was checked, opened, measured and written down."""
