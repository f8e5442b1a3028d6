"""The way of calls that make calls: through their worker, without the broker's address or key."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest

from contract.transport import MakeTransport, Received, TransportContract
from flame_broker.bridged import BridgedTransport, unseal_here
from flame_broker.config import load
from flame_broker.errors import BrokerUnavailable, ConfigError, SignatureError
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Key, Keyring, generate_key
from flame_broker.memory import MemoryTransport
from flame_broker.messages import ControlFrame
from flame_broker.sealing import seal
from flame_broker.transport import QueueSpec, Transport
from flame_worker import bridge as bridge_module
from flame_worker.bridge import Bridge
from lab.wait import wait_until


class PlainBridge(Bridge):
    """Passes on what is no frame, as the contract's bodies are not."""

    def outgoing(self, body: bytes) -> bytes:
        return body

    def incoming(self, body: bytes) -> bytes:
        return body


def make_bridge(kind: type[Bridge], keyring: Keyring, waits: list[tuple[int, bool]]) -> Bridge:
    namespace = uuid4().hex
    broker = MemoryTransport(namespace)  # keeps the namespace alive between connections

    def connect() -> Transport:
        assert broker is not None
        return MemoryTransport(namespace)

    return kind(connect, keyring, lambda group, waiting: waits.append((group, waiting)))


@pytest.fixture
def keyring() -> Keyring:
    return Keyring.parse(generate_key())


@pytest.fixture
def waits() -> list[tuple[int, bool]]:
    """Which process group said that it waits, or no longer."""
    return []


@pytest.fixture
async def bridge(keyring: Keyring, waits: list[tuple[int, bool]]) -> AsyncIterator[Bridge]:
    made = make_bridge(Bridge, keyring, waits)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def child(bridge: Bridge) -> AsyncIterator[BridgedTransport]:
    """A transport as the client in a child has it."""
    transport = BridgedTransport(bridge.environ["FLAME_BROKER_URL"].removeprefix("worker://"))
    await transport.open()
    yield transport
    await transport.close()


class TestBridgedContract(TransportContract):
    @pytest.fixture
    async def shared_url(self, keyring: Keyring) -> AsyncIterator[str]:
        bridge = make_bridge(PlainBridge, keyring, [])
        await bridge.start()
        yield bridge.environ["FLAME_BROKER_URL"]
        await bridge.close()

    @pytest.fixture
    def make_transport(self, shared_url: str) -> MakeTransport:
        return lambda: BridgedTransport(shared_url.removeprefix("worker://"))

    @pytest.fixture
    def absent_transport(self, tmp_path: Path) -> Transport:
        return BridgedTransport(str(tmp_path / "socket"))


# --- the key -------------------------------------------------------------------------------------


async def test_the_cluster_sees_its_own_signature_and_the_child_its_own(
    bridge: Bridge, child: BridgedTransport, keyring: Keyring
) -> None:
    stand_in = load(environ=dict(bridge.environ)).keyring
    assert stand_in.signer.hex_id == keyring.signer.hex_id
    assert stand_in.signer != keyring.signer
    frame = ControlFrame("q", "hello", {"a": 1})
    await child.declare(QueueSpec("q"))
    received = Received()
    await child.consume("q", received, prefetch=1)
    await child.publish("q", encode(frame, stand_in.signer))
    [body] = await received.until(1)
    assert open_frame(body, stand_in).frame == frame
    assert open_frame(bridge.outgoing(body), keyring).frame == frame
    with pytest.raises(SignatureError):
        open_frame(body, keyring)


async def test_what_another_key_signed_is_not_passed_on(
    child: BridgedTransport, bridge: Bridge
) -> None:
    await child.declare(QueueSpec("q"))
    forged = encode(ControlFrame("q", "hello", {}), Key.parse(generate_key()))
    with pytest.raises(SignatureError):
        await child.publish("q", forged)
    assert await child.depth("q") == 0


async def test_a_forged_frame_of_the_cluster_stays_refused(
    bridge: Bridge, keyring: Keyring
) -> None:
    forged = encode(ControlFrame("q", "hello", {}), Key.stand_in(keyring.signer.hex_id, b"x" * 32))
    with pytest.raises(SignatureError):
        open_frame(bridge.incoming(forged), load(environ=dict(bridge.environ)).keyring)


async def test_only_this_user_can_reach_the_socket(bridge: Bridge) -> None:
    path = Path(bridge.environ["FLAME_BROKER_URL"].removeprefix("worker://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await bridge.close()
    assert not path.parent.exists()


async def test_what_a_killed_worker_left_behind_is_removed_by_the_next(
    bridge: Bridge, keyring: Keyring
) -> None:
    folder = Path(bridge.environ["FLAME_BROKER_URL"].removeprefix("worker://")).parent
    killed = folder.with_name(f"flame-worker-{uuid4().hex[:16]}")
    starting = folder.with_name(f"flame-worker-{uuid4().hex[:16]}")
    starting.mkdir()
    killed.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(killed / "socket"))
    other = make_bridge(Bridge, keyring, [])
    await other.start()
    await other.close()
    assert not killed.exists()
    assert folder.exists()
    assert starting.exists()
    starting.rmdir()


async def test_sealed_fields_open_for_their_context_only(
    bridge: Bridge, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = seal(keyring.signer, b"hunter2", b"run 1")
    with pytest.raises(ConfigError):
        unseal_here(sealed, b"run 1")
    monkeypatch.setenv("FLAME_BROKER_URL", bridge.environ["FLAME_BROKER_URL"])
    assert await asyncio.to_thread(unseal_here, sealed, b"run 1") == b"hunter2"
    with pytest.raises(SignatureError):
        await asyncio.to_thread(unseal_here, sealed, b"run 2")


# --- waiting -------------------------------------------------------------------------------------


async def test_a_child_says_when_it_waits_and_when_no_longer(
    child: BridgedTransport, waits: list[tuple[int, bool]]
) -> None:
    pending = True
    child.waits_while(lambda: pending)
    await child.declare(QueueSpec("q"))
    child.publish("q", b"no frame").add_done_callback(lambda done: done.exception())
    await until(waits, 1)
    pending = False
    await until(waits, 2)
    group = os.getpgid(0)
    assert waits == [(group, True), (group, False)]


async def test_a_child_that_dies_does_not_wait_any_more(
    child: BridgedTransport, waits: list[tuple[int, bool]]
) -> None:
    child.waits_while(lambda: True)
    child.publish("q", b"no frame").add_done_callback(lambda done: done.exception())
    await until(waits, 1)
    await child.close()
    await until(waits, 2)
    assert [waiting for _, waiting in waits] == [True, False]


async def test_a_transport_whose_worker_left_says_so(
    bridge: Bridge, child: BridgedTransport
) -> None:
    await bridge.close()
    await asyncio.to_thread(wait_until, lambda: not child.connected, 5)
    with pytest.raises(BrokerUnavailable):
        await child.depth("q")


def test_macos_is_asked_for_the_caller_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def getsockopt(self, level: int, option: int) -> int:
            assert (level, option) == (0, 2)  # SOL_LOCAL and LOCAL_PEERPID of sys/un.h
            return 4711

    monkeypatch.setattr("sys.platform", "darwin")
    assert bridge_module._peer_pid(cast("socket.socket", Connection())) == 4711


async def until(waits: list[tuple[int, bool]], count: int) -> None:
    await asyncio.to_thread(wait_until, lambda: len(waits) >= count, 5)
