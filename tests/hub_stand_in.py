"""A hub on the loopback address: as much of the model hub's HTTP interface as a download needs, with broken lines."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was asked for."""

    models: dict[str, Path]
    url: str = ""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File -> after how many bytes each of the next answers ends, in order. Spares requests for a start alone."""
    start_cuts: dict[str, list[int]] = field(default_factory=dict)
    """The same for requests that ask for a file's start alone."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> a size to tell instead of the true one."""
    extra: tuple[str, ...] = ()
    """Names to list beside those that are there."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, range."""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def downloads(self, suffix: str = "") -> list[str]:
        """Files of which bytes were asked for."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path and path.endswith(suffix)
        ]


@contextmanager
def running_hub(models: dict[str, Path]) -> Iterator[Hub]:
    """Serves folders as models by name until the block ends."""
    hub = Hub(models)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what matters is in `Hub.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._serve(match[1], match[2], match[3])
        else:
            self._refuse("EntryNotFound")

    def _describe(self, repo: str, revision: str | None) -> None:
        root = self.hub.models.get(repo)
        if root is None:
            return self._refuse("RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self._refuse("RevisionNotFound")
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        siblings = [
            {"rfilename": name, "size": self.hub.sizes.get(name, (root / name).stat().st_size)}
            for name in names
        ]
        siblings += [{"rfilename": name, "size": 1} for name in self.hub.extra]
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def _serve(self, repo: str, revision: str, name: str) -> None:
        root = self.hub.models.get(repo)
        if root is None or not (root / name).is_file():
            return self._refuse("RepoNotFound" if root is None else "EntryNotFound")
        raw = (root / name).read_bytes()
        start, end = 0, len(raw)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(len(raw), int(asked[2] or len(raw) - 1) + 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(raw)}")
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            is_start = asked is not None and bool(asked[2])
            self._send(name, raw[start:end], (self.hub.start_cuts if is_start else self.hub.cuts).get(name))
        return None

    def _send(self, name: str, body: bytes, cuts: list[int] | None) -> None:
        is_cut = bool(cuts)
        if cuts:
            body = body[: cuts.pop(0)]
        self.wfile.write(body)
        with self.hub.lock:
            self.hub.bytes_sent[name] = self.hub.bytes_sent.get(name, 0) + len(body)
        if is_cut:
            self.wfile.flush()
            self.close_connection = True

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
