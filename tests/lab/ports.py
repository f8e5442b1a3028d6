"""Free ports on the loopback interface."""

from __future__ import annotations

import os
import random
import socket
from collections import deque

__all__ = ["answers", "free_port"]

# Below Linux's range for outgoing connections (32768 and up), so that no client of a neighbour
# takes the port between our look and the server's bind.
_LOWEST, _HIGHEST = 20_000, 32_000
_SHARES = 16
_random = random.SystemRandom()
_given: deque[int] = deque(maxlen=200)


def free_port() -> int:
    """Return a port that nobody listens on now, and that was not returned lately.

    Each process of a parallel run draws from a share of its own: what one has drawn, and its server
    has not bound yet, looks free to the others.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
    share = (_HIGHEST - _LOWEST) // _SHARES
    while True:
        port = _LOWEST + number * share + _random.randrange(share)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.append(port)
        return port


def answers(port: int, *, timeout_s: float = 0.5) -> bool:
    """Say whether something accepts TCP connections on this port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout_s).close()
    except OSError:
        return False
    return True
