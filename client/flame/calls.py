"""Making calls: arguments in, a future out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from flame.arguments import find_futures, replace_futures
from flame.futures import ObjectFuture
from flame.lanes import NO_TERMS, Keeping, Lane, Terms
from flame.packaging import PackedTarget, local_code
from flame.retry import Retry
from flame.window import Gate
from flame_broker.codec import Encoded, encode_arguments, encode_scalars, encode_value
from flame_broker.errors import FlameError, PackagingError
from flame_broker.messages import INLINE_BYTES, Call, CallSpec, Priority
from flame_broker.resources import DEFAULT_CLASS
from flame_broker.topology import DEFAULT_POOL, calls_exchange, calls_queue, tracked

if TYPE_CHECKING:
    from flame.client import Client, Session

__all__ = ["CallOptions", "Caller"]

_COPY_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How the calls of a service run.

    Args:
        label: The name on the console.
        resources: The resource class.
        timeout_s: Run timeout; 0 for none.
        queue_timeout_s: How long a call may wait for a worker; 0 for ever.
        priority: Which of the pool's queues.
        pool: Whose workers.
        echo: Print the calls' output here.
        limit: At most so many at once; None for as many as the workers take.
        track: Keep the calls' story in the ledger.
        retry: Which failures are tried again.
        kept: The orchestrator has the calls run: it owns time.
        at_most_once: Never start a call twice.
    """

    label: str
    resources: str = DEFAULT_CLASS
    timeout_s: float = 0.0
    queue_timeout_s: float = 0.0
    priority: Priority = Priority.NORMAL
    pool: str = DEFAULT_POOL
    echo: bool = True
    limit: int | None = None
    track: bool = True
    retry: Retry | None = None
    kept: bool = False
    at_most_once: bool = False


class Caller:
    """Makes the calls of one target with one set of options.

    Args:
        client: Who sends them.
        packed: What they run.
        options: How.
        gate: A limit that several callers share; by default each has its own.
    """

    def __init__(
        self,
        client: Client,
        packed: PackedTarget,
        options: CallOptions,
        *,
        gate: Gate | None = None,
    ) -> None:
        self.client = client
        self.options = options
        self._packed = packed
        self._gate = Gate(options.limit) if gate is None and options.limit else gate
        self._session: Session | None = None
        self._lane: Lane | None = None

    def submit(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], terms: Terms = NO_TERMS
    ) -> ObjectFuture[Any]:
        """Make one call.

        Args:
            args: Its arguments.
            kwargs: Its arguments by name.
            terms: When, and once for what; for calls that are kept.

        Raises:
            PackagingError: An argument cannot be pickled.
            ConfigError: An argument is large and there is no object store.
        """
        # The hot path of a client: about 4 µs a call.
        session, lane = self.board()
        payload = None if kwargs else encode_scalars(args)
        if payload is not None and len(payload) <= INLINE_BYTES:
            future = self._make_future(session, terms)
            session.courier.submit(lane, Call(future.counter, payload))
            return future
        try:
            with local_code:
                encoded = encode_arguments(args, kwargs)
        except PackagingError as exc:
            return self._submit_when_ready(args, kwargs, exc, terms)
        if encoded.nbytes > INLINE_BYTES:
            return self._submit_stored(encoded, terms)
        future = self._make_future(session, terms)
        session.courier.submit(lane, Call(future.counter, encoded.join(), encoded.refs))
        return future

    def blame(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PackagingError | None:
        """The error for arguments that could not be pickled: it says which one is to blame."""
        for name, value in [*enumerate(args, 1), *kwargs.items()]:
            try:
                with local_code:
                    encode_value(value)
            except PackagingError as exc:
                problem = PackagingError(
                    f"argument {name} of {self.options.label} cannot be sent: {exc}"
                )
                problem.__cause__ = exc
                return problem
        return None

    def failed(self, exc: BaseException) -> ObjectFuture[Any]:
        """A future that has failed already: for who reports errors through futures."""
        future = self._make_future(self.board()[0])
        self._end(future, exc)
        return future

    def board(self) -> tuple[Session, Lane]:
        """The client's present session and our lane in it; a forked child has its own."""
        session = self.client.session
        if session is not self._session or self._lane is None:
            self._lane = self._make_lane(session)
            self._session = session
        return session, self._lane

    def _make_lane(self, session: Session) -> Lane:
        options = self.options
        if self._gate is not None and self._session is not None:
            self._gate.inside = 0  # what the parent process had on its way is not ours
        queue = calls_queue(session.key_id, options.pool, options.resources, options.priority)
        exchange = ""
        if session.courier.reaches_workers:
            queue = tracked(queue, session.key_id)
            exchange = calls_exchange(session.key_id) if options.track else ""
        return Lane(
            queue=queue,
            exchange=exchange,
            spec=CallSpec(
                target=self._packed.target,
                resources=options.resources,
                timeout_s=options.timeout_s,
                echo=options.echo,
                label=options.label,
                track=options.track,
                retry_on=options.retry.names if options.retry is not None else (),
                exit_codes=options.retry.exit_codes if options.retry is not None else (),
                at_most_once=options.at_most_once,
            ),
            packed=self._packed,
            pool=options.pool,
            queue_timeout_s=0.0 if options.kept else options.queue_timeout_s,
            gate=self._gate,
            keeping=_keeping(options) if options.kept else None,
        )

    def _make_future(self, session: Session, terms: Terms = NO_TERMS) -> ObjectFuture[Any]:
        counter = next(session.courier.counters)
        future: ObjectFuture[Any] = ObjectFuture(session.desk, counter, self.options.label)
        future.lane = self._lane
        if self._gate is not None:
            future.gate = self._gate
        if terms is not NO_TERMS and self._lane is not None and self._lane.keeping is not None:
            self._lane.keeping.terms[counter] = terms
        session.courier.pending.records[counter] = future
        return future

    # ── large arguments ──────────────────────────────────────────────────────

    def _submit_stored(self, encoded: Encoded, terms: Terms) -> ObjectFuture[Any]:
        """Put the arguments into the store first.

        Up to 1 MiB is copied and sent in the background. More is stored before this returns:
        it would be read after the caller may have changed it, and a copy costs memory.
        """
        session, _ = self.board()
        values = session.values
        values.store  # noqa: B018  # its absence is the caller's error, not the future's
        future = self._make_future(session, terms)
        if encoded.nbytes <= _COPY_BYTES:
            copied = Encoded((encoded.join(),), encoded.nbytes, encoded.refs)
            values.in_background(partial(self._send_stored, future, copied), bounded=True)
        else:
            self._send_stored(future, encoded)
        return future

    def _send_stored(self, future: ObjectFuture[Any], encoded: Encoded) -> None:
        session, lane = self.board()
        try:
            ref = session.values.put(encoded)
            call = Call(future.counter, b"", (ref, *encoded.refs))
            session.courier.submit(lane, call)
        except FlameError as exc:
            self._end(future, exc)

    # ── futures as arguments ─────────────────────────────────────────────────

    def _submit_when_ready(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        problem: PackagingError,
        terms: Terms,
    ) -> ObjectFuture[Any]:
        """Make the call when the futures among its arguments are done; return at once.

        Raises:
            PackagingError: There are none: the arguments cannot be pickled for another reason.
        """
        upstream = {id(future): future for future in find_futures((args, dict(kwargs)))}
        if not upstream:
            raise self.blame(args, kwargs) or problem
        session, _ = self.board()
        future = self._make_future(session, terms)
        waited_for = [*upstream.values()]
        launch = partial(self._launch, future, waited_for, (args, dict(kwargs)))
        _when_all_done(waited_for, partial(session.values.in_background, launch))
        return future

    def _launch(
        self,
        future: ObjectFuture[Any],
        upstream: list[Future[Any]],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        session, lane = self.board()
        try:
            for failed in (one for one in upstream if one.done() and not _went_well(one)):
                failed.result(0)
            ready = replace_futures(arguments, _argument)
            with local_code:
                encoded = encode_arguments(*ready)
            if encoded.nbytes > INLINE_BYTES:
                self._send_stored(future, encoded)
            else:
                session.courier.submit(lane, Call(future.counter, encoded.join(), encoded.refs))
        except CancelledError:
            future.cancel()
        # Whatever an upstream call raised is the outcome of this one too.
        except BaseException as exc:  # noqa: BLE001
            self._end(future, exc)

    def _end(self, future: ObjectFuture[Any], exc: BaseException) -> None:
        session, _ = self.board()
        if session.courier.pending.records.pop(future.counter, None) is not None:
            future.fail_call(future.counter, exc)


def _keeping(options: CallOptions) -> Keeping:
    policy = options.retry.policy if options.retry is not None else None
    return Keeping(policy, options.queue_timeout_s)


def _argument(upstream: Future[Any]) -> Any:
    if isinstance(upstream, ObjectFuture):
        return upstream.as_argument()
    return upstream.result(0)


def _when_all_done(upstream: list[Future[Any]], then: Callable[[], object]) -> None:
    """Call back once: when all are done, or as soon as one has failed."""
    lock = threading.Lock()
    left = len(upstream)

    def arrived(future: Future[Any]) -> None:
        nonlocal left
        failed = not _went_well(future)
        with lock:
            before, left = left, 0 if failed else left - 1
        if before > 0 and left == 0:
            then()

    for future in upstream:
        # Not the override: nobody's event loop reads the result here.
        Future.add_done_callback(future, arrived)


def _went_well(future: Future[Any]) -> bool:
    if isinstance(future, ObjectFuture):
        return future.went_well()
    return not future.cancelled() and future.exception(0) is None
