"""A small stand-in for the Hugging Face hub, on this machine: what its client asks for, and the faults it meets."""

import contextlib
import hashlib
import json
import pathlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of folders as repositories, by their names OWNER/NAME."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, pathlib.Path], gated: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated = repositories, gated
        self.cut: dict[str, list[int]] = {}  # file -> of its next downloads, the bytes after which each breaks off
        self.refused: set[tuple[str, str]] = set()  # such as ("GET", file)
        self.loads: list[tuple[str, str]] = []  # file and Range of each download

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = [*parts[2:], "revision", "main"][:4]
        if len(parts) < 4:
            return self.answer(404)
        owner, name, kind, revision, *path = parts
        repository = f"{owner}/{name}"
        if repository == self.server.gated:
            return self.answer(403, error="GatedRepo")
        if repository not in self.server.repositories:
            return self.answer(401, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        folder = self.server.repositories[repository]
        if not is_api:
            return self.file(folder.joinpath(*path))
        files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": oid(p)} for p in folder.iterdir()]
        found = files if kind == "tree" else {"id": repository, "sha": COMMIT, "siblings": []}
        return self.answer(200, json.dumps(found).encode())

    def file(self, path: pathlib.Path) -> None:
        if (self.command, path.name) in self.server.refused:
            return self.answer(403)
        content, asked = path.read_bytes(), self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.server.loads.append((path.name, asked))
        cuts = self.server.cut.get(path.name)
        most = cuts.pop(0) if cuts and self.command == "GET" else None
        self.answer(206 if asked else 200, content[first:], headers, most)

    def answer(
        self, code: int, body: bytes = b"", headers: Any = None, most: int | None = None, error: str = ""
    ) -> None:
        self.send_response(code)
        for key, value in ({"X-Error-Code": error} if error else headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:most])
        if most is not None:
            self.close_connection = True


def oid(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(repositories: dict[str, pathlib.Path], gated: str = "") -> Iterator[Hub]:
    with Hub(repositories, gated) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
