"""A server on loopback that speaks as much of the Hub's HTTP protocol as pushing and loading need.

Repositories live in memory. Tokens, and what a fault does, are those of the constants below:

    with serve() as hub:
        hub.faults["upload"] = Fault(DROP)
        ...  # HF_ENDPOINT=hub.url
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, GROUP, OTHER_GROUP = "ada", "lab", "readers"
WRITE, READ, FINE, FINE_READ = "hf_write", "hf_read", "hf_fine", "hf_fine_read"
DROP = 0
LFS = (".safetensors", ".bin", ".model")
BAD_TOKEN = "Invalid credentials in Authorization header"


def _fine(*permissions: str) -> dict[str, Any]:
    scope = {"entity": {"type": "user", "name": USER}, "permissions": ["repo.content.read"]}
    scope["permissions"] = [*permissions]
    return {"role": "fineGrained", "fineGrained": {"global": [], "scoped": [scope]}}


TOKENS: dict[str, dict[str, Any]] = {
    WRITE: {"role": "write"},
    READ: {"role": "read"},
    FINE: _fine("repo.content.read", "repo.write"),
    FINE_READ: _fine("repo.content.read"),
}


@dataclass
class Fault:
    """What happens at a step instead of its work.

    Attributes:
        status: Of the answer; `DROP`: the connection is closed after half of the request's body.
        times: How often; None: always.
        seconds: To wait first; with `status` 200, the work is then done.
    """

    status: int
    times: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Blob:
    """One file: its content, and whether it is stored in LFS."""

    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 of an LFS file, otherwise the SHA-1 that git gives it."""
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """Branches and commits; a commit is its files by path."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # in the order of time
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        """Put a commit at the tip of a branch; its id."""
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        return oid

    def find(self, revision: str) -> str | None:
        """Id of the commit that a branch or an id names."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        return {path: blob.data for path, blob in self.commits[self.branches[revision]].items()}


class Hub(ThreadingHTTPServer):
    """The server and what it keeps."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # As on the Hub, large files come from another host, at which the client stops following.
        self.storage = f"http://localhost:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.steps: list[str] = []

    def environment(self, home: Any, token: str | None = WRITE) -> dict[str, str]:
        """What a process needs to take this for the Hub, with a cache of its own in `home`."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return found if token is None else {**found, "HF_TOKEN": token}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    """The connection was closed."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        try:
            for method, pattern, step in ROUTES:
                found = re.fullmatch(pattern, self.path_only)
                if found and self.command in method.split("|"):
                    self._fault(step)
                    body = self._body()
                    with self.server.lock:
                        self.server.steps.append(step)
                        getattr(self, f"_{step}")(body, **found.groupdict())
                    return
            self._body()
            raise Refused(404, f"no such page: {self.command} {self.path_only}")
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self._send(error.status, {"error": error.message}, headers)
        except Dropped:
            self.close_connection = True

    def _fault(self, step: str) -> None:
        fault = self.server.faults.get(step)
        if fault is None or fault.times == 0:
            return
        if fault.times is not None:
            fault.times -= 1
        time.sleep(fault.seconds)
        if fault.status == DROP:
            self.rfile.read(max(1, int(self.headers.get("Content-Length") or 2) // 2))
            self.connection.close()
            raise Dropped
        if fault.status != 200:
            self._body()
            raise Refused(fault.status, f"as the test wants at {step}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks ----------------------------------------------------------------------------

    def _access(self) -> dict[str, Any] | None:
        """What the request's token may do; None: there is no token."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        access = TOKENS.get(given.removeprefix("Bearer "))
        if access is None:
            raise Refused(401, BAD_TOKEN)
        return access

    def _check_write(self, repo: str) -> None:
        access, owner = self._access(), repo.partition("/")[0]
        if access is None:
            raise Refused(401, "You have to log in")
        if access["role"] == "read" or owner not in (USER, GROUP):
            raise Refused(403, f"You don't have the rights to write under {owner}")

    def _repository(self, repo: str) -> Repository:
        found = self.server.repositories.get(repo)
        access = self._access()
        if found is None or (found.private and access is None):
            raise Refused(401 if access is None else 404, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self._repository(repo)
        oid = repository.find(revision)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # -- steps -------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> None:
        access = self._access()
        if access is None:
            raise Refused(401, BAD_TOKEN)
        groups = [{"name": GROUP, "roleInOrg": "write"}, {"name": OTHER_GROUP, "roleInOrg": "read"}]
        auth = {"type": "access_token", "accessToken": {"displayName": "mine", **access}}
        self._send(200, {"type": "user", "name": USER, "orgs": groups, "auth": auth})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        repo = f"{owner}/{asked['name']}"
        self._check_write(repo)
        address = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repositories:
            return self._send(409, {"error": "You already created this model repo", **address})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[repo] = Repository(private)
        return self._send(200, address)

    def _validate(self, body: bytes) -> None:
        parts = json.loads(body)["content"].split("---\n", 2)
        try:
            metadata = yaml.safe_load(parts[1]) if len(parts) == 3 else None
        except yaml.YAMLError as error:
            return self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        warned = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._send(200, {"errors": [], "warnings": warned})

    def _model(self, body: bytes, repo: str, revision: str = "main") -> None:
        oid, files = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.server.repositories[repo].private
        content = {"_id": "0", "id": repo, "modelId": repo, "sha": oid, "tags": []}
        self._send(200, {**content, "private": private, "siblings": siblings})

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        self._check_write(repo)
        branches = self._repository(repo).branches
        if revision in branches:
            raise Refused(409, f"Reference already exists: {revision}")
        branches[revision] = branches["main"]
        self._send(200)

    def _tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        _, files = self._commit_of(repo, revision)
        prefix = f"{folder}/" if folder else ""
        found = [self._entry(path, blob) for path, blob in files.items() if path.startswith(prefix)]
        if folder and not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self._send(200, found)

    def _paths(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._commit_of(repo, revision)
        asked = json.loads(body)["paths"]
        self._send(200, [self._entry(path, files[path]) for path in asked if path in files])

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
        lfs = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
        return {**entry, "lfs": lfs} if blob.is_lfs else entry

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._check_write(repo)
        _, there = self._commit_of(repo, revision)
        content, files = json.loads(body), []
        rules = content.get("gitIgnore")
        if rules is None:
            rules = there[".gitignore"].data.decode() if ".gitignore" in there else ""
        for asked in content["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS) else "regular"
            oid = there[path].oid if path in there else None
            # Of all that git knows, folders at the root: "/name/".
            ignored = any(f"/{path}".startswith(rule) for rule in rules.split())
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._send(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        self._check_write(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.server.url}/lfs-verify/{repo}"}
            new = asked["oid"] not in self.server.uploads
            actions = {"actions": {"upload": upload, "verify": verify}} if new else {}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        self.server.uploads[oid] = body
        self._send(200)

    def _verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        if len(self.server.uploads.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        self._send(200)

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        self._check_write(repo)
        _, files = self._commit_of(repo, revision)
        files, summary = dict(files), ""
        for line in body.splitlines():
            kind, value = json.loads(line).values()
            if kind == "header":
                summary = value["summary"]
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.server.uploads:
                    raise Refused(400, "the LFS object was not uploaded")
                files[value["path"]] = Blob(self.server.uploads[value["oid"]], is_lfs=True)
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"unknown operation {kind}")
        oid = self.server.repositories[repo].commit(revision, files, summary)
        address = f"{self.server.url}/{repo}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": address})

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        oid, files = self._commit_of(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"", headers)
        blob = files[path]
        headers["ETag"] = f'"{blob.oid}"'
        if not blob.is_lfs:
            return self._send(200, blob.data, headers)
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        headers["Location"] = f"{self.server.storage}/lfs/{blob.oid}"
        return self._send(302, b"", headers)

    def _download(self, body: bytes, oid: str) -> None:
        if oid not in self.server.uploads:
            raise Refused(404, "no such object")
        self._send(200, self.server.uploads[oid], {"ETag": f'"{oid}"'})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"{_API}/branch/{_REVISION}", "branch"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths"),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", "tree"),
    ("GET|HEAD", rf"{_API}/revision/{_REVISION}", "model"),
    ("GET|HEAD", _API, "model"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", f"/lfs-verify/{_REPO}", "verify"),
    ("GET|HEAD", "/lfs/(?P<oid>[0-9a-f]{64})", "download"),
    ("GET|HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server, stopped at the end."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
