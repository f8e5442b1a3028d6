"""What a running call can know and say about itself.

``current_call()`` works in the process that runs a call, in any of its threads; the process that
runs calls provides it. Everywhere else it is ``None``, so a function that reports progress can
also be called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["CallContext", "current_call", "provide"]

Report = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class CallContext:
    """The call that runs here.

    Args:
        id: ``<client>-<counter>``.
        attempt: 1 for the first run, 2 after a retry, and so on.
        worker: The name of the worker.
        gpus: The GPUs of this slot, as in ``CUDA_VISIBLE_DEVICES``.
    """

    id: str
    attempt: int
    worker: str
    gpus: tuple[str, ...]
    _report: Report = field(repr=False, compare=False)

    def progress(self, fraction: float, text: str = "") -> None:
        """Tell the client how far the call is.

        At most ten reports a second travel; of more the newest wins, and the last always arrives.

        Args:
            fraction: From 0 to 1; what lies outside is brought to the nearer end.
            text: A few words for the progress bar.
        """
        self._report(min(1.0, max(0.0, float(fraction))), str(text))


Provider = Callable[[], CallContext | None]

_provider: Provider | None = None


def current_call() -> CallContext | None:
    """The call that this process is running, or None outside of one."""
    return None if _provider is None else _provider()


def provide(provider: Provider | None) -> None:
    """Say where ``current_call`` finds the call; for processes that run calls."""
    global _provider  # noqa: PLW0603  # one process runs one call at a time
    _provider = provider
