"""Lets every ``from_pretrained`` load per-layer checkpoints once hf_gradnas is imported.

Importing this module imports neither torch nor transformers. The whole patch is one ``__new__`` on
``PreTrainedModel`` and one ``from_dict`` on ``PreTrainedConfig``: without a ``gradnas`` record in
the config, they do what Python and Transformers do anyway.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODELING = "transformers.modeling_utils"
CONFIGURATION = "transformers.configuration_utils"
SPEC = "per_layer_config"


def install() -> None:
    """Patch ``PreTrainedModel`` and its configs once; a second call does nothing.

    A constructor called with a config that carries a record then builds the per-layer subclass of
    its class, whose own ``__init__`` resizes when the outermost constructor returns.
    """
    from transformers.modeling_utils import PreTrainedModel  # noqa: PLC0415 - only when it is used

    if "_gradnas_installed" not in vars(PreTrainedModel):
        if "_gradnas_thread" not in vars(PreTrainedModel):
            PreTrainedModel._gradnas_thread = threading.local()  # see modeling_gradnas
        PreTrainedModel.__new__ = _new_of(PreTrainedModel)
        PreTrainedModel._gradnas_installed = True
    _install_for_configs()


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


def _install_for_configs() -> None:
    """Patch ``PreTrainedConfig`` once: configs with a record are made by `_read`."""
    from transformers.configuration_utils import PreTrainedConfig  # noqa: PLC0415 - as above

    base: Any = PreTrainedConfig
    own = base.from_dict.__func__
    if own.__module__ == __name__:
        return

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        make = partial(own, cls, **kwargs)
        return _read(make, config_dict) if "gradnas" in config_dict else make(config_dict)

    base.from_dict = classmethod(from_dict)


def _read(make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any]) -> Any:
    """What `make` makes of a config's values, its ``per_layer_config`` set after upstream's checks.

    These read the one value for all layers, and warn of each. What tells a process without
    hf_gradnas that it is needed (`modeling_gradnas.NEEDS`) is left out.
    """
    left = {name: x for name, x in values.items() if name not in (SPEC, "transformers_weights")}
    parts = {name: x for name, x in left.items() if isinstance(x, Mapping) and SPEC in x}
    for name, part in parts.items():
        left[name] = {key: x for key, x in part.items() if key != SPEC}
    made = make(left)
    config = made[0] if isinstance(made, tuple) else made  # arguments that were not used come along
    for name, part in {"": values, **parts}.items():
        (getattr(config, name) if name else config).per_layer_config = part.get(SPEC)
    return made


def install_when_imported() -> None:
    """Patch each of the two modules now if it is imported already, else right after its import."""
    waiting = {f.module for f in sys.meta_path if isinstance(f, _After)}
    for module, patch in {CONFIGURATION: _install_for_configs, MODELING: install}.items():
        if module in sys.modules:
            patch()
        elif module not in waiting:
            sys.meta_path.insert(0, _After(module, patch))


class _After(MetaPathFinder):
    """Finds a module as the other finders do, patches it after its execution, and is gone."""

    def __init__(self, module: str, patch: Callable[[], None]) -> None:
        self.module, self._patch = module, patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
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
            self._patch()

        loader.exec_module = execute_and_install
