"""The client: a connection to a cluster, used from any thread of the program."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # so that its function is registered before ours
import os
import secrets
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from flame.clusters import embedded_cluster
from flame.courier import Courier
from flame.desk import Desk
from flame.futures import ObjectFuture
from flame.inquiry import Inquiry
from flame.lanes import Lane
from flame.leaving import leaving
from flame.questions import Questions
from flame.values import Values
from flame_broker.config import Settings, load
from flame_broker.errors import FlameError
from flame_broker.keys import Key, Keyring
from flame_broker.objects import ObjectRef
from flame_broker.topology import DEFAULT_POOL

__all__ = [
    "Client",
    "Session",
    "close_default_client",
    "connect",
    "connect_embedded",
    "default_client",
]

_CLIENT_ID_BYTES = 5

T = TypeVar("T")

_open_clients: set[Client] = set()


@dataclass(frozen=True, slots=True)
class Session:
    """What a client has in one process: its identity, courier and store."""

    id: str
    key_id: str
    courier: Courier
    desk: Desk
    values: Values
    signer: Key


class Client(Questions):
    """A connection to a cluster; ``flame.connect()`` makes one.

    Threads may share it. A forked child that uses it gets a connection of its own.

    Args:
        settings: Which broker, store and key.
        works: Whether an embedded cluster runs calls; else it only answers from the history.
    """

    def __init__(self, settings: Settings, *, works: bool = True) -> None:
        self.settings = settings
        self._works = works
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._closed = False

    @property
    def session(self) -> Session:
        """The connection of this process, made at the first use.

        Raises:
            BrokerUnavailable: No broker answered within 10 s.
            FlameError: The client is closed.
        """
        return self._session or self._open()

    @property
    def id(self) -> str:
        """The client's name in call ids."""
        return self.session.id

    @property
    def closed(self) -> bool:
        """Whether it was closed; it then makes no connection any more."""
        return self._closed

    @property
    def key_id(self) -> str:
        """Which key signs, as queue names show it; it reveals nothing of the key."""
        return self.session.key_id

    def put_object(self, value: object) -> ObjectRef:
        """Store a value once, to be passed to many calls by its reference.

        Raises:
            ConfigError: No object store is configured.
            StoreError: The store failed after its retries.
        """
        return self.session.values.put_object(value)

    def get_object(self, ref: ObjectRef) -> Any:
        """Fetch a stored value.

        Raises:
            ObjectNotFound: There is none under this reference.
            StoreError: The store failed after its retries.
        """
        return self.session.values.get_object(ref)

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt something that only holders of the cluster key may read.

        Args:
            plaintext: What is to be hidden.
            context: Where it belongs; it opens nowhere else.
        """
        from flame_broker.sealing import seal

        return seal(self.session.signer, plaintext, context)

    @property
    def server(self) -> str:
        """What the broker says it is, such as ``RabbitMQ 4.0.5``."""
        return self.session.courier.server

    @property
    def reaches_workers(self) -> bool:
        """Whether workers can be asked and told; not on a broker without fan-out (SQS)."""
        return self.session.courier.reaches_workers

    def ping(self, pool: str = DEFAULT_POOL, *, timeout_s: float = 10.0) -> float:
        """Seconds of one round trip through a worker.

        Raises:
            TimeoutError: No worker of the pool took the call in time.
        """
        from flame.pinger import Pinger

        return Pinger(self, pool, timeout_s=timeout_s).trip()

    def _ask(self, question: Callable[[Inquiry], Coroutine[None, None, T]]) -> T:
        return self.session.courier.ask(question)

    @property
    def opened(self) -> Session | None:
        """The connection of this process, if it has been made."""
        return self._session

    def pending_futures(self) -> list[ObjectFuture[Any]]:
        """The futures of this process that are not done."""
        session = self.opened
        records = [] if session is None else [*session.courier.pending.records.values()]
        return [record for record in records if isinstance(record, ObjectFuture)]

    def close(self) -> None:
        """Send what is queued and disconnect. Futures that are still pending fail.

        Raises:
            FlameError: This is inside a done-callback, which runs in the client's own thread.
        """
        with self._lock:
            session = self._session
            if session is not None and not session.courier.may_block():
                raise FlameError(
                    "a client cannot be closed inside a done-callback: close it in the thread "
                    "that made it"
                )
            self._session, self._closed = None, True
            _open_clients.discard(self)
        if session is not None:
            session.courier.close()
            session.values.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._session else "not connected yet"
        return f"<flame.Client {state}, {self.settings!r}>"

    def after_fork(self) -> None:
        """In a forked child: what the parent had stays the parent's."""
        session, self._session = self._session, None
        self._lock = threading.Lock()
        if session is not None:
            session.courier.after_fork()

    def _open(self) -> Session:
        with self._lock:
            if self._closed:
                raise FlameError("this client is closed; flame.connect() makes a new one")
            if self._session is None:
                self._session = _make_session(self.settings, works=self._works)
                _open_clients.add(self)
            return self._session


def _make_session(settings: Settings, *, works: bool) -> Session:
    cluster = embedded_cluster(works=works) if settings.broker_url is None else None
    keyring: Keyring = settings.keyring if cluster is None else cluster.keyring
    values = Values(
        settings.require_store if cluster is None else lambda: cluster.store_url,
        settings.home / "cache" / "client",
    )
    client_id = secrets.token_hex(_CLIENT_ID_BYTES)
    url = settings.broker_url if cluster is None else cluster.url

    def upload(lane: Lane) -> None:
        values.put_target(lane.packed)

    courier = Courier(client_id, url or "", keyring, upload=upload, cluster=cluster)
    courier.start()
    desk = Desk(client_id, courier, values)
    return Session(client_id, keyring.signer.hex_id, courier, desk, values, keyring.signer)


class _Default:
    """The client that is used where none is named."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: Client | None = None

    def remember(self, client: Client) -> None:
        self._client = client

    def get(self) -> Client:
        with self._lock:
            if self._client is None or self._client.closed:
                self._client = Client(load())
            return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def forget_locks(self) -> None:
        """In a forked child: another thread may have held the lock at the fork."""
        self._lock = threading.Lock()


_default = _Default()


def connect(
    broker: str | None = None,
    *,
    store: str | None = None,
    key: str | None = None,
    context: str | None = None,
) -> Client:
    """Connect to a cluster. What is not given is looked up in the environment, then in the file.

    With nothing configured an embedded cluster is started in this process.

    Args:
        broker: Broker URL.
        store: Object store URL.
        key: Cluster key, or several with ``,``: the first signs, all verify.
        context: A context of the settings file.

    Returns:
        A client, connected. ``Runner`` and ``Executor`` use the one that was connected last.

    Raises:
        BrokerUnavailable: No broker answered within 10 s.
        ConfigError: A setting is missing or wrong.
    """
    client = Client(load(broker=broker, store=store, key=key, context=context))
    client.session  # noqa: B018  # connects
    _default.remember(client)
    return client


def connect_embedded() -> Client:
    """Start an embedded cluster in this process, whatever broker is configured."""
    client = Client(replace(load(), broker_url=None))
    client.session  # noqa: B018  # connects
    return client


def default_client() -> Client:
    """The client that was connected last, or else one made from the configuration."""
    return _default.get()


def close_default_client() -> None:
    """Close the client that is used where none is named, if there is one; another is made later."""
    _default.close()


def _after_fork() -> None:
    _default.forget_locks()
    for client in [*_open_clients]:
        client.after_fork()


def _before_pools_end() -> None:
    clients = [*_open_clients]
    for session in [client.opened for client in clients]:
        if session is not None:
            leaving.quietly(session.courier.get_ready)
    # A cluster in this process ends with it, and its calls with the cluster; others go on.
    embedded = [client for client in clients if client.settings.broker_url is None]
    leaving.wait_for(future for client in embedded for future in client.pending_futures())


def _close_all() -> None:
    for client in [*_open_clients]:
        try:
            client.close()
        except KeyboardInterrupt:
            # A second Ctrl-C while saying goodbye: leave at once, without a trace.
            break
    leaving.say_how()


os.register_at_fork(after_in_child=_after_fork)
# What is registered later is called earlier: while the pools of threads still take work.
threading._register_atexit(_before_pools_end)  # type: ignore[attr-defined]  # noqa: SLF001
atexit.register(_close_all)
