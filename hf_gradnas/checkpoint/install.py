"""Lets every ``from_pretrained`` load per-layer checkpoints once hf_gradnas is imported.

Importing this module imports neither torch nor transformers. The whole patch is one ``__new__`` on
``PreTrainedModel``, which for a config without a ``gradnas`` record does what Python does anyway.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODELING = "transformers.modeling_utils"


def install() -> None:
    """Patch ``PreTrainedModel`` once; a second call does nothing.

    A constructor called with a config that carries a record then builds the per-layer subclass of
    its class, whose own ``__init__`` resizes when the outermost constructor returns.
    """
    from transformers.modeling_utils import PreTrainedModel  # noqa: PLC0415 - only when it is used

    if "_gradnas_installed" not in vars(PreTrainedModel):
        if "_gradnas_thread" not in vars(PreTrainedModel):
            PreTrainedModel._gradnas_thread = threading.local()  # see modeling_gradnas
        PreTrainedModel.__new__ = _new_of(PreTrainedModel)
        PreTrainedModel._gradnas_installed = True


def _new_of(base: Any) -> Callable[..., Any]:
    """The ``__new__`` that chooses the per-layer subclass, around the one that `base` has."""
    own = base.__new__ if "__new__" in vars(base) else None

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and "gradnas" in vars(config):
            from ..surgery import modeling_gradnas  # noqa: PLC0415 - loading may not need it

            if not (modeling_gradnas.under_construction() or modeling_gradnas.is_per_layer(cls)):
                cls = modeling_gradnas.per_layer_class(cls)
        new = own or super(base, cls).__new__
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    from transformers.configuration_utils import PreTrainedConfig  # noqa: PLC0415 - as above

    return __new__


def install_when_imported() -> None:
    """`install` now if Transformers' modeling is imported already, else right after its import."""
    if MODELING in sys.modules:
        install()
    elif not any(isinstance(finder, _AfterModeling) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterModeling())


class _AfterModeling(MetaPathFinder):
    """Finds `MODELING` as the other finders do, installs after its execution, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELING:
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._install_after(spec.loader)
        return spec

    def _install_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module  # back to that of its class
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            install()

        loader.exec_module = execute_and_install
