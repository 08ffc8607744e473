"""Real servers on loopback for the tests of remote stores: S3's API, static files, and the Hub's few paths."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """S3's API, from moto; gives a bucket's URL. The environment says where it is, as it would of any S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = fsspec.filesystem("s3", skip_instance_cache=True)
        s3.mkdir("lab")
        type(s3).clear_instance_cache()
        yield "s3://lab"
        type(s3).clear_instance_cache()
    server.stop()


class Static(SimpleHTTPRequestHandler):
    """Python's own static server, which knows no ranges; notes what is asked for."""

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))  # type: ignore[attr-defined]

    def log_error(self, *_: Any) -> None:
        pass


class StaticWithRanges(Static):
    """As nginx or a bucket's website answers a range."""

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        file = Path(self.translate_path(self.path))
        if not match or not file.is_file():
            return super().do_GET()
        data, start = file.read_bytes(), int(match[1])
        piece = data[start : int(match[2]) + 1 if match[2] else None]
        self.send_response(206 if start < len(data) else 416)
        self.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)


class Secretive(StaticWithRanges):
    """As a bucket whose reader may not list it: what is absent is forbidden."""

    def do_GET(self) -> None:
        if Path(self.translate_path(self.path)).is_file():
            return super().do_GET()
        return self.send_error(403)


@contextmanager
def static_server(folder: Path, handler: type[Static] = StaticWithRanges) -> Iterator[tuple[str, list[Any]]]:
    """A folder over HTTP; gives its URL and the list of requests, (path, range) each."""
    with _serving(partial(handler, directory=str(folder))) as (url, requests):
        yield url, requests


class Hub(BaseHTTPRequestHandler):
    """The paths of the Hugging Face Hub that a push and a read of one data set use; commits are kept in memory."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/lab/store/revision") or path == "/api/datasets/lab/store":
            return self._json({"id": "lab/store", "sha": "0" * 40, "siblings": []})
        if path.startswith("/api/datasets/lab/store/tree"):
            return self._json([self._about(name) for name in self._files])
        name = re.sub(r"^.*?/resolve/[^/]+/", "", path)
        if name not in self._files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._file(self._files[name])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._json({"files": [{"path": name, **mode} for name in names]})
        if "/paths-info/" in self.path:
            wanted = json.loads(body)["paths"]
            return self._json([self._about(name) for name in wanted if name in self._files])
        commit = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in commit if line["key"] == "file"]
        self._files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.server.requests.append([file["path"] for file in files])  # type: ignore[attr-defined]
        return self._json(
            {
                "commitUrl": f"http://{self.headers['Host']}/datasets/lab/store/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "hookOutput": "",
            }
        )

    @property
    def _files(self) -> dict[str, bytes]:
        return vars(self.server).setdefault("files", {})

    @_files.setter
    def _files(self, files: dict[str, bytes]) -> None:
        vars(self.server)["files"] = files

    def _about(self, name: str) -> dict[str, Any]:
        data = self._files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, data: bytes) -> None:
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        piece = data[int(match[1]) : int(match[2]) + 1] if match else data
        self._answer(206 if match else 200, piece, tag)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub_server(files: dict[str, bytes] | None = None) -> Iterator[tuple[str, list[list[str]]]]:
    """A stand-in for the Hub with one data set of these files; gives its address and the commits, names of each."""
    with _serving(Hub, files=dict(files or {})) as (url, commits):
        yield url, commits


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of Python's 5, those who ask at once are dropped, and ask again a second later


@contextmanager
def _serving(handler: Any, **attributes: Any) -> Iterator[tuple[str, list[Any]]]:
    server = _Server(("127.0.0.1", 0), handler)
    vars(server).update(attributes)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
