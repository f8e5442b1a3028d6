"""``flame.Schedule``: a call that the orchestrator makes again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.arguments import find_futures
from flame.packaging import local_code
from flame_broker.codec import encode_arguments
from flame_broker.errors import ConfigError, PackagingError
from flame_broker.frames import encode
from flame_broker.messages import INLINE_BYTES, Call, CallFrame, Deposit
from flame_broker.schedules import CatchUp, check_schedule
from flame_broker.topology import custody_queue

if TYPE_CHECKING:
    from flame.calls import Caller
    from flame.client import Client, Session
    from flame.futures import ObjectFuture
    from flame.inquiry import Facts

__all__ = ["Schedule", "Timetable", "put_schedule"]


class Timetable(NamedTuple):
    """When the calls of a schedule are made.

    Attributes:
        name: By which the schedule is known.
        cron: The expression.
        timezone: On whose clocks.
        catch_up: What becomes of times that were missed.
        overlap: Whether a call is made while an earlier one has not ended.
    """

    name: str
    cron: str
    timezone: str
    catch_up: CatchUp
    overlap: bool

    @classmethod
    def checked(
        cls, name: object, cron: object, timezone: object, catch_up: object, overlap: object
    ) -> Timetable:
        """One of what a user gives; the expression and the zone are judged by the orchestrator.

        Raises:
            TypeError: A value of a wrong type.
            ValueError: A value that it cannot have.
        """
        policy = check_schedule(name, catch_up, overlap)
        for what, value, example in (
            ("cron", cron, "0 3 * * *"),
            ("timezone", timezone, "Europe/Berlin"),
        ):
            if not isinstance(value, str):
                raise TypeError(f"{what}={value!r}: expected text as {example!r}")
        return cls(str(name), str(cron), str(timezone), policy, bool(overlap))


class Schedule:
    """A schedule that the orchestrator keeps; ``service.schedule`` makes one.

    It goes on without this program. Each of its calls is one like any other: ``flame ps`` lists it,
    and ``flame.attach`` has its result.

    Attributes:
        name: By which it is known.

    >>> nightly = service.schedule("0 3 * * *", "accounts.csv", name="nightly")
    >>> nightly.next_at()
    datetime.datetime(2026, 11, 27, 3, 0, tzinfo=datetime.timezone.utc)
    >>> nightly.run().get()
    """

    def __init__(self, client: Client, name: str) -> None:
        self.name = name
        self._client = client

    def facts(self) -> Facts:
        """All that is known of it, as ``flame schedule show --json`` prints it.

        Raises:
            FlameError: There is none of this name any more.
            NoOrchestrator: No orchestrator runs here.
        """
        return self._client.schedule(self.name)

    def next_at(self) -> datetime | None:
        """When its next call is due; None if it is paused, or no time is left."""
        found = self.facts().get("next_at")
        return datetime.fromtimestamp(found, UTC) if isinstance(found, (int, float)) else None

    def calls(self) -> list[str]:
        """The ids of its latest calls, the newest first, for ``flame.attach``; at most ten."""
        found: Any = self.facts().get("calls") or ()
        return [str(call["id"]) for call in found]

    def run(self) -> ObjectFuture[Any]:
        """Make a call now, besides those on time; also where it is paused."""
        from flame.attached import attach

        return attach(self._client.run_schedule(self.name), client=self._client)

    def pause(self) -> None:
        """Make no more calls until ``resume``."""
        self._client.pause_schedule(self.name)

    def resume(self) -> None:
        """Go on with the next time from now; what was due meanwhile is not caught up on."""
        self._client.resume_schedule(self.name)

    def remove(self) -> None:
        """Forget it; calls that it has made go on."""
        self._client.remove_schedule(self.name)

    def __repr__(self) -> str:
        return f"<flame.Schedule {self.name}>"


def put_schedule(
    caller: Caller, args: tuple[Any, ...], kwargs: Mapping[str, Any], times: Timetable
) -> Schedule:
    """Have the orchestrator write a schedule down; what its calls need is stored before.

    Raises:
        PackagingError: An argument cannot be pickled, or is a future.
        ConfigError: There is no object store for what needs one, or the service has a limit.
        FlameError: The orchestrator refused the expression or the time zone; it says why.
        NoOrchestrator: None runs here.
    """
    options = caller.options
    if options.limit is not None:
        raise ConfigError(
            f"{options.label} has autoscale=False, which counts the calls of this client; those of "
            "a schedule are the orchestrator's: overlap=False has it make one at a time"
        )
    session, lane = caller.board()
    frame = CallFrame(
        queue=lane.queue.name,
        reply="",
        client="",
        spec=replace(lane.spec, echo=False, track=True),
        calls=(_call(caller, session, args, kwargs),),
    )
    session.courier.make_ready(lane)
    queue = custody_queue(session.key_id).name
    retry = None if options.retry is None else options.retry.policy
    deposit = Deposit(queue, frame, (0.0,), ("",), retry, options.queue_timeout_s)
    body = encode(deposit, session.signer)
    session.courier.ask(lambda inquiry: inquiry.ask("schedule", deposit=body, **times._asdict()))
    return Schedule(caller.client, times.name)


def _call(
    caller: Caller, session: Session, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """The call that every firing repeats."""
    if find_futures((args, dict(kwargs))):
        raise PackagingError(
            f"a future cannot be an argument of a schedule of {caller.options.label}: pass what it "
            "gives, or its ref()"
        )
    try:
        with local_code:
            encoded = encode_arguments(args, kwargs)
    except PackagingError as problem:
        raise caller.blame(args, kwargs) or problem from problem
    if encoded.nbytes > INLINE_BYTES:
        return Call(0, b"", (session.values.put(encoded), *encoded.refs))
    return Call(0, encoded.join(), encoded.refs)
