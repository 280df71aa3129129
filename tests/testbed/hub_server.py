"""A hub for tests: a server on this machine that answers the few requests that pushing and pulling make.

It keeps whole trees by commit, takes every file in the commit itself (the real one asks for large files apart), wants
a token for writing, and counts what it was asked. The client is the real one.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_of_the_tests"


class Repository:
    """A repository: trees by commit, commits by branch."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.trees: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(repr((len(self.trees), branch, sorted(tree))).encode()).hexdigest()
        self.trees[sha], self.branches[branch] = dict(tree), sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.trees else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.trees[self.branches.get(revision, revision)]


class Hub:
    """The state of the server.

    Attributes:
        repositories: By `owner/name`.
        requests: `METHOD path` of each request.
        models: Ids of other models that there are.
        status: If set, the answer to everything.
        cut: If set, how many bytes of a file are sent, as of a connection that breaks off.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.models: set[str] = set()
        self.status: int | None = None
        self.cut: int | None = None

    def written(self) -> list[str]:
        """Return the requests that could have changed something."""
        return [request for request in self.requests if not request.startswith(("GET ", "HEAD "))]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: two would wait 40 ms for each other

    def do_GET(self) -> None:
        self.take()
        parts = self.parts
        if parts[:2] == ["api", "models"]:
            self.about("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815 - so the server calls it

    def do_POST(self) -> None:
        body = self.take()
        parts = self.parts
        if parts == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer(401)
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif parts[4] == "branch":
            repository = self.hub.repositories["/".join(parts[2:4])]
            known = parts[5] in repository.branches
            repository.branches.setdefault(parts[5], repository.branches["main"])
            self.answer(409 if known else 200, {})
        else:
            self.commit("/".join(parts[2:4]), parts[5], [json.loads(line) for line in body.splitlines()])

    def take(self) -> bytes:
        path = urlsplit(self.path).path
        self.parts = [unquote(part) for part in path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {path}")
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(self.hub.status or status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.hub.cut] if isinstance(content, bytes) else body)
            self.close_connection = self.hub.cut is not None

    def create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
        self.answer(409 if known else 200, {"url": f"http://{self.headers['host']}/{name}"})

    def about(self, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        hidden = repository and repository.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
        if repository is None and name in self.hub.models:
            self.answer(200, {"id": name, "sha": "0" * 40})
        elif repository is None or hidden:
            self.answer(401, None, {"X-Error-Code": "RepoNotFound"})  # so the hub answers who is not logged in
        elif (sha := repository.sha(rest[1] if rest else "main")) is None:
            self.answer(404, None, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            tree = repository.trees[sha].items()
            self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in tree])
        else:
            files = [{"rfilename": path, "size": len(content)} for path, content in repository.trees[sha].items()]
            self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": files})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories[name]
        sha = repository.sha(revision)
        content = repository.trees[sha].get(path)
        if content is None:
            self.answer(404, None, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": sha}
        first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        self.answer(200, content[int(first) : int(last) + 1 if last else None], headers)

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        repository = self.hub.repositories[name]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches[branch]):
            self.answer(412, {"error": "the branch has moved"})
            return
        tree = dict(repository.files(branch))
        for line in lines[1:]:
            if line["key"] == "file":
                tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "deletedFile"
                del tree[line["value"]["path"]]
        sha = repository.commit(branch, tree, header["summary"])
        url = f"http://{self.headers['host']}/{name}/commit/{sha}"
        self.answer(200, {"commitUrl": url, "commitOid": sha})

    def log_message(self, *args: object) -> None:
        """Write nothing."""


def oid(content: bytes) -> str:
    """Return the name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Run a hub for a block; gives its state and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


def point_client(patch: pytest.MonkeyPatch, address: str, token: str | None = TOKEN) -> None:
    """Let the client of this process ask the hub at an address, with this token."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setenv("HF_TOKEN", token or "")
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
