"""A worker's side of leases: what it claims, when its message is acked, and who gets the result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flame_broker.errors import WorkerLost
from flame_broker.facts import unfold
from flame_broker.frames import open_frame
from flame_broker.memory import MemoryTransport
from flame_broker.messages import Claim, ControlFrame, Plain, Result, ResultFrame, Status
from flame_broker.topology import beats_exchange, beats_queue, custody_queue, work_queue
from flame_broker.transport import Delivery
from flame_worker import leases
from flame_worker.batches import Lost
from flame_worker.running import running_calls
from lab.bench import CALLS, KEYRING, SUSPECTS, Bench, bench, frame_of
from lab.wait import eventually

KEY = KEYRING.signer
CUSTODY = custody_queue(KEY.hex_id)


class Custodian:
    """The orchestrator's place, taken by the test."""

    def __init__(self, lab: Bench) -> None:
        self.lab = lab
        self.epoch = 1
        self.claims: list[Claim] = []
        self.results: list[int] = []
        self.indices: list[int] = []
        self.releases: list[object] = []

    def hear(self, delivery: Delivery) -> None:
        frame = open_frame(delivery.body, KEYRING, queue=CUSTODY.name).frame
        delivery.ack()
        if isinstance(frame, Claim):
            self.claims.append(frame)
        elif isinstance(frame, ResultFrame):
            self.results += [result.counter for result in frame.results]
            self.indices += [result.index for result in frame.results]
        elif isinstance(frame, ControlFrame):
            self.releases.append((frame.verb, frame.arguments["counters"]))

    def say(self, verb: str, **arguments: Plain) -> None:
        verbs = {
            "leads": self.lab.leases.take_leads,
            "leased": self.lab.leases.take_answer,
            "reclaim": self.lab.leases.take_reclaim,
        }
        verbs[verb](ControlFrame("ear", verb, {"epoch": self.epoch, **arguments}), KEY)

    def answer(self, *refused: int, to: int = -1) -> None:
        """Grant what a claim asks for, but for these."""
        claim = self.claims[to]
        counters = {call.counter for call in claim.frame.calls}
        granted = tuple(sorted(counters.difference(refused)))
        self.say("leased", run=claim.run, granted=granted, refused=refused)

    async def asked(self, times: int = 1) -> Claim:
        await eventually(lambda: len(self.claims) >= times, 10)
        return self.claims[-1]


@asynccontextmanager
async def handover(folder: Path, *, slots: int = 1) -> AsyncIterator[tuple[Bench, Custodian]]:
    async with bench(folder, slots=slots) as lab:
        custodian = Custodian(lab)
        await lab.broker.declare(CUSTODY)
        await lab.broker.consume(CUSTODY.name, custodian.hear, prefetch=0)
        custodian.say("leads", lease_s=30.0)
        watching = asyncio.ensure_future(lab.leases.watch())
        try:
            yield lab, custodian
        finally:
            watching.cancel()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HANDOVER_S", 0.0)
    monkeypatch.setattr(leases, "_LOOK_EVERY_S", 0.01)


def unacked(lab: Bench) -> int:
    """Deliveries that the worker holds."""
    return sum(draw.held for taps in lab.intake._taps.values() for t in taps for draw in t.draws)


async def test_a_long_call_is_acked_once_its_lease_is_granted_and_its_result_goes_the_new_way(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        claim = await custodian.asked()
        assert (claim.frame.reply, claim.look) == (frame_of([1]).reply, False)
        assert lab.intake.held == 1
        custodian.answer()
        await eventually(lambda: not lab.intake.held, 10)
        assert lab.leases.held == 1
        await lab.submit(frame_of([2]))
        lab.slots[0].finish()
        await eventually(lambda: custodian.results == [1], 10)
        await eventually(lambda: not lab.leases.held, 10)
        await eventually(lambda: lab.slots[0].started == [1, 2], 10)
        assert not lab.results


async def test_what_ends_before_the_answer_waits_for_it(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        lab.slots[0].finish()
        await lab.outbox.drain(1)
        assert (custodian.results, lab.results, lab.intake.held) == ([], [], 1)
        custodian.answer()
        await eventually(lambda: custodian.results == [1], 10)
        await eventually(lambda: not lab.intake.held and not lab.leases.held, 10)
        assert not lab.results


async def test_a_run_that_is_refused_ends_and_tells_nobody(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        custodian.answer(1)
        await eventually(lambda: lab.slots[0].cancels == [1], 10)
        lab.slots[0].finish()
        await eventually(lambda: not lab.intake.held, 10)
        assert (lab.results, custodian.results, lab.leases.held) == ([], [], 0)


async def test_a_run_that_is_taken_away_ends_and_tells_nobody(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        claim = await custodian.asked()
        custodian.answer()
        await eventually(lambda: lab.leases.held, 10)
        custodian.say("leased", run=claim.run, granted=(), refused=(1,))
        assert lab.slots[0].cancels == [1]
        lab.slots[0].finish()
        await eventually(lambda: not lab.leases.held, 10)
        assert (lab.results, custodian.results) == ([], [])


async def test_without_an_answer_the_result_goes_to_the_client_and_waits_for_the_orchestrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        lab.slots[0].finish()
        monkeypatch.setattr(leases, "_DEAF_S", 0.0)
        await lab.settled(1)
        assert [result.counter for result in lab.finals] == [1]
        await eventually(lambda: custodian.results == [1], 10)
        custodian.answer()
        assert lab.leases.held == 0


async def test_without_an_orchestrator_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_DEAF_S", 0.0)
    async with handover(tmp_path) as (lab, custodian):
        for number, queue in ((1, CALLS), (2, SUSPECTS)):
            await lab.submit(frame_of([number], queue=queue))
            await eventually(lambda: lab.slots[0].batches, 10)
            lab.slots[0].finish()
            await lab.settled(number)
        assert custodian.claims == []


async def test_a_suspect_waits_for_the_word_that_nobody_runs_it(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1], queue=SUSPECTS))
        assert (await custodian.asked()).look
        assert lab.slots[0].started == []
        custodian.answer(1)
        await eventually(lambda: not lab.intake.held, 10)
        await lab.submit(frame_of([2], queue=SUSPECTS))
        await custodian.asked(2)
        custodian.answer()
        await eventually(lambda: lab.slots[0].started == [2], 10)
        lab.slots[0].finish()


async def test_at_most_once_starts_when_it_is_granted_and_is_given_back_when_it_cannot_start(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        frame = frame_of([1, 2])
        await lab.submit(replace(frame, spec=replace(frame.spec, at_most_once=True)))
        await custodian.asked()
        assert lab.slots[0].started == []
        custodian.answer(2)
        await eventually(lambda: lab.slots[0].started == [1], 10)
        assert lab.intake.held == 0
        await lab.submit(
            replace(frame_of([3]), spec=replace(frame.spec, at_most_once=True), handed=1)
        )
        await custodian.asked(2)
        custodian.answer()
        await eventually(lambda: custodian.releases == [("release", (3,))], 10)
        lab.slots[0].finish()
        await eventually(lambda: custodian.results == [1], 10)
        assert await lab.depth(CALLS) == 0


async def test_an_older_orchestrator_is_not_listened_to(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        custodian.epoch = 7
        custodian.say("leads", lease_s=30.0)
        await lab.submit(frame_of([1]))
        await custodian.asked()
        custodian.epoch = 6
        custodian.answer(1)
        assert lab.slots[0].cancels == []
        custodian.epoch = 7
        custodian.answer()
        await eventually(lambda: lab.leases.held, 10)
        lab.slots[0].finish()


async def test_a_run_that_was_given_up_asks_again_and_ends_if_another_one_has_begun(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        run = (await custodian.asked()).run
        custodian.answer()
        await eventually(lambda: lab.leases.held, 10)
        custodian.say("reclaim", runs=(run, "unknown/1"))
        assert (await custodian.asked(2)).run == run
        custodian.answer()
        custodian.say("reclaim", runs=(run,))
        await custodian.asked(3)
        custodian.answer(1)
        assert lab.slots[0].cancels == [1]
        lab.slots[0].finish()
        await eventually(lambda: not lab.leases.held, 10)
        assert custodian.results == []


async def test_a_frame_that_comes_again_after_its_handover_is_acked_at_once(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path, slots=2) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        custodian.answer()
        await eventually(lambda: not lab.intake.held, 10)
        await lab.submit(frame_of([1]))  # as if the ack was lost with its connection
        await eventually(lambda: lab.intake.counts["frames"] + unacked(lab) == 1, 10)
        await lab.submit(frame_of([2]))
        await eventually(lambda: sum(len(slot.started) for slot in lab.slots) == 2, 10)
        assert sorted(n for slot in lab.slots for n in slot.started) == [1, 2]
        for slot in lab.slots:
            slot.finish()
        await eventually(lambda: 1 in custodian.results, 10)


async def test_a_large_result_on_its_way_to_the_store_goes_the_new_way(tmp_path: Path) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        lab.slots[0].finish(result=lab.spooled(1, b"x" * 100_000, Status.OK))
        custodian.answer()
        await eventually(lambda: custodian.results == [1], 10)
        await eventually(lambda: not lab.intake.held and not lab.leases.held, 10)
        assert not lab.results


async def test_items_stay_in_order_when_a_large_one_is_on_its_way_at_the_handover(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        await lab.submit(frame_of([1]))
        await custodian.asked()
        lab.slots[0].say(lab.spooled(1, b"x" * 100_000, Status.ITEM, 0))
        custodian.answer()
        lab.slots[0].say(Result(1, Status.ITEM, b"", None, 1))
        lab.slots[0].finish(result=Result(1, Status.OK, b"", None, 2))
        await eventually(lambda: len(custodian.results) == 3, 10)
        assert custodian.indices == [0, 1, 2]
        await eventually(lambda: not lab.intake.held and not lab.leases.held, 10)
        assert unacked(lab) == 0
        assert not lab.results


async def test_at_most_once_is_claimed_and_no_suspect_when_it_comes_again(tmp_path: Path) -> None:
    async with handover(tmp_path, slots=2) as (lab, custodian):
        frame = frame_of([1], resources="c2")
        seen: list[Delivery] = []
        another = MemoryTransport(tmp_path.name)
        await another.open()
        await another.declare(work_queue(frame.queue))
        await another.consume(frame.queue, seen.append, prefetch=1)
        await lab.submit(replace(frame, spec=replace(frame.spec, at_most_once=True)))
        await eventually(lambda: seen, 10)
        await another.close()
        await lab.intake.add_class("c2")
        assert (await custodian.asked()).frame.queue == frame.queue
        custodian.answer()
        await eventually(lambda: [slot for slot in lab.slots if slot.started], 10)
        next(slot for slot in lab.slots if slot.started).finish()
        await eventually(lambda: custodian.results == [1], 10)


async def test_at_most_once_that_waits_for_a_slot_is_given_back_by_a_worker_that_leaves(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path) as (lab, custodian):
        spec = replace(frame_of([1]).spec, at_most_once=True)
        await lab.submit(replace(frame_of([1, 2]), spec=spec))
        await custodian.asked()
        lab.dispatcher.close()
        custodian.answer()
        await eventually(lambda: lab.leases.held, 10)
        lab.leases.give_up()
        await eventually(lambda: custodian.releases == [("release", (1, 2))], 10)


async def test_a_worker_that_leaves_gives_back_what_ran_or_says_that_it_is_lost(
    tmp_path: Path,
) -> None:
    async with handover(tmp_path, slots=2) as (lab, custodian):
        frame = frame_of([1])
        await lab.submit(frame, replace(
            frame_of([2]), spec=replace(frame.spec, at_most_once=True)
        ))  # fmt: skip
        await custodian.asked(2)
        for number in range(2):
            custodian.answer(to=number)
        await eventually(lambda: lab.leases.held == 2, 10)
        await eventually(lambda: sum(len(slot.started) for slot in lab.slots) == 2, 10)
        lab.dispatcher.close()
        for slot in lab.slots:
            batch = slot.batches[0]
            slot.lose(Lost(WorkerLost, "ended", (batch, batch.calls[0].counter), [], []))
        lab.leases.give_up()
        await eventually(lambda: custodian.releases == [("release", (1,))], 10)
        await eventually(lambda: custodian.results == [2], 10)


# ── heartbeats ───────────────────────────────────────────────────────────────


async def test_heartbeats_say_what_runs_and_the_last_one_that_we_leave(tmp_path: Path) -> None:
    heard: list[Mapping[str, Plain]] = []

    def hear(delivery: Delivery) -> None:
        frame = open_frame(delivery.body, KEYRING, queue=beats_exchange(KEY.hex_id)).frame
        assert isinstance(frame, ControlFrame)
        heard.append(frame.arguments)

    async with bench(tmp_path, slots=2) as lab:
        ear = beats_queue(KEY.hex_id, "test")
        await lab.broker.declare_exchange(beats_exchange(KEY.hex_id), "fanout")
        await lab.broker.declare(ear)
        await lab.broker.consume(ear.name, hear, prefetch=0)
        lab.leases._facts = lambda: {"running": running_calls(lab.slots, 60.0)}
        await lab.submit(frame_of([1]))
        await eventually(lambda: lab.slots[0].batches, 10)
        lab.slots[0].batches[0].given_at = 20.0
        lab.leases.reconnected()
        await lab.leases.say_goodbye()
        await eventually(lambda: len(heard) == 2, 10)
    folded = heard[0]["facts"]
    assert isinstance(folded, bytes)
    assert unfold(folded) == {"running": (("c0-1", "", 40.0),)}
    assert (heard[1]["leaves"], "facts" in heard[1]) == (True, False)
