"""Where the time of a call goes: the CPU time of each hop that is ours, measured one by one.

Prints microseconds a call, alone in a frame and in a frame of 64. What RabbitMQ and pika take is
the bare echo of ``run.py``; this program needs no broker.

    python benchmarks/hops.py
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from flame_broker.codec import decode_value, encode_scalars, encode_value
from flame_broker.frames import encode, open_frame
from flame_broker.keys import Key, Keyring
from flame_broker.messages import Call, CallFrame, CallSpec, Result, ResultFrame, Status, Target
from flame_worker.batches import Batch
from flame_worker.slots import Slot
from lab.slots import SlotLab

KEY = Key(b"benchmark key of 32 bytes or more")
KEYS = Keyring([KEY])
REPEATS = 7


def main() -> None:
    """Measure every hop and print the table."""
    rows = [*cpu_hops(), *asyncio.run(slot_hops())]
    width = max(len(name) for name, _, _ in rows)
    print(f"{'hop':<{width}}  {'alone, µs':>10}  {'of 64, µs':>10}")
    for name, alone, packed in rows:
        print(f"{name:<{width}}  {alone:>10.1f}  {packed:>10.2f}")


def cpu_hops() -> list[tuple[str, float, float]]:
    """The hops that are plain functions."""
    one, many = calls_frame(1), calls_frame(64)
    one_body, many_body = encode(one, KEY), encode(many, KEY)
    one_back, many_back = results_frame(1), results_frame(64)
    one_reply, many_reply = encode(one_back, KEY), encode(many_back, KEY)
    value = encode_value(1).join()
    return [
        same("client: encode the arguments", lambda: encode_scalars((1,))),
        hop("client: pack and sign", lambda: encode(one, KEY), lambda: encode(many, KEY)),
        hop(
            "worker: check and unpack",
            lambda: open_frame(one_body, KEYS, queue="q"),
            lambda: open_frame(many_body, KEYS, queue="q"),
        ),
        hop(
            "worker: pack and sign results",
            lambda: encode(one_back, KEY),
            lambda: encode(many_back, KEY),
        ),
        hop(
            "client: check and unpack results",
            lambda: open_frame(one_reply, KEYS, queue="r"),
            lambda: open_frame(many_reply, KEYS, queue="r"),
        ),
        same("client: decode the value", lambda: decode_value(value)),
    ]


def calls_frame(count: int) -> CallFrame:
    """A frame of no-op calls."""
    payload = encode_scalars((1,)) or b""
    calls = tuple(Call(number, payload) for number in range(count))
    return CallFrame("q", "r", "client", CallSpec(Target("module:function")), calls)


def results_frame(count: int) -> ResultFrame:
    """What comes back for it."""
    payload = encode_value(1).join()
    results = tuple(Result(number, Status.OK, payload) for number in range(count))
    return ResultFrame("r", "client", "worker", results)


def same(name: str, work: Callable[[], object]) -> tuple[str, float, float]:
    """A hop that costs the same whether a call travels alone or not."""
    each = microseconds(work)
    return name, each, each


def hop(
    name: str, alone: Callable[[], object], packed: Callable[[], object]
) -> tuple[str, float, float]:
    """A hop whose cost is shared by the calls of a frame."""
    return name, microseconds(alone), microseconds(packed) / 64


def microseconds(work: Callable[[], object], times: int = 2000) -> float:
    """CPU time of one run, the best of several measurements: noise only adds."""
    found = []
    for _ in range(REPEATS):
        began = process_time()
        for _ in range(times):
            work()
        found.append((process_time() - began) / times)
    return min(found) * 1e6


class TimedSlot(SlotLab):
    """A slot whose owner is waiting for the end of a batch."""

    ended_now: asyncio.Future[None]

    def on_done(self, slot: Slot, batch: Batch, seconds: float) -> None:
        """Wake who waits."""
        self.ended_now.set_result(None)

    async def round_trips(self, calls: int, times: int) -> float:
        """Median microseconds of a batch, from giving it until its end."""
        taken = []
        for _ in range(times):
            self.ended_now = asyncio.get_running_loop().create_future()
            batch = self.batch("operator:abs", [(-1,)] * calls)
            began = perf_counter()
            self.slot.give(batch)
            await self.ended_now
            taken.append(perf_counter() - began)
        return statistics.median(taken) * 1e6


async def slot_hops() -> list[tuple[str, float, float]]:
    """A call through a slot and back, pipes and child included: wall time."""
    with tempfile.TemporaryDirectory() as folder:
        lab = TimedSlot(Path(folder))
        await lab.slot.start()
        try:
            alone = await lab.round_trips(1, 1000)
            packed = await lab.round_trips(64, 500)
        finally:
            await lab.slot.close(grace_s=1)
    return [("worker: to the child, run, back", alone, packed / 64)]


if __name__ == "__main__":
    main()
