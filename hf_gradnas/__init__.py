"""GradNAS for Hugging Face models: score once with gradients, prune to any budget, load anywhere.

Names are imported when they are first used, so that importing the package imports neither torch
nor transformers. Importing it lets ``from_pretrained`` load checkpoints with per-layer sizes.
"""

from ._import_path import leave_working_folder

leave_working_folder(__name__, __file__)  # before all other imports, even that of __future__

from typing import TYPE_CHECKING  # noqa: E402

from ._lazy import getter  # noqa: E402
from .checkpoint.install import install_when_imported  # noqa: E402

if TYPE_CHECKING:
    from .callback import GradNASCallback
    from .errors import GradNASError, GradNASWarning
    from .nas import (
        GradientBinarySearcher,
        GradientDataManager,
        GradNASConfig,
        GradNASModeDescriptor,
    )
    from .pruner import GradNASPruner
    from .repair import Repair
    from .types import Budget, Plan, Scores, Structure

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "GradNASCallback",
    "GradNASConfig",
    "GradNASError",
    "GradNASModeDescriptor",
    "GradNASPruner",
    "GradNASWarning",
    "GradientBinarySearcher",
    "GradientDataManager",
    "Plan",
    "Repair",
    "Scores",
    "Structure",
    "__version__",
]

_HOME = {
    "Budget": "types",
    "GradNASCallback": "callback",
    "GradNASConfig": "nas",
    "GradNASError": "errors",
    "GradNASModeDescriptor": "nas",
    "GradNASPruner": "pruner",
    "GradNASWarning": "errors",
    "GradientBinarySearcher": "nas",
    "GradientDataManager": "nas",
    "Plan": "types",
    "Repair": "repair",
    "Scores": "types",
    "Structure": "types",
}

__getattr__ = getter(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_when_imported()
