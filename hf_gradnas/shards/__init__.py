"""A checkpoint cut from shards to shards: its tensors are read only while they are written."""

from .apply import apply_to_checkpoint

__all__ = ["apply_to_checkpoint"]
