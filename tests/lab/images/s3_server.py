"""moto as an S3 server in a container, on the port and with the health check of the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_moto = DomainDispatcherApplication(create_backend_app)


def _answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/health":
        start("200 OK", [])
        return []
    return _moto(environ, start)  # type: ignore[no-any-return]


run_simple("0.0.0.0", 7070, _answer, threaded=True)
