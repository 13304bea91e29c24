"""All that depends on versions of Transformers and its kin, each with its removal condition."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from huggingface_hub import run_as_future
from torch import nn
from transformers import PreTrainedConfig, masking_utils
from transformers.utils import hub as transformers_hub

if TYPE_CHECKING:
    from transformers import Trainer


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that a module of `model` holds, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if not isinstance(config, PreTrainedConfig):  # a live view of one, or anything else
            config = getattr(config, "_base", None)
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def trainer_of_event() -> Trainer | None:
    """The trainer whose event a callback handles; None: it is called by hand.

    Cause: events do not say whose they are, so that a callback knows neither the folder of a trial
    of a hyperparameter search nor the reporters. Remove when Transformers' events pass the trainer.
    """
    from transformers import Trainer  # noqa: PLC0415 - it takes seconds to import

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


@contextmanager
def implementations(
    model: nn.Module, *, attention: str | None = None, experts: str | None = None
) -> Iterator[None]:
    """Run the modules of `model` with other kernels; None: with the one that they have.

    Cause: ``set_attn_implementation`` and ``set_experts_implementation`` need a whole
    ``PreTrainedModel`` and cannot be asked for the value to go back to, config by config; modules
    read it from their config at every forward. Remove when Transformers offers this as a context
    manager.
    """
    values = {
        "_attn_implementation_internal": attention,
        "_experts_implementation_internal": experts,
    }
    with ExitStack() as stack:
        for config in configs_of(model):
            for name, value in values.items():
                if value is not None and hasattr(config, name):
                    stack.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, value)
        yield


def taken_out(model: nn.Module) -> nn.Module:
    """A model taken out of DDP, DataParallel, a DeepSpeed engine or ``torch.compile``.

    Cause: Accelerate 1.10 takes a model with compiled parts for one that is compiled itself, and
    fails with a KeyError. Remove when the oldest supported Accelerate leaves such parts alone, as
    1.15 does.
    """
    try:
        inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    except KeyError:
        wrappers = nn.parallel.DistributedDataParallel, nn.DataParallel
        return model.module if isinstance(model, wrappers) else model
    return inner


def wait_for_uploads() -> None:
    """Wait until all that a trainer began to upload in the background has ended.

    Cause: a trainer's events do not say which trainer it is, and only that knows its uploads. They
    are in the queue of one thread, that of the client: Transformers' own, or in versions without
    one that of huggingface_hub. Remove when Transformers offers to wait for them.
    """
    clients = vars(transformers_hub).get("hf_api")
    for queue in (run_as_future, *([clients().run_as_future] if clients else [])):
        queue(int).result()  # does nothing, after all that was there before it


@contextmanager
def peft_reads_an_old_name() -> Iterator[None]:
    """Wrap a model in adapters without a warning that no user can act on.

    Cause: PEFT up to 0.21 asks a model for ``is_gradient_checkpointing``, which Transformers 5.23
    renamed. Remove when the oldest supported PEFT asks for ``is_activation_checkpointing``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


@contextmanager
def masks_by_shape() -> Iterator[None]:
    """Let Transformers make attention masks without a look at the values of padding.

    Cause: it asks whether a mask is of ones, to do without, but for models that are traced. Remove
    when tensors on the meta device count as traced.
    """
    asks = masking_utils.is_tracing
    try:
        masking_utils.is_tracing = lambda tensor=None: True
        yield
    finally:
        masking_utils.is_tracing = asks


def sound_file_feature() -> Any:
    """A column of paths of sound files, which nothing decodes.

    Cause: `datasets.Audio.encode_example` imports torchcodec even where it only notes a path.
    Remove when it imports it only to encode samples (not in datasets 5.2).
    """
    from datasets import Audio  # noqa: PLC0415 - takes long to import

    class SoundFile(Audio):
        def encode_example(self, value: Any) -> Any:
            is_path = isinstance(value, str)
            return {"bytes": None, "path": value} if is_path else super().encode_example(value)

    return SoundFile(decode=False)
