"""Data of buckets and of the Hugging Face hub, as the services' own libraries read them from stand-ins."""

import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest

from tests.test_data_files import data_config
from tests.test_inputs import TEXTS, json_lines, zstd
from tokenformer_jax.data.text import TextFiles
from tokenformer_jax.errors import UserError

FILES = {
    "data/0.jsonl.zst": zstd(json_lines(TEXTS[:100])),
    "data/sub/1.jsonl.gz": gzip.compress(json_lines(TEXTS[100:])),
    "README.md": b"readme",
    ".gitattributes": b"hidden",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the data set o/n as the hub does: what there is, the list of files, and parts of a file."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        head, _, name = path.partition("/resolve/main/")
        if name in FILES and head == "/datasets/o/n":
            raw = FILES[name]
            begin, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            return self.answer(206, raw[begin : end + 1], Content_Range=f"bytes {begin}-{end}/{len(raw)}")
        if path.startswith("/api/datasets/o/n/tree/main"):
            base = path.removeprefix("/api/datasets/o/n/tree/main").lstrip("/")
            folders = [{"type": "directory", "path": name, "oid": "", "size": 0} for name in ("data", "data/sub")]
            found = [*folders, *map(self.entry, FILES)]
            return self.answer(200, json.dumps([one for one in found if one["path"].startswith(base)]).encode())
        if path == "/api/datasets/o/n":
            return self.answer(200, json.dumps({"_id": "1", "id": "o/n", "sha": "a" * 40, "siblings": []}).encode())
        return self.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def entry(self, name):
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": f"hash of {name}"}

    def answer(self, code, raw, **headers):
        self.send_response(code)
        for name, value in {"Content_Length": len(raw), "Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)


def show(*urls):
    """Prints of each URL whether it holds all texts, what was skipped, and the files' stamps; or the error."""
    for url in urls:
        try:
            found = TextFiles(data_config(url))
            texts = sorted(document.text for document in found.documents())
            print(json.dumps([texts == sorted(TEXTS), found.skipped, [file.stamp for file in found.files]]))
        except UserError as error:
            print(json.dumps(str(error)))


def fill_bucket():
    import gcsfs

    system = gcsfs.GCSFileSystem(token="anon")
    for name, raw in FILES.items():
        system.pipe(f"corpus/d/{name}", raw)


def call(function, *args, **environment):
    """Calls one of these in a process of its own, since the libraries read the environment as they are imported."""
    command = [sys.executable, "-c", f"from tests.test_remote import *; {function.__name__}(*{args!r})"]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_of_the_hub():
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://localhost:{server.server_port}", "HF_HUB_DISABLE_TELEMETRY": "1"}
        stamps = ["hash of data/0.jsonl.zst", "hash of data/sub/1.jsonl.gz"]
        whole, glob, one, none = call(
            show,
            "hf://datasets/o/n",
            "hf://datasets/o/n/data/**/*.jsonl*",
            "hf://datasets/o/n/README.md",
            "hf://datasets/o/none",
            **hub,
        )
        server.shutdown()
    assert whole == [True, ["README.md"], stamps] and glob == [True, [], stamps]
    assert one == [False, [], ["hash of README.md"]]
    assert none.startswith("data.path = 'hf://datasets/o/none': ") and "\n" not in none


def test_a_bucket_of_google():
    """With the packages gcsfs and gcp-storage-emulator, which the tests do not install: they are large."""
    pytest.importorskip("gcsfs")
    create_server = pytest.importorskip("gcp_storage_emulator.server").create_server
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="corpus")
    server.start()
    try:
        # Without the second, gcsfs asks Google what kind of bucket it is.
        google = {"STORAGE_EMULATOR_HOST": f"http://localhost:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        call(fill_bucket, **google)
        whole, glob, none = call(show, "gs://corpus/d", "gs://corpus/d/data/**/*.jsonl*", "gs://corpus/none", **google)
    finally:
        server.stop()
    assert whole[:2] == [True, ["README.md"]] and glob == [True, [], whole[2]]
    assert all(len(stamp) == 24 for stamp in whole[2])  # MD5 sums
    assert none.startswith("data.path = 'gs://corpus/none': matches no")
