"""Checkpoints: what is in the config, how per-layer ones load, how they are written."""
