"""An HTTP server that keeps what is PUT: ranges, etags, conditions, and faults on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from lab.wait import wait_until

__all__ = ["HttpStoreServer", "Seen"]


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str] = field(compare=False)


class HttpStoreServer:
    """The server, in a thread of this process.

    Attributes:
        objects: What it keeps, by path.
        seen: The requests so far.
        answers: Statuses that the next requests get instead of an answer, first to last.
        cut_after: How many bytes of a body the next replies send before the connection breaks.
        hold_after: After how many bytes of a body replies stand still until this is None.
        ranges: Whether it knows ranges.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.answers: list[int] = []
        self.cut_after: list[int] = []
        self.hold_after: int | None = None
        self.ranges = True
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.lab = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """URL that opens it as an object store."""
        return f"http://127.0.0.1:{self.port}/objects"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    lab: HttpStoreServer
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Tests look at ``seen``."""

    def do_PUT(self) -> None:
        lab = self.server.lab
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._disturbed():
            return
        with lab.lock:
            refused = self._condition_fails()
            if not refused:
                lab.objects[self.path] = content
        if refused:
            self._send(412)
            return
        self._send(201, headers={"ETag": _etag(content)})

    def do_DELETE(self) -> None:
        if self._disturbed():
            return
        with self.server.lab.lock:
            found = self.server.lab.objects.pop(self.path, None)
        self._send(404 if found is None else 204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._disturbed():
            return
        content = self.server.lab.objects.get(self.path)
        if content is None:
            self._send(404, b"no such object")
        elif self._condition_fails():
            self._send(412)
        else:
            self._send_content(content)

    def _send_content(self, content: bytes) -> None:
        headers = {"ETag": _etag(content), "Last-Modified": formatdate(usegmt=True)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not self.server.lab.ranges:
            self._send(200, content, headers)
            return
        start, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self._send(416, headers={"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self._send(206, content[start : last + 1], headers)

    def _disturbed(self) -> bool:
        lab = self.server.lab
        headers = {name.title(): value for name, value in self.headers.items()}
        with lab.lock:
            lab.seen.append(Seen(self.command, self.path, headers))
            status = lab.answers.pop(0) if lab.answers else None
        if status is not None:
            self._send(status, b"as the test wants it")
        return status is not None

    def _condition_fails(self) -> bool:
        content = self.server.lab.objects.get(self.path)
        if self.headers.get("If-None-Match") == "*" and content is not None:
            return True
        wanted = self.headers.get("If-Match")
        return wanted is not None and (content is None or wanted != _etag(content))

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        lab = self.server.lab
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with lab.lock:
            cut = lab.cut_after.pop(0) if lab.cut_after and status < 400 and content else None
        if lab.hold_after is not None:
            self.wfile.write(content[: lab.hold_after])
            content, cut = content[lab.hold_after :], None
            wait_until(lambda: lab.hold_after is None, 60)
        self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'
