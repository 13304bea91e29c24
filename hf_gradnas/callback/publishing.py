"""What ``push_to_hub`` of a trainer's arguments means for the model that the callback prunes.

While it trains, a trainer pushes its ``output_dir``, with the weights that it has then, to the root
of a repository. At the end, the cut model takes their place there.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from .._compat import wait_for_uploads
from .._files import write_whole
from ..checkpoint.targets import DOCUMENT, failing
from ..hub import Pushed, check_access, push
from ..running.processes import Processes


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

    The folder of the cut model, if it stands in there, is not pushed a second time; what it holds
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
