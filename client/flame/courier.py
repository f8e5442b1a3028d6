"""The courier: one thread with an event loop that carries calls out and results back.

It is started when a client is first used, never at import. A forked child has no such thread; its
client makes a courier of its own, and the parent's futures fail there with a clear error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import chain, count, repeat
from queue import SimpleQueue
from time import monotonic
from typing import Final, TypeVar

from flame.answers import Answers
from flame.bell import take
from flame.clusters import Cluster
from flame.expiry import Expiry
from flame.inquiry import Inquiry
from flame.lanes import Lane, Pending, Record
from flame.reaching import bounded, forget, reach
from flame.replies import Replies
from flame.sending import Sender
from flame.silence import Silence
from flame_broker.connect import open_transport
from flame_broker.errors import BrokerUnavailable, CallCancelled, FlameError
from flame_broker.keys import Keyring
from flame_broker.logs import get_logger
from flame_broker.messages import Call, call_id
from flame_broker.topology import (
    calls_exchange,
    control_exchange,
    logs_exchange,
    logs_queue,
    reply_queue,
    tracked,
)
from flame_broker.transport import Consumer, QueueSpec, TellsOfWaiting, Transport

__all__ = ["Courier"]

_DRAIN_S: Final = 5.0
_LAST_WORDS_S: Final = 0.15  # workers send output up to 50 ms after the result it belongs to
_REPLIES_AHEAD: Final = 512
_RECONCILE_AFTER_S: Final = (0.5, 3.0, 10.0, 30.0)
_RECONCILE_EVERY_S: Final = 60.0
_MOST_MISSING: Final = 10_000
_EVENTS_AHEAD: Final = 64

_log = get_logger("flame.client")

T = TypeVar("T")


def _closed_early(call: str) -> CallCancelled:
    return CallCancelled(
        "the client was closed before the result arrived; the call itself may go on", call
    )


class Courier:
    """Carries the calls of one client in one process.

    Args:
        client_id: Whose calls these are.
        url: The broker.
        keyring: The first key signs, all verify.
        upload: Brings a lane's target into the store; blocks.
        cluster: Started before connecting and stopped at the end, in the courier's loop.

    Attributes:
        counters: Numbers for calls.
        pending: The calls whose outcome somebody waits for.
    """

    def __init__(
        self,
        client_id: str,
        url: str,
        keyring: Keyring,
        *,
        upload: Callable[[Lane], None],
        cluster: Cluster | None = None,
    ) -> None:
        self.counters = count(1)
        self.pending = Pending()
        self._client_id = client_id
        self._key = keyring.signer
        self._cluster = cluster
        self._url = url
        self._epoch = 0
        self._awake = False
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._transport: Transport = open_transport(url, name=f"flame client {client_id}")
        self._consumer: Consumer | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._followers: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="flame-courier", daemon=True)
        self._sender = Sender(
            self._transport, self._key, client_id, self.pending, wake=self._wake, upload=upload
        )
        self.answers = Answers(keyring)
        self.replies = Replies(
            self.answers,
            self.pending,
            released=self._sender.released,
            unblock=self._sender.unblock,
            disown=self._sender.disown,
        )
        self._inquiry = Inquiry(self._transport, keyring, self.answers, lambda: self._sender.reply)
        self._expiry = self._sender.expiry = Expiry(
            self._inquiry, client_id, self.pending, self._sender.fail
        )
        self._silence = Silence(
            self._inquiry,
            self.pending,
            last_result_s=lambda: self.replies.last_result_s,
            key_id=self._key.hex_id,
            connected=lambda: self._transport.connected,
        )

    # ── from any thread ──────────────────────────────────────────────────────

    def start(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailable: No broker answered within 10 s.
        """
        self._thread.start()
        try:
            self._have_done(self._open)
        except BaseException:  # Ctrl-C too; it goes on, and no thread is left without a client
            self._stop_loop()
            raise

    def submit(self, lane: Lane, call: Call) -> None:
        """Queue a call whose record stands in ``pending`` already."""
        lane.put(call)
        if self._closed:
            self._refuse([call])
        # The loop clears the flag before it looks into the outbox, so no call is overlooked.
        if not lane.busy:
            self._sender.stir(lane)

    def submit_all(self, lane: Lane, calls: list[Call]) -> None:
        """Queue several."""
        lane.put_all(calls)
        if self._closed:
            self._refuse(calls)
        self._sender.stir(lane)

    def withdraw(self, counter: int) -> bool:
        """Give up on a call; False if its outcome is already here."""
        record = self.pending.records.pop(counter, None)
        if record is None:
            return False
        self._call_in_loop(partial(self._withdrawn, counter, record))
        return True

    def abandon(self, counters: list[int]) -> None:
        """Give up on calls that share a record; what is published of them is cancelled."""
        if not self._closed:
            self._call_in_loop(partial(self._abandoned, counters))

    def recall(self, counters: list[int]) -> None:
        """Have published calls cancelled unless they have started; their outcome says which."""
        self._call_in_loop(partial(self._sender.cancel, counters, spare_running=True))

    def cancel_foreign(self, owner: str, counter: int) -> None:
        """Have a call cancelled that another client has made."""
        self._call_in_loop(partial(self._sender.cancel, [counter], owner=owner))

    def follow(self, work: Callable[[Inquiry], Coroutine[None, None, None]]) -> None:
        """Let something go on in the loop until it ends, or the client is closed."""
        self._check_open()
        self._call_in_loop(lambda: self._keep(work(self._inquiry)))

    def may_block(self) -> bool:
        """False in the courier's own thread."""
        return threading.get_ident() != self._thread.ident

    def ask(self, question: Callable[[Inquiry], Coroutine[None, None, T]]) -> T:
        """Put a question to the cluster and wait for the answer."""
        self._check_open()
        if not self.may_block():
            raise FlameError("the cluster cannot be asked inside a done-callback")
        return self._have_done(lambda: question(self._inquiry), or_give_up=True)

    def make_ready(self, lane: Lane) -> None:
        """Have everything in its place that a call of this lane needs, though none is made here.

        Raises:
            FlameError: The broker or the store refused.
        """
        self.ask(lambda _: self._sender.make_ready(lane))

    @property
    def embedded(self) -> bool:
        """Whether the cluster lives in this process."""
        return self._cluster is not None

    @property
    def server(self) -> str:
        """What the broker says it is."""
        return self._transport.server

    @property
    def reaches_workers(self) -> bool:
        """Whether workers can be asked and told."""
        return self._inquiry.reaches_workers

    def get_ready(self) -> None:
        """Do what needs pools of threads before the interpreter ends those: store new targets."""
        self._have_done(lambda: self._sender.get_ready(_DRAIN_S))

    def close(self) -> None:
        """Send what is queued, disconnect, end the thread. What is pending fails."""
        if self._closed:
            return
        self._closed = True
        try:
            self._have_done(self._close)
            self._stop_loop()
            self.replies.console.close()
        finally:  # also after Ctrl-C: threads may wait for what is pending
            self._fail_pending(_closed_early)

    def after_fork(self) -> None:
        """In a forked child, where this thread does not exist: end what is pending."""
        self._closed = True
        for record in self.pending.records.values():
            record.forget_locks()
        self._fail_pending(
            lambda call: FlameError(
                f"call {call} belongs to the process that made it; a forked child has a "
                "connection of its own and cannot receive the parent's results"
            )
        )

    def _fail_pending(self, make: Callable[[str], FlameError]) -> None:
        while self.pending.records:
            counter, record = self.pending.records.popitem()
            record.fail_call(counter, make(call_id(self._client_id, counter)))

    def _refuse(self, calls: list[Call]) -> None:
        """End calls that came too late for ``close`` to end them, and say so."""
        for counter, _, _ in calls:
            if (record := self.pending.records.pop(counter, None)) is not None:
                record.fail_call(counter, _closed_early(call_id(self._client_id, counter)))
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise FlameError("this client is closed; flame.connect() makes a new one")

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._call_in_loop(self._flush)

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError as exc:
            raise FlameError("this client is closed; flame.connect() makes a new one") from exc

    # ── in the loop ──────────────────────────────────────────────────────────

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_end_tasks())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _have_done(
        self, work: Callable[[], Coroutine[None, None, T]], *, or_give_up: bool = False
    ) -> T:
        """Have our loop do something, and wait; Ctrl-C ends the wait, the work if ``or_give_up``.

        What asyncio has for this waits with a lock, which Ctrl-C can leave behind: see ``Bell``.
        """
        begun: list[asyncio.Task[T]] = []
        ended: SimpleQueue[None] = SimpleQueue()

        def end(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # looked at, though perhaps nobody waits any more
            ended.put(None)

        def begin() -> None:
            begun.append(self._loop.create_task(work()))
            begun[0].add_done_callback(end)

        def give_up() -> None:
            begun[0].cancel()

        self._loop.call_soon_threadsafe(begin)
        try:
            take(ended)
        except BaseException:  # Ctrl-C, or what another signal raises
            if or_give_up:
                self._loop.call_soon_threadsafe(give_up)
            raise
        if begun[0].cancelled():
            raise FlameError("the client was closed meanwhile")
        return begun[0].result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _flush(self) -> None:
        self._awake = False
        self._sender.flush()
        self._silence.watch()

    async def _open(self) -> None:
        async with bounded():
            await self._connect()

    async def _connect(self) -> None:
        if self._cluster is not None:
            await self._cluster.start()
        transport, key_id = self._transport, self._key.hex_id
        await reach(transport)
        if isinstance(transport, TellsOfWaiting):
            transport.waits_while(lambda: bool(self.pending.records))
        transport.on_reconnect = self._reconnected
        if not transport.capabilities.fanout:
            await self._listen()
            return
        await transport.declare_exchange(control_exchange(key_id), "fanout")
        await transport.declare_exchange(calls_exchange(key_id), "topic")
        logs, ear = logs_exchange(key_id), logs_queue(key_id, self._client_id)
        await transport.declare_exchange(logs, "topic")
        await transport.declare(ear)
        await self._listen()
        await transport.consume(
            ear.name, partial(self.replies.on_event, logs), prefetch=_EVENTS_AHEAD
        )

    async def _listen(self) -> None:
        queue = self._reply_queue()
        await self._transport.declare(queue)
        self._consumer = await self._transport.consume(
            queue.name, self.replies.on_reply, prefetch=_REPLIES_AHEAD
        )
        self._sender.reply = queue.name

    def _reply_queue(self) -> QueueSpec:
        queue = reply_queue(self._key.hex_id, self._client_id, self._epoch)
        if not self.reaches_workers:
            return queue
        # Calls that were published before the loss still answer to the address they carry.
        return tracked(queue, self._key.hex_id, also=self.answers.lost_queues)

    def _reconnected(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self._reconnecting = self._loop.create_task(self._check_reply_queue())

    async def _check_reply_queue(self) -> None:
        """The queue may be down with its node: then results come to the next epoch's."""
        try:
            await self._declare_reply_queue()
            if self._sender.reply != self._reply_queue().name:
                await self._listen()
        except BrokerUnavailable:
            return  # lost again; the next reconnect comes here
        await self._reconcile()

    async def _declare_reply_queue(self) -> None:
        queue = self._reply_queue()
        try:
            await self._transport.declare(queue)
        except BrokerUnavailable:
            raise
        except FlameError as exc:
            _log.warning("reply_queue.lost", queue=queue.name, reason=str(exc))
            self.answers.lost_queues.append(queue.name)
            self._epoch += 1

    async def _reconcile(self) -> None:
        """Have results sent again that our queue lost, or that came while there was none.

        What the ledger has yet to hear of is asked for a little later. Calls that answer to a queue
        that is lost are asked for until they have ended, since their results may be written down at
        any time, also by an orchestrator that was lost with that queue's node.
        """
        published = [n for n, r in [*self.pending.records.items()] if r.published]
        later = repeat(_RECONCILE_EVERY_S) if self.answers.lost_queues else ()
        for pause_s in chain(_RECONCILE_AFTER_S, later):
            await asyncio.sleep(pause_s)
            missing = [n for n in published if n in self.pending.records]
            if not missing:
                return
            try:
                await self._inquiry.ask(
                    "again", client=self._client_id, counters=tuple(sorted(missing)[:_MOST_MISSING])
                )
            except FlameError as exc:
                _log.info("reply_queue.not_reconciled", reason=str(exc))

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    def _withdrawn(self, counter: int, record: Record) -> None:
        if record.published:
            self._sender.released(record)
            self._sender.cancel([counter])
        self._sender.unblock()

    def _abandoned(self, counters: list[int]) -> None:
        left = [(n, r) for n in counters if (r := self.pending.records.pop(n, None)) is not None]
        if not left:
            return
        # The calls of a record are packed in the order of their numbers.
        published = [n for n, record in left if n <= record.published]
        if published:
            self._sender.released(left[0][1], len(published))
            self._sender.cancel(published)
        self._sender.unblock()

    async def _close(self) -> None:
        self._silence.close()
        self._expiry.close()
        self._cancel_maps()
        await self._sender.drain(_DRAIN_S)
        since = monotonic() - self.replies.last_result_s
        if since < _LAST_WORDS_S:
            await asyncio.sleep(_LAST_WORDS_S - since)
        if self._transport.connected and self._consumer is not None:
            # Results that come from now on go to the ledger.
            await forget(self._transport, self._consumer, self._sender.reply)
        await self._transport.close()
        if self._cluster is not None:
            await self._cluster.stop()

    def _cancel_maps(self) -> None:
        """Whoever leaves a map early cancels the rest of it, also by ending the program."""
        records = self.pending.records
        unwanted = [n for n, record in [*records.items()] if record.ends_with_client]
        if unwanted:
            self._sender.cancel(unwanted)
        for counter in unwanted:
            if (record := records.pop(counter, None)) is not None:
                record.fail_call(counter, _closed_early(call_id(self._client_id, counter)))


async def _end_tasks() -> None:
    """Cancel what a broken start left behind; a task that dies with its loop complains aloud."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
