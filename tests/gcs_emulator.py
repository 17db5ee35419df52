"""Google's storage on loopback: gcp-storage-emulator, which is extended by what our libraries want of the service.

It sends no `x-goog-generation`, without which TensorStore reads nothing, and takes no heed of `ifGenerationMatch`.
"""

import contextlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from urllib.parse import parse_qs, urlparse

import pytest

# What gcsfs, google-cloud-storage and TensorStore are told; without the second gcsfs asks Google what a bucket is like.
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT",
    "TENSORSTORE_GCS_HTTP_URL",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
)


class Emulator:
    """A server whose buckets are kept while it is out."""

    def __init__(self, *buckets: str):
        emulator = pytest.importorskip("gcp_storage_emulator.storage")
        from gcp_storage_emulator.handlers.buckets import create_bucket

        self.storage = emulator.Storage(use_memory_fs=True)
        for bucket in buckets:
            create_bucket(bucket, self.storage)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://localhost:{self.port}"
        self.lock = threading.Lock()
        self.environment = dict(zip(VARIABLES, (self.address, "false", self.address, "none"), strict=True))

    def start(self) -> None:
        self.server = http.server.ThreadingHTTPServer(("localhost", self.port), partial(_handler(self), self.storage))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def names(self, bucket: str) -> list[str]:
        """Of the objects in a bucket."""
        return [item["name"] for item in self.storage.get_file_list(bucket)[0]]

    def content(self, bucket: str, name: str) -> bytes:
        return self.storage.get_file(bucket, name)


@contextlib.contextmanager
def emulated(*buckets: str) -> Iterator[Emulator]:
    """The server, which this process and those that it starts are told of."""
    emulator = Emulator(*buckets)
    emulator.start()
    before = {name: os.environ.get(name) for name in emulator.environment}
    os.environ.update(emulator.environment)
    try:
        pytest.importorskip("gcsfs")  # which reads them
        yield emulator
    finally:
        emulator.stop()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


class _PreconditionFailed(Exception):
    pass


class _Checked:
    """The emulator's storage as one request sees it."""

    def __init__(self, storage, query):
        self.storage, self.expected, self.generation = storage, query.get("ifGenerationMatch", [None])[0], None

    def __getattr__(self, name):
        return getattr(self.storage, name)

    def get_file_obj(self, bucket, name):
        found = self.storage.get_file_obj(bucket, name)
        self.generation = found["generation"]
        return found

    def _check(self, bucket, name):
        from gcp_storage_emulator.exceptions import NotFound

        try:
            now = self.storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            now = "0"
        if self.expected not in (None, now):
            raise _PreconditionFailed

    def create_file(self, bucket, name, *others):
        self._check(bucket, name)
        return self.storage.create_file(bucket, name, *others)

    def delete_file(self, bucket, name):
        self._check(bucket, name)
        return self.storage.delete_file(bucket, name)


def _handler(emulator):
    from gcp_storage_emulator.server import RequestHandler

    class Handler(RequestHandler):
        def end_headers(self):
            if getattr(self.storage, "generation", None):
                self.send_header("x-goog-generation", self.storage.generation)
            super().end_headers()

        def do_GET(self):
            with emulator.lock:  # its storage is not made for threads
                super().do_GET()

        def do_POST(self):
            with emulator.lock:
                super().do_POST()

        def do_PUT(self):
            with emulator.lock:
                super().do_PUT()

        def do_DELETE(self):
            with emulator.lock:
                super().do_DELETE()

        def handle_one_request(self):
            plain = self.storage
            try:
                super().handle_one_request()
            except _PreconditionFailed:
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except (BrokenPipeError, ConnectionResetError, ValueError):  # whoever asked was killed
                self.close_connection = True
            finally:
                self.storage = plain

        def parse_request(self):
            parsed = super().parse_request()
            if parsed:
                self.storage = _Checked(self.storage, parse_qs(urlparse(self.path).query))
            return parsed

    return Handler
