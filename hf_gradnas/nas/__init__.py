"""The surface of NVIDIA ModelOpt's ``gradnas``, for any module: change the import, keep the calls.

``import hf_gradnas.nas as mtp`` serves where ``import modelopt.torch.prune as mtp`` stood. What
differs is told in the migration page of the documentation.
"""

from __future__ import annotations

from .algorithms import GradNASModeDescriptor, convert, prune, search
from .config import GradNASConfig
from .files import restore, save
from .gradients import GradientDataManager
from .hparams import Hparam, named_hparams
from .searcher import GradientBinarySearcher

__all__ = [
    "GradNASConfig",
    "GradNASModeDescriptor",
    "GradientBinarySearcher",
    "GradientDataManager",
    "Hparam",
    "convert",
    "named_hparams",
    "prune",
    "restore",
    "save",
    "search",
]
