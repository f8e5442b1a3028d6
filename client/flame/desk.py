"""The desk: what a future asks of the client and process that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flame.courier import Courier
from flame.futures import ObjectFuture
from flame.values import Values
from flame_broker.codec import Encoded, decode_value
from flame_broker.errors import MalformedMessage, PackagingError
from flame_broker.messages import Result, Status, call_id
from flame_broker.objects import ObjectRef
from flame_broker.outcomes import decode_error, decode_failure

__all__ = ["Desk"]

_FAILURES = (Status.ERROR, Status.FAILED)


class Desk:
    """Opens outcomes and gives up calls.

    Args:
        client_id: Whose calls.
        courier: Who carries them.
        values: Where large ones lie.
    """

    def __init__(self, client_id: str, courier: Courier, values: Values) -> None:
        self.client_id = client_id
        self._courier = courier
        self._values = values
        self.may_block = courier.may_block
        self.lines_of = courier.replies.log_book.lines_of

    def withdraw(self, future: ObjectFuture[Any]) -> bool:
        """Give up on a call; False if its outcome is already here."""
        return self._courier.withdraw(future.counter)

    def recall(self, futures: Iterable[ObjectFuture[Any]]) -> None:
        """Have calls that are on their way cancelled, unless they have started."""
        self._courier.recall([future.counter for future in futures])

    def in_background(self, work: Callable[[], object]) -> None:
        """Run in a thread of the client's pool."""
        self._values.in_background(work)

    def open_outcome(self, result: Result, label: str) -> tuple[Any, BaseException | None]:
        """Decode an outcome of what is called ``label`` into a value or an exception; may download.

        Raises:
            StoreError: The value could not be fetched; another try may succeed.
        """
        if result.status in _FAILURES:
            return None, self._open_failure(result, label)
        try:
            if result.ref is None:
                return decode_value(result.payload), None
            return self._values.get_object(result.ref), None
        except (PackagingError, MalformedMessage) as exc:
            problem = PackagingError(
                f"the result of call {call_id(self.client_id, result.counter)} cannot be rebuilt "
                f"here: {type(exc).__name__}: {exc}"
            )
            problem.__cause__ = exc
            return None, problem

    def open_stream(
        self, items: Iterable[Result], outcome: Result, label: str
    ) -> tuple[Any, BaseException | None]:
        """Decode the items of a generator into a list, or its exception; may download.

        Raises:
            StoreError: An item could not be fetched; another try may succeed.
        """
        if outcome.status in _FAILURES:
            return self.open_outcome(outcome, label)
        values: list[Any] = []
        for item in items:
            value, exc = self.open_outcome(item, label)
            if exc is not None:
                return None, exc
            values.append(value)
        return values, None

    def _open_failure(self, result: Result, label: str) -> BaseException:
        name = call_id(self.client_id, result.counter)
        if result.status is Status.ERROR:
            return decode_error(result.payload, name)
        return decode_failure(result.payload, name, label)

    def store_value(self, result: Result | None, value: object) -> ObjectRef:
        """Upload a small result that somebody wants a reference to."""
        if result is None:
            return self._values.put_object(value)
        return self._values.put(Encoded((result.payload,), len(result.payload)))
