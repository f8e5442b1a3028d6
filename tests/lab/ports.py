"""Free ports on the loopback interface."""

from __future__ import annotations

import random
import socket

__all__ = ["answers", "free_port"]

# Below Linux's range for outgoing connections (32768 and up), so that no client of a neighbour
# takes the port between our look and the server's bind.
_LOWEST, _HIGHEST = 20_000, 32_000
_random = random.SystemRandom()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    while True:
        port = _random.randrange(_LOWEST, _HIGHEST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def answers(port: int, *, timeout_s: float = 0.5) -> bool:
    """Say whether something accepts TCP connections on this port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout_s).close()
    except OSError:
        return False
    return True
