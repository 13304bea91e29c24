"""What must follow a cut in place: optimizer, a trainer's references, what it pushes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .._compat import trainer_of_event, wait_for_uploads
from .._files import write_whole
from ..checkpoint.folders import DOCUMENT, failing
from ..errors import GradNASWarning
from ..hub import Pushed, check_access, push
from ..running.processes import Processes
from .scoring import collators_of


def names_of(model: nn.Module) -> dict[int, str]:
    """Name of every parameter, by identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def swap_parameters(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Give an optimizer the parameters that a model has now, in place of those it had, in place.

    Everything else of its groups stays, and so do parameters that were not the model's. The state
    of parameters that are gone is forgotten.

    Args:
        optimizer: Of torch, or accelerate's wrapper.
        names: Of the model's parameters before the cut (see `names_of`).
        model: The model after it.
    """
    now = dict(model.named_parameters())
    seen: set[str] = set()
    for group in optimizer.param_groups:
        of_group = [(names.get(id(p)), p) for p in group["params"]]
        seen.update(name for name, _ in of_group if name is not None)
        group["params"] = [
            p if name is None else now[name] for name, p in of_group if name is None or name in now
        ]
    # A layer that shared a table of position biases owns one now.
    new = [p for name, p in now.items() if name not in seen and name not in names.values()]
    optimizer.param_groups[0]["params"] += new
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]


def renew_optimizer(
    optimizer: Any, names: Mapping[int, str], model: nn.Module, *, rewinds: bool
) -> None:
    """Make a used optimizer as good as a new one of the cut model, in place.

    `Trainer` makes an optimizer only where it has none, so that a second ``train()`` goes on with
    the first one's. The state of every parameter is forgotten.

    Args:
        optimizer: As for `swap_parameters`, and so are `names` and `model`.
        names: Of the model's parameters before the cut.
        model: The model after it.
        rewinds: Set the learning rate to where it started, for a new scheduler; otherwise the old
            one goes on, and groups stay as it left them.
    """
    swap_parameters(optimizer, names, model)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if rewinds and "initial_lr" in group:
            group["lr"] = group.pop("initial_lr")


def put_first(trainer: Any, callback: Any) -> None:
    """Let a trainer call a callback of its before all that report, so that they see what it logs.

    Those of ``report_to`` come before all that are given to a trainer.
    """
    handler = trainer.callback_handler
    handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]


def come_first(callback: Any) -> None:
    """The same for the trainer whose event is handled, if it has the callback already."""
    trainer = trainer_of_event()
    if trainer is not None and callback in trainer.callback_handler.callbacks:
        put_first(trainer, callback)


def log_last(values: dict[str, float], before: Mapping[str, float]) -> None:
    """Log what changed after a trainer's last log, by the trainer whose event is handled."""
    trainer = trainer_of_event()
    if trainer is not None and values != before:
        trainer.log(values)


def warn_of_scheduler() -> None:
    """Warn that a second training does not begin as the first one did."""
    warnings.warn(
        "train: the scheduler in optimizers=… goes on where the first training left it, which may "
        "be at a learning rate of zero; make a new Trainer with a new optimizer and scheduler to "
        "begin again.",
        GradNASWarning,
        stacklevel=3,
    )


def renew_trainer(trainer: Any, *, makes_optimizer: bool, makes_scheduler: bool) -> None:
    """Let a trainer wrap its model anew when it trains again, and make again what it had made."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    if makes_scheduler:
        trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = None
    if makes_optimizer:
        trainer.optimizer = trainer.callback_handler.optimizer = None


def tokenizer_of(event: Mapping[str, Any]) -> Any:
    """What a trainer processes its data with, or its loader's collate function pads with.

    Args:
        event: Keyword arguments of an event of a trainer.

    Returns:
        A tokenizer or processor; None: there is none.
    """
    given, loader = event.get("processing_class"), event["train_dataloader"]
    if given is not None or not isinstance(loader, DataLoader):
        return given
    found = (collator.get("tokenizer") for collator in collators_of(loader))
    return next((each for each in found if isinstance(each, PreTrainedTokenizerBase)), None)


# --- ``push_to_hub`` of a trainer's arguments -----------------------------------------------------


def check_publishing(args: Any) -> None:
    """Check before training that the cut model can be pushed, if the arguments ask for that.

    Raises:
        HubError: It cannot.
    """
    if args.push_to_hub:
        check = partial(check_access, private=args.hub_private_repo, token=args.hub_token)
        Processes(args.distributed_state).from_main(partial(check, _repository(args)))


def publish(folder: Path, args: Any) -> Pushed | None:
    """Push the cut model to the root of the trainer's repository, if the arguments ask for that.

    Raises:
        HubError: The push failed; the folder is as it was, and the message says how to push it.
    """
    if not args.push_to_hub:
        return None
    return Processes(args.distributed_state).from_main(partial(_publish, folder, args))


def complete_output(folder: Path, args: Any, *, is_cut: bool) -> None:
    """Let a push of the trainer's own, of its whole ``output_dir``, end with the same repository.

    The folder of the cut model, if it is in there, is not pushed a second time; what it holds
    and a trainer does not write comes along.

    Args:
        folder: Where the cut model is or will be saved.
        args: The trainer's arguments.
        is_cut: Whether the folder holds what the trainer's model is.

    Raises:
        CheckpointError: A file cannot be written.
    """
    output = Path(args.output_dir)
    with failing(output):
        _complete(folder, output, is_cut=is_cut)


def _complete(folder: Path, output: Path, *, is_cut: bool) -> None:
    if folder.resolve().parent == output.resolve():
        ignored = output / ".gitignore"
        before = ignored.read_bytes() if ignored.is_file() else b""
        line = os.fsencode(f"/{folder.name}/")
        if line not in before.splitlines():
            end = b"" if before.endswith(b"\n") or not before else b"\n"
            _write(ignored, before + end + line + b"\n")
    if is_cut:
        _write(output / DOCUMENT, (folder / DOCUMENT).read_bytes())


def _write(file: Path, content: bytes) -> None:
    """Write a file beside a trainer's, which may replace what is there as the trainer does."""
    write_whole(file, lambda path: path.write_bytes(content), replaces=lambda file: True)


def _publish(folder: Path, args: Any) -> Pushed:
    wait_for_uploads()  # one that ended later would bring back the weights that it took
    return push(
        folder,
        _repository(args),
        private=args.hub_private_repo,
        token=args.hub_token,
        revision=args.hub_revision,
    )


def _repository(args: Any) -> str:
    """The repository that `Trainer.init_hf_repo` makes."""
    return args.hub_model_id or Path(args.output_dir).absolute().name
