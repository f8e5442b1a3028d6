"""A moto S3 server that counts the bytes it serves, in a process of its own.

`python -m s3_counting PORT`. `GET /__served` answers a JSON object: bytes of GET bodies by path.
That is how the benchmark knows how often an object was downloaded, ranges or not.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

SERVED_PATH = "/__served"

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Counting:
    """WSGI middleware around moto's application."""

    def __init__(self, application: Wsgi) -> None:
        self.application = application
        self.served: Counter[str] = Counter()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer one request, adding up what a GET sends."""
        path = environ["PATH_INFO"]
        if path == SERVED_PATH:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.served).encode()]
        body = self.application(environ, start_response)
        if environ["REQUEST_METHOD"] == "GET":
            return self.counted(path, body)
        return body

    def counted(self, path: str, body: Iterable[bytes]) -> Iterable[bytes]:
        """Pass the body on, block by block."""
        for block in body:
            self.served[path] += len(block)
            yield block


def served_bytes(endpoint: str) -> Counter[str]:
    """Ask a running server what it has served so far, in bytes by path."""
    with urllib.request.urlopen(endpoint + SERVED_PATH) as answer:
        return Counter(json.load(answer))


def serve(port: int) -> None:
    """Serve on loopback until killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    class Quiet(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Write no access log."""

    application = Counting(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True, request_handler=Quiet)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
