"""A Hub for tests: an HTTP server with the part of the protocol that the client uses for models.

Repositories with branches and commits, private ones shown to the owner's token only; upload by
`preupload`, the LFS batch API, PUT and an NDJSON commit; download by tree and `resolve` with ETags.
Stored objects are checked against the sha256 that the client claims. Everything is in memory.
"""

import base64
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import orjson
import yaml

TOKEN = "hf_of_the_owner"
LARGE_SUFFIXES = (".safetensors", ".pt")
BLOCK = 1 << 16


@dataclass(frozen=True)
class Blob:
    """A committed file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        """Git's name of the file, or of the pointer that stands for a large one."""
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.content)}\n"
        )
        stored = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(f"blob {len(stored)}\0".encode() + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


@dataclass
class Repository:
    """Branches name commits, commits name files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], summary: str) -> str:
        self.summaries.append(summary)
        names = sorted((name, blob.etag) for name, blob in files.items())
        name = hashlib.sha1(repr((len(self.summaries), names)).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class LocalHub:
    """State of the server, for tests to look at, and its switches."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[tuple[str, int]] = []
        """Large files that arrived whole: sha256 and bytes, in order."""
        self.cut_uploads = 0
        """Large files that broke off."""
        self.stall_after: int | None = None
        """Bytes of a large file after which the server waits for `go_on`."""
        self.stalled, self.go_on, self.cut = (threading.Event() for _ in range(3))
        self.corrupts = False
        """Whether committed regular files lose their last byte."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Give the files of a branch by name, without git's own."""
        repository = self.repositories[repo_id]
        blobs = repository.commits[repository.branches[branch]]
        return {name: blob.content for name, blob in blobs.items() if name != ".gitattributes"}


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _handler_of(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class BoundHandler(_Handler):
        state = hub

    return BoundHandler


class _Handler(BaseHTTPRequestHandler):
    state: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(DOWNLOADS)

    def do_GET(self) -> None:
        self._answer(DOWNLOADS)

    def do_POST(self) -> None:
        self._answer(POSTS)

    def do_PUT(self) -> None:
        self._answer(PUTS)

    def _answer(self, routes: "list[tuple[str, Route]]") -> None:
        path = unquote(urlsplit(self.path).path)
        self.is_read = False
        try:
            for pattern, route in routes:
                if match := re.fullmatch(pattern, path):
                    return route(self, *match.groups())
            raise RefusalError(404, "EntryNotFound", f"no such address: {path}")
        except RefusalError as refusal:
            if not self.is_read:
                self.body()
            body = orjson.dumps({"error": str(refusal)})
            self.send(body, status=refusal.status, headers={"X-Error-Code": refusal.code})

    def send(
        self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content: Any, *, status: int = 200) -> None:
        self.send(orjson.dumps(content), status=status)

    def body(self) -> bytes:
        """Read a body, sent whole or in chunks."""
        return b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """Yield a body block by block; ends early where the client is gone."""
        self.is_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0].strip() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (block := self.rfile.read(min(left, BLOCK))):
            left -= len(block)
            yield block

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str, *, writes: bool = False) -> Repository:
        found = self.state.repositories.get(repo_id)
        if found is None or (found.private and not self.is_owner):
            raise RefusalError(
                404 if self.is_owner else 401, "RepoNotFound", "Repository not found"
            )
        if writes and not self.is_owner:
            raise RefusalError(403, "Forbidden", "no write access")
        return found

    def files_at(self, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]


Route = Callable[..., None]


def create_repository(handler: _Handler) -> None:
    asked = orjson.loads(handler.body())
    if not handler.is_owner:
        raise RefusalError(401, "Unauthorized", "Invalid username or password.")
    repo_id = f"{asked['organization']}/{asked['name']}"
    known = handler.state.repositories
    address = {"url": f"{handler.state.url}/{repo_id}", "name": repo_id}
    if repo_id in known:
        return handler.send_json(
            {"error": "You already created this model repo"} | address, status=409
        )
    known[repo_id] = Repository(private=asked.get("visibility") == "private")
    attributes = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", is_lfs=False)}
    known[repo_id].commit("main", attributes, "initial commit")
    return handler.send_json(address)


def create_branch(handler: _Handler, repo_id: str, branch: str) -> None:
    handler.body()
    repository = handler.repository(repo_id, writes=True)
    if branch in repository.branches:
        return handler.send_json({"error": "Reference already exists"}, status=409)
    repository.branches[branch] = repository.branches["main"]
    return handler.send_json({})


def validate_card(handler: _Handler) -> None:
    """Refuse a header that is no YAML or lacks what the Hub shows, as the Hub does."""
    content = orjson.loads(handler.body())["content"]
    errors = []
    try:
        header = yaml.safe_load(content.split("---")[1])
        for index in header.get("model-index", []):
            for result in index["results"]:
                _ = result["task"]["type"], result["dataset"]["type"], result["metrics"][0]["value"]
    except (yaml.YAMLError, IndexError, KeyError, TypeError, AttributeError) as error:
        errors.append({"message": f"{type(error).__name__}: {error}"})
    handler.send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)


def preupload(handler: _Handler, repo_id: str, revision: str) -> None:
    asked = orjson.loads(handler.body())["files"]
    handler.repository(repo_id, writes=True)
    _, files = handler.files_at(repo_id, revision)
    answers = []
    for each in asked:
        base64.b64decode(each["sample"], validate=True)
        mode = "lfs" if each["path"].endswith(LARGE_SUFFIXES) else "regular"
        answer = {"path": each["path"], "uploadMode": mode, "shouldIgnore": False}
        if each["path"] in files:
            answer["oid"] = files[each["path"]].etag
        answers.append(answer)
    handler.send_json({"files": answers})


def lfs_batch(handler: _Handler, repo_id: str) -> None:
    asked = orjson.loads(handler.body())
    handler.repository(repo_id, writes=True)
    assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
    objects = []
    for each in asked["objects"]:
        answer = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] not in handler.state.objects:
            places = {"upload": "store", "verify": "verify"}
            answer["actions"] = {
                action: {"href": f"{handler.state.url}/{place}/{each['oid']}"}
                for action, place in places.items()
            }
        objects.append(answer)
    handler.send_json({"transfer": "basic", "objects": objects})


def store_object(handler: _Handler, claimed: str) -> None:
    """Take a large file if it arrives whole and is what was claimed."""
    hub = handler.state
    size, received = int(handler.headers["Content-Length"]), bytearray()
    for block in handler.blocks():
        received += block
        if hub.stall_after is not None and len(received) >= hub.stall_after:
            hub.stall_after = None
            hub.stalled.set()
            hub.go_on.wait(timeout=60)
    if len(received) < size:
        hub.cut_uploads += 1
        hub.cut.set()
        handler.close_connection = True
        return
    if hashlib.sha256(received).hexdigest() != claimed:
        raise RefusalError(400, "BadDigest", "content does not match its sha256")
    hub.objects[claimed] = bytes(received)
    hub.received.append((claimed, size))
    handler.send(b"")


def verify_object(handler: _Handler, claimed: str) -> None:
    asked = orjson.loads(handler.body())
    stored = handler.state.objects.get(claimed)
    if stored is None or (asked["oid"], asked["size"]) != (claimed, len(stored)):
        raise RefusalError(404, "ObjectNotFound", "no such object")
    handler.send_json({})


def commit(handler: _Handler, repo_id: str, revision: str) -> None:
    lines = [orjson.loads(line) for line in handler.body().splitlines()]
    repository = handler.repository(repo_id, writes=True)
    if revision not in repository.branches:
        raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    header, *operations = lines
    assert header["key"] == "header"
    files = dict(repository.commits[repository.branches[revision]])
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            content = base64.b64decode(value["content"], validate=True)
            kept = content[:-1] if handler.state.corrupts else content
            files[value["path"]] = Blob(kept, is_lfs=False)
        elif operation["key"] == "lfsFile":
            stored = handler.state.objects.get(value["oid"])
            if stored is None or value["algo"] != "sha256" or value["size"] != len(stored):
                raise RefusalError(400, "MissingObject", f"{value['path']} was never uploaded")
            files[value["path"]] = Blob(stored, is_lfs=True)
        else:
            raise RefusalError(400, "BadRequest", f"operation {operation['key']}")
    made = repository.commit(revision, files, header["value"]["summary"])
    url = f"{handler.state.url}/{repo_id}/commit/{made}"
    handler.send_json({"success": True, "commitOid": made, "commitUrl": url})


def model_info(handler: _Handler, repo_id: str, revision: str | None) -> None:
    made, files = handler.files_at(repo_id, revision or "main")
    siblings = [{"rfilename": name} for name in sorted(files)]
    private = handler.repository(repo_id).private
    content = {"id": repo_id, "modelId": repo_id, "sha": made, "private": private}
    handler.send_json(content | {"siblings": siblings, "tags": [], "downloads": 0})


def tree(handler: _Handler, repo_id: str, revision: str) -> None:
    _, files = handler.files_at(repo_id, revision)
    handler.send_json([_entry(name, blob) for name, blob in sorted(files.items())])


def paths_info(handler: _Handler, repo_id: str, revision: str) -> None:
    asked = parse_qs(handler.body().decode())["paths"]
    _, files = handler.files_at(repo_id, revision)
    handler.send_json([_entry(name, files[name]) for name in asked if name in files])


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_id}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


def download(handler: _Handler, repo_id: str, revision: str, name: str) -> None:
    made, files = handler.files_at(repo_id, revision)
    if name not in files:
        raise RefusalError(404, "EntryNotFound", f"no file {name}")
    headers = {"ETag": f'"{files[name].etag}"', "X-Repo-Commit": made, "Accept-Ranges": "bytes"}
    content = files[name].content
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
    if asked is None:
        return handler.send(content, headers=headers)
    start = int(asked[1])
    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return handler.send(content[start:], status=206, headers=headers)


_REPO = r"([^/]+/[^/]+)"
POSTS: list[tuple[str, Route]] = [
    (r"/api/repos/create", create_repository),
    (r"/api/validate-yaml", validate_card),
    (rf"/api/models/{_REPO}/branch/(.+)", create_branch),
    (rf"/api/models/{_REPO}/preupload/(.+)", preupload),
    (rf"/api/models/{_REPO}/commit/(.+)", commit),
    (rf"/api/models/{_REPO}/paths-info/(.+)", paths_info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    (r"/verify/([0-9a-f]{64})", verify_object),
]
PUTS: list[tuple[str, Route]] = [(r"/store/([0-9a-f]{64})", store_object)]
DOWNLOADS: list[tuple[str, Route]] = [
    (rf"/api/models/{_REPO}(?:/revision/(.+))?", model_info),
    (rf"/api/models/{_REPO}/tree/(.+)", tree),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", download),
]
