"""The mode ``gradnas`` as the reference describes its modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .config import GradNASConfig
from .conversion import convert_model, note_state, restore_model
from .searcher import GradientBinarySearcher

Convert = Callable[[nn.Module, GradNASConfig], tuple[nn.Module, dict[str, Any]]]
Restore = Callable[[nn.Module, GradNASConfig, Mapping[str, Any]], nn.Module]
Update = Callable[[nn.Module, GradNASConfig, dict[str, Any]], None]


class GradNASModeDescriptor:
    """What the mode ``gradnas`` consists of. Instances are alike and hold nothing."""

    @property
    def name(self) -> str:
        """Name of the mode."""
        return "gradnas"

    @property
    def config_class(self) -> type[GradNASConfig]:
        """Class of the mode's config."""
        return GradNASConfig

    @property
    def search_algorithm(self) -> type[GradientBinarySearcher]:
        """Class of the search."""
        return GradientBinarySearcher

    @property
    def next_modes(self) -> set[str]:
        """Modes that may follow; `search` exports by itself."""
        return {"export"}

    @property
    def export_mode(self) -> str:
        """Mode in which a searched model leaves this one."""
        return "export"

    @property
    def convert(self) -> Convert:
        """Function that makes a model a search space: ``(model, config) -> (model, metadata)``."""
        return convert_model

    @property
    def restore(self) -> Restore:
        """Inverse of `convert` on a fresh model: ``(model, config, metadata) -> model``."""
        return restore_model

    @property
    def update_for_save(self) -> Update:
        """Function that brings metadata up to date: ``(model, config, metadata) -> None``."""
        return note_state
