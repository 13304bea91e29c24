"""Checkpoints: what stands in the config, how per-layer ones load, how they are written."""
