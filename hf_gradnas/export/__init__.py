"""Checkpoints in the formats of other tools."""

from .gguf import Export, export_gguf

__all__ = ["Export", "export_gguf"]
