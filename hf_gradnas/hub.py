"""Pushes a saved model to the Hugging Face Hub in one commit, and says what to do when it fails.

Knows the Hub's client; knows nothing of models. The folder that is pushed is only read.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, or of httpx2 from huggingface_hub 2 on
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ._manifests import FILES, is_sealed, sealed
from .checkpoint.folders import DOCUMENT, WEIGHT_FILES
from .errors import HubError, first_line
from .report import address
from .types import read_object

_CARD = "README.md"
COMMIT_MESSAGE = "Upload pruned model"
# What decides which weights a loader takes: a repository must not keep those of another model.
WEIGHTS = (*WEIGHT_FILES, "modeling_gradnas.py")
_ADVICE = {
    401: "the Hub does not know the token; make one with write permission at {endpoint}/settings"
    "/tokens, and log in with 'hf auth login' or set HF_TOKEN.",
    403: "the token may not write there; take one with write permission, ask the owner of "
    "{namespace} for access, or push to another repository.",
    404: "the Hub knows no such repository or revision; check the name.",
    413: "a file is larger than the Hub takes; save with smaller shards.",
    429: "there were too many requests; wait a few minutes, then push again.",
}
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError)  # those of uploads by hf_xet among them
_SERVER_ERROR = 500
_UNCONFIRMED = "the upload failed before its commit was confirmed"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: Of the repository.
        commit_url: Of the commit that was made.
        is_new: Whether the repository was made for it.
        has_changed: Whether there was anything to commit.
        removed: Weights of an earlier model that the commit took out of the repository's root.
    """

    url: str
    commit_url: str
    is_new: bool
    has_changed: bool
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.has_changed:
            return f"{self.url} (which held it already)"
        if self.is_new:
            return f"{self.url} (a new repository)"
        gone = f"; it took out {', '.join(self.removed)} of an earlier one" if self.removed else ""
        return f"{self.url} (which existed: a new commit, {self.commit_url}{gone})"


def check_access(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Check, before any work, that a model can be pushed; nothing is made or changed.

    Args:
        repo_id: ``user/name``, or ``name`` for a repository of the token's owner.
        private: What `push` will be asked for.
        token: Access token; None: that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The id with its owner.

    Raises:
        HubError: The id is no id, the token is missing, wrong, or may not write there, the Hub
            cannot be reached, or the repository is public and `private` was asked for.
    """
    _check_id(repo_id)
    api = _api(token)
    with _explained(repo_id, api):
        full, _ = _access(repo_id, api, private=private)
    return full


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Push a saved model to a repository, which is made if it is not there, in one commit.

    The card that hf_gradnas wrote names the repository there, in its title and in the lines that
    load the model.

    A repository that exists gets a commit more: files of the same name are replaced, weights of an
    earlier model are taken out of its root, everything else stays.

    Args:
        folder: As `GradNASPruner.save_pretrained` or the command wrote it; hidden files stay.
        repo_id: ``user/name``, or ``name`` for a repository of the token's owner.
        private: Whether a new repository is private; None: as its owner's settings say.
        token: Access token; None: that of ``HF_TOKEN`` or ``hf auth login``.
        commit_message: Of the commit; None: `COMMIT_MESSAGE`.
        revision: Branch to push to, made if it is not there; None: the main one.

    Raises:
        HubError: As for `check_access`, or the upload failed, or the folder holds no saved model.
            The folder is as it was, and the repository too or the commit is whole.
    """
    _check_id(repo_id)
    folder = Path(folder)
    saved_files(folder)
    api = _api(token)
    with _explained(repo_id, api, folder=folder):
        repo_id, existing = _access(repo_id, api, private=private)
        additions = _additions(folder, repo_id)
        if existing is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with _explained(repo_id, api, folder=folder, what=_UNCONFIRMED):
        before = api.model_info(repo_id, revision=revision)
        removed = _earlier_weights(before, additions)
        done = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationDelete(path_in_repo=name) for name in removed),
                *additions,
            ],
            commit_message=commit_message or COMMIT_MESSAGE,
            revision=revision,
        )
    return Pushed(
        f"{api.endpoint}/{repo_id}",
        done.commit_url,
        is_new=existing is None,
        has_changed=done.oid != before.sha,
        removed=removed,
    )


def later(folder: str | Path, repo_id: str) -> str:
    """How to push a folder by hand, in words."""
    place = shlex.quote(str(folder))
    return f"hf-gradnas push {place} {repo_id} (or: hf upload {repo_id} {place})"


# --- what is pushed -------------------------------------------------------------------------------


def _additions(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    files: dict[str, Path | bytes] = {
        file.relative_to(folder).as_posix(): file for file in saved_files(folder)
    }
    if _CARD in files:
        card = (folder / _CARD).read_bytes().decode(errors="surrogateescape")
        addressed = address(card, repo_id).encode(errors="surrogateescape")
        if addressed != (folder / _CARD).read_bytes():
            files |= {_CARD: addressed, **_relisted(folder, {_CARD: addressed})}
    return [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in files.items()
    ]


def _relisted(folder: Path, changed: Mapping[str, bytes]) -> dict[str, bytes]:
    """The record of a folder's files, with the digests of those that are pushed otherwise.

    A record that was changed, or one without such a list, stays as it is.
    """
    record = read_object(folder / DOCUMENT)
    if not (FILES in record and is_sealed(record)):
        return {}
    now = {name: hashlib.sha256(content).hexdigest() for name, content in changed.items()}
    files = record[FILES] | {name: now[name] for name in now if name in record[FILES]}
    return {DOCUMENT: sealed({**record, FILES: files}).encode()}


def _earlier_weights(before: ModelInfo, additions: list[CommitOperationAdd]) -> tuple[str, ...]:
    sent = {addition.path_in_repo for addition in additions}
    names = {file.rfilename for file in before.siblings or []} - sent
    return tuple(sorted(name for name in names if _is_weight(name)))


def saved_files(folder: Path) -> list[Path]:
    """Files of a saved model, none of them hidden.

    Raises:
        HubError: It is none.
    """
    if not (folder / "config.json").is_file() or not [*folder.glob("*.safetensors")]:
        raise HubError(
            f"{folder}: is not a saved model (needed config.json and *.safetensors), so nothing "
            "was pushed; give the folder that the pruned model was saved in."
        )
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in files if not _is_hidden(file.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _is_weight(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in WEIGHTS)


# --- who may push where ---------------------------------------------------------------------------


def _api(token: str | None) -> HfApi:
    return HfApi(token=token or get_token(), library_name="hf_gradnas")


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r}: is not the id of a repository ({first_line(error).rstrip('.')}); needed "
            "user/name, of letters, digits, '-', '_' and '.'."
        ) from error


def _access(repo_id: str, api: HfApi, *, private: bool | None) -> tuple[str, ModelInfo | None]:
    """The id with its owner, and what is there already."""
    identity = api.whoami()
    if "/" not in repo_id:
        repo_id = f"{identity['name']}/{repo_id}"
    _check_permission(identity, repo_id)
    try:
        existing = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return repo_id, None
    if private and existing.private is False:
        raise HubError(
            f"{repo_id}: is a public repository, but a private one was asked for; make it private "
            f"at {api.endpoint}/{repo_id}/settings, or push to another one."
        )
    return repo_id, existing


def _check_permission(identity: Mapping[str, Any], repo_id: str) -> None:
    """Check what the Hub says about an access token. It says less of others: those are tried."""
    access = identity.get("auth", {}).get("accessToken")
    if not access:
        return
    owner, user = repo_id.partition("/")[0], identity["name"]
    roles = {each["name"].lower(): each.get("roleInOrg") for each in identity.get("orgs", [])}
    if owner.lower() not in (user.lower(), *roles):
        groups = f" and of {', '.join(roles)}" if roles else ""
        found = f"the token is that of {user}{groups}, not of {owner}"
    elif roles.get(owner.lower()) == "read":
        found = f"{user} may only read in {owner}"
    elif not _may_write(access, {owner.lower(), repo_id.lower()}):
        found = f"the token {access.get('displayName', '')!r} of {user} may only read"
    else:
        return
    raise HubError(f"{repo_id}: {found}, and a push writes: {_advice(403, owner=owner)}")


def _may_write(access: Mapping[str, Any], names: set[str]) -> bool:
    if access.get("role") != "fineGrained":
        return access.get("role") != "read"
    scopes = access.get("fineGrained", {}).get("scoped", [])
    mine = [each for each in scopes if each.get("entity", {}).get("name", "").lower() in names]
    return any("repo.write" in each.get("permissions", []) for each in mine)


# --- what went wrong ------------------------------------------------------------------------------


@contextmanager
def _explained(
    repo_id: str, api: HfApi, *, folder: Path | None = None, what: str = "cannot be pushed to"
) -> Iterator[None]:
    """Turn what the client raises into a `HubError` that says what to do."""
    kept = ""
    if folder is not None:
        kept = f" {folder} is complete and as it was; push it later: {later(folder, repo_id)}"
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}{kept}") from error
    except _FAILURES as error:
        raise HubError(f"{repo_id}: {what}: {_cause(error, repo_id, api)}{kept}") from error


def _cause(error: BaseException, repo_id: str, api: HfApi) -> str:
    """What happened, and what to do; the client wraps some errors in others."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for each in chain:
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            said = f"{status} {each.server_message or each.response.reason_phrase}".strip()
            if isinstance(error, ValueError) and len(chain) > 1:  # the client read the answer
                said = " ".join(str(error).split())
            owner = repo_id.partition("/")[0]
            return f"{said}: {_advice(status, owner=owner, endpoint=api.endpoint)}"
        if isinstance(each, LocalTokenNotFoundError):
            return "no token was found; log in with 'hf auth login', or set HF_TOKEN."
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, which forbids it; unset it."
        if isinstance(each, HTTPError | ConnectionError | TimeoutError):
            return (
                f"no connection to {api.endpoint} ({first_line(each).rstrip('.')}); check the "
                "network, a proxy, and HF_ENDPOINT, then push again."
            )
    return f"{first_line(chain[-1]).rstrip('.')}; push again when that is put right."


def _advice(status: int, *, owner: str, endpoint: str = "") -> str:
    if status >= _SERVER_ERROR:
        return "the Hub has a problem of its own; push again later."
    text = _ADVICE.get(status, "the Hub refused it; push again when that is put right.")
    return text.format(endpoint=endpoint, namespace=owner)
