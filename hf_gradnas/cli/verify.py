"""The verify command: does a saved checkpoint still hold what it held, and does it load?

Every way of loading is tried in a process of its own. Code of the checkpoint runs there only if it
is byte by byte the file that this hf_gradnas writes, or with ``--trust-remote-code``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._manifests import FILES, OLD_FILES, file_sha256, is_sealed
from .._redaction import without_secrets
from ..checkpoint.folders import DOCUMENT, FORMAT_VERSION
from ..errors import CheckpointError, GradNASError, RecipeError, first_line
from ..jobs.early import check_device, local_path
from ..report import say_repair
from . import BAD_INPUT, DONE, FAILED, INTERRUPTED
from .isolation import run_alone
from .saved_files import CODE as CODE_KIND
from .saved_files import LOADING, MEANING, NEW, TEXT, WEIGHTS, Check, check_files
from .show import Screen, quiet_libraries

if TYPE_CHECKING:
    from ..checkpoint.reference import Reference

PACKAGE = __name__.split(".", maxsplit=1)[0]
CODE = "modeling_gradnas"
PLAIN = f"plain Transformers, without {PACKAGE}"
REMOTE = f"trust_remote_code=True, without {PACKAGE}"
IMPORTED = f"import {PACKAGE}"


ROOM = 0.6
"""Share of the free memory that weights may take; more are loaded when their layer runs."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way of loading: the name of the class, and whether hf_gradnas and remote code take part."""

    name: str
    loader: str
    imports: bool
    trust: bool


@dataclass(frozen=True, slots=True)
class _Saved:
    """What a checkpoint folder says of itself."""

    folder: Path
    layout: str
    digests: Mapping[str, str]
    reference: Reference
    auto_map: Mapping[str, str]
    is_sealed: bool | None
    """Whether the document is as it was written; None: an old one, which cannot tell."""
    repair: Mapping[str, Any]
    """The document's record of a repair; empty without one."""


def verify_from_options(
    folder: str,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    original: str | None = None,
    scores: str | None = None,
    repair: str | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Run the command; errors become a message and a code.

    Args:
        folder: The checkpoint.
        device: Where to run it; None: on the kind of device it was saved from, else the CPU.
        trust_remote_code: Run whatever code is in the folder.
        original: Folder of the whole model, whose rows the weights have to be; None: not compared.
        scores: File of the scores that the plan was made from.
        repair: File of the new weights that were cut along.
        as_json: Write one JSON object to standard output, and nothing else.
        quiet: Print errors only (and the JSON object).

    Returns:
        0 all is as it was saved, 1 something differs, 2 bad input, 130 interrupted.
    """
    screen = Screen(results=not (as_json or quiet), notes=not quiet)
    try:
        place = local_path(folder)
        document = read_document(place)
        if original is None and (scores or repair):
            raise RecipeError("--scores and --repair need the original: give --original, too.")
        if device is not None:
            check_device(device)
        with quiet_libraries(screen):
            saved = read_saved(place)
            _check_device(device)
            whole = None
            if original is not None:  # before what takes long
                from .originals import check_rows, open_original

                whole = open_original(original, place, document, scores=scores, repair=repair)
            with screen.progress("Verifying"):
                rows = [] if whole is None else [check_rows(screen, place, whole, document)]
                checks = list(verify(saved, device=device, trust_remote_code=trust_remote_code))
    except KeyboardInterrupt:
        screen.error("interrupted; nothing was changed.")
        return INTERRUPTED
    except GradNASError as error:
        screen.error(str(error))
        return BAD_INPUT
    checks += rows
    if as_json:
        _write_answer(folder, saved, checks)
    shown = [(check.what, check.word, check.found) for check in checks]
    screen.line(f"{folder}, layout {saved.layout}:")
    screen.table("Checks", ("file or way of loading", "result", "found"), shown)
    if saved.repair:
        screen.line(_said(saved.repair))
    return _say_outcome(screen, folder, checks)


def _write_answer(folder: str, saved: _Saved, checks: Sequence[Check]) -> None:
    answer: dict[str, Any] = {"folder": without_secrets(folder), "layout": saved.layout}
    answer["verified"] = not any(check.has_failed for check in checks)
    answer["repair"] = saved.repair or None
    answer["checks"] = [asdict(check) for check in checks]
    sys.stdout.write(json.dumps(answer, indent=1) + "\n")


def _said(repair: Mapping[str, Any]) -> str:
    """What a record says of a repair; anybody may have edited it."""
    try:
        return say_repair(repair)
    except (KeyError, TypeError, ValueError):
        return f"It was repaired, but what {DOCUMENT} keeps of that cannot be read."


def _say_outcome(screen: Screen, folder: str, checks: Sequence[Check]) -> int:
    texts = [check.what for check in checks if check.passed is False and not check.has_failed]
    if texts:
        screen.warn(
            f"{folder}: {', '.join(texts)}: changed or missing; what the model computes does "
            "not depend on it."
        )
    new = [check.what for check in checks if check.kind != LOADING and check.passed is None]
    if new:
        screen.warn(f"{folder}: {', '.join(new)}: {NEW}; not compared.")
    failed = [check for check in checks if check.has_failed]
    for check in failed:
        screen.error(f"{folder}: {check.what}: {check.found}.")
    if failed:
        kinds = " and ".join(dict.fromkeys(MEANING[check.kind] for check in failed))
        screen.error(f"verification failed ({kinds}); restore these files, or prune again.")
        return FAILED
    screen.line(
        "Verified: the checkpoint's weights, code, settings and outputs are as they were saved."
    )
    return DONE


def read_document(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself; torch is not needed for it.

    Raises:
        CheckpointError: The folder is no pruned checkpoint, or one that keeps nothing to compare.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is no folder; give the folder of a checkpoint that {PACKAGE} saved."
        )
    if not (folder / DOCUMENT).is_file():
        raise CheckpointError(
            f"{folder}: holds no {DOCUMENT}, which {PACKAGE} writes beside a model that it "
            "prunes; a model that was trained and saved again has none, as its weights are new. "
            "Give the folder that was written when the model was pruned."
        )
    document = _read_json(folder / DOCUMENT)
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / DOCUMENT}: format_version is {version!r}, this {PACKAGE} reads "
            f"{FORMAT_VERSION}; upgrade {PACKAGE}."
        )
    if "sha256" not in document or "reference" not in document:
        raise CheckpointError(
            f"{folder / DOCUMENT}: holds no digests and no reference outputs, as the checkpoint "
            f"was written by an older {PACKAGE}, so there is nothing to compare with; save it "
            "again (hf-gradnas prune --recipe recipe.yaml makes it from the recipe beside it)."
        )
    return document


def read_saved(folder: Path) -> _Saved:
    """The same with its reference outputs, and with what its config says of the class.

    Raises:
        CheckpointError: As for `read_document`.
    """
    from ..checkpoint.reference import Reference

    document = read_document(folder)
    whole = FILES in document
    digests = _mapping(document, FILES if whole else OLD_FILES, folder / DOCUMENT)
    layout = str(_mapping(document, "plan", folder / DOCUMENT).get("layout"))
    reference = Reference.from_dict(document["reference"])
    try:
        config = folder / "config.json"
        auto_map = _mapping(_read_json(config), "auto_map", config)
    except CheckpointError:
        if not whole:
            raise
        auto_map = {}  # that it differs is said among the files
    sealed = is_sealed(document) if whole else None
    repair = _mapping(document, "repair", folder / DOCUMENT)
    return _Saved(folder, layout, digests, reference, auto_map, sealed, repair)


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"--device {device}: cannot be used here ({first_line(error)}); give another, "
            "or omit it."
        ) from error


def verify(
    saved: _Saved, *, device: str | None = None, trust_remote_code: bool = False
) -> Iterator[Check]:
    """Compare all files, then load in every way and compare outputs.

    Nothing is loaded where weights or code differ.

    Raises:
        CheckpointError: The checkpoint's class is not in Transformers, and its code not trusted.
    """
    whole = saved.is_sealed is not None
    files = list(check_files(saved.folder, saved.digests, whole=whole))
    if whole:
        found = "as it was written" if saved.is_sealed else "was changed since it was written"
        files.append(Check(DOCUMENT, saved.is_sealed, found, kind=TEXT))
    yield from files
    changed = any(check.has_failed and check.kind in (WEIGHTS, CODE_KIND) for check in files)
    for route in routes(saved, trust_remote_code=trust_remote_code):
        untrusted = "" if trust_remote_code else _untrusted_code(route, saved)
        if changed or untrusted:
            why = "files differ" if changed else f"{untrusted}; {_TRUSTING} runs it nevertheless"
            yield Check(route.name, None, f"not loaded: {why}")
        else:
            yield _check_route(route, saved, device, online=trust_remote_code)


_TRUSTING = "--trust-remote-code"


def routes(saved: _Saved, *, trust_remote_code: bool) -> list[Route]:
    """All ways in which a checkpoint is meant to be loaded.

    Raises:
        CheckpointError: Only remote code of the original's author could load it.
    """
    import transformers

    name, per_layer = saved.reference.model_class, saved.layout == "per_layer"
    if not hasattr(transformers, name):
        auto = _auto_class(saved, f".{name}")
        if auto is None or not trust_remote_code:
            raise CheckpointError(
                f"{saved.folder}: its class {name} is not in Transformers; "
                + ("--trust-remote-code runs the code that loads it." if auto else "")
                + ("" if auto else "load it where that class is defined.")
            )
        return [Route(IMPORTED if per_layer else PLAIN, auto, per_layer, True)]
    if not per_layer:
        return [Route(PLAIN, name, False, False)]
    auto = _auto_class(saved, f"{CODE}.{name}")
    remote = [Route(REMOTE, auto, False, True)] if auto else []
    return [*remote, Route(IMPORTED, name, True, False)]


def _auto_class(saved: _Saved, target: str) -> str | None:
    found = (auto for auto, to in saved.auto_map.items() if str(to).endswith(target))
    return next((auto for auto in found if auto.startswith("AutoModel")), None)


def _untrusted_code(route: Route, saved: _Saved) -> str:
    """Code that a route would run, or could, and that is not this hf_gradnas's own, in words."""
    from ..surgery import modeling_gradnas

    if not route.trust:
        return ""
    others = [to for to in saved.auto_map.values() if not str(to).startswith(f"{CODE}.")]
    own = saved.folder / f"{CODE}.py"
    if others or saved.digests.get(own.name) != file_sha256(Path(modeling_gradnas.__file__)):
        return f"{own.name} is not the one of this {PACKAGE}"
    # Transformers runs custom_generate/generate.py of a folder that is trusted, too.
    for path in sorted(saved.folder.rglob("*")):
        if path != own and (path.suffix == ".py" or (path.is_symlink() and path.is_dir())):
            return f"{path.relative_to(saved.folder).as_posix()} is not of {PACKAGE}"
    return ""


def _check_route(route: Route, saved: _Saved, device: str | None, *, online: bool) -> Check:
    from ..checkpoint.reference import output_difference, output_limit

    result = replay(route, saved, device, online=online)
    if isinstance(result, str):
        return Check(route.name, False, f"does not load and run ({result})")
    if result["wrong"]:
        kinds = "; ".join(f"{kind} {items[:4]}" for kind, items in result["wrong"].items())
        return Check(route.name, False, f"loads only in part ({kinds})")
    output = saved.reference.output
    if output is None:
        return Check(route.name, True, "loads whole; no reference outputs were kept")
    limit = output_limit(saved.reference, result["device"])
    difference = output_difference(output, result["output"])
    where = f"{output['name']} on {result['device']}"
    if math.isnan(difference):
        return Check(route.name, False, f"{where}: another shape, or not finite as before")
    found = f"{where}: {difference:.2g} apart, at most {limit:.2g} is allowed"
    if result["is_offloaded"]:
        found += "; layer by layer, as there is no room for all weights"
    return Check(route.name, difference <= limit, found, difference, limit)


def replay(
    route: Route, saved: _Saved, device: str | None, *, online: bool = False
) -> dict[str, Any] | str:
    """Load and run a checkpoint in a new process.

    Returns:
        What `checkpoint.replay` wrote; or the last line of its error.
    """
    from ..checkpoint import replay as script

    reference = saved.reference
    job = {
        "folder": str(saved.folder),
        "loader": route.loader,
        "trust_remote_code": route.trust,
        "dtype": reference.dtype,
        "attention": reference.attention,
        "device": device or reference.device,
        "device_is_required": device is not None,
        "inputs": reference.inputs,
        "room": room_for(saved.folder, reference.dtype),
    }
    return run_alone(
        Path(script.__file__), job, folder=saved.folder, imports=route.imports, online=online
    )


def room_for(folder: Path, dtype: str) -> int | None:
    """Bytes that a checkpoint's weights may take at a time; None: there is room for all of them.

    Args:
        folder: The checkpoint.
        dtype: That they are loaded in; ``"auto"``: that of the files.
    """
    from ..running.memory import free_memory
    from ..shards.files import loaded_bytes

    room = int(ROOM * free_memory())
    return None if loaded_bytes(folder, dtype) <= room else room


def _mapping(content: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {key} is a {type(found).__name__}, needed an object; restore it, or prune "
            "again."
        )
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); give the folder of a checkpoint that {PACKAGE} "
            "saved."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no JSON object; restore it, or prune again.")
    return content
