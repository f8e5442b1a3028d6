"""What calls print goes to who prints it, to who keeps it, or nowhere; and it is numbered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from flame_broker.frames import open_frame
from flame_broker.messages import CallSpec, Event, EventFrame, EventKind, Target
from flame_broker.topology import custody_queue, kept_logs_queue, logs_exchange, logs_queue
from flame_broker.transport import Delivery
from flame_worker.slots import Slot
from lab.bench import KEYRING, bench, frame_of
from lab.wait import eventually

KEY = KEYRING.signer
OUT, ERR = EventKind.STDOUT, EventKind.STDERR


def opened(deliveries: list[Delivery]) -> list[EventFrame]:
    return [cast(EventFrame, open_frame(found.body, KEYRING).frame) for found in deliveries]


async def test_output_goes_to_its_client_and_of_tracked_calls_to_the_orchestrator(
    tmp_path: Path,
) -> None:
    custody = custody_queue(KEY.hex_id)
    base = CallSpec(Target("m:f"), label="f")
    frames = {
        1: {"spec": base},
        2: {"spec": replace(base, echo=False)},
        3: {"spec": replace(base, track=False)},
        4: {"spec": replace(base, track=False, echo=False)},
        5: {"spec": replace(base, track=False, echo=False), "reply": custody.name, "attempt": 2},
    }
    async with bench(tmp_path, slots=len(frames)) as lab:
        await lab.broker.declare_exchange(logs_exchange(KEY.hex_id), "topic")
        ears: dict[str, list[Delivery]] = {"client": [], "orchestrator": []}
        queues = {
            "client": logs_queue(KEY.hex_id, "c0"),
            "orchestrator": kept_logs_queue(KEY.hex_id),
        }
        for name, queue in queues.items():
            await lab.broker.declare(queue, custody)
            await lab.broker.consume(queue.name, ears[name].append, prefetch=0)
        for counter, changes in frames.items():
            await lab.submit(frame_of([counter], **changes))
        await eventually(lambda: sum(len(slot.batches) for slot in lab.slots) == len(frames), 5)
        for slot in lab.slots:
            batch, held = slot.batches[0], cast(Slot, slot)
            lab.dispatcher.on_output(held, batch, batch.calls[0].counter, OUT, ["a line"])
            lab.dispatcher.on_progress(held, batch, batch.calls[0].counter, 0.5, "half")
        lab.outbox.send_events()
        await eventually(lambda: len(ears["orchestrator"]) == 3, 5)
        await eventually(lambda: sum(len(f.events) for f in opened(ears["client"])) == 4 + 5, 5)
        said = ((frame, event) for frame in opened(ears["client"]) for event in frame.events)
        shown = {event.counter: frame.echo for frame, event in said if event.kind is OUT}
        assert shown == {1: True, 2: False, 3: True, 5: False}
        kept = opened(ears["orchestrator"])
        assert {frame.events[0].counter: frame.attempt for frame in kept} == {1: 1, 2: 1, 5: 2}
        assert all(event.kind is OUT for frame in kept for event in frame.events)
        assert all(frame.at > 0 for frame in kept)


async def test_the_lines_of_both_streams_are_numbered_by_run(tmp_path: Path) -> None:
    async with bench(tmp_path) as lab:
        await lab.broker.declare_exchange(logs_exchange(KEY.hex_id), "topic")
        ear = list[Delivery]()
        await lab.broker.declare(kept_logs_queue(KEY.hex_id))
        await lab.broker.consume(kept_logs_queue(KEY.hex_id).name, ear.append, prefetch=0)
        for handed in range(2):
            await lab.submit(frame_of([7, 8], handed=handed))
            await eventually(lambda: lab.slots[0].batches, 5)
            slot, batch = cast(Slot, lab.slots[0]), lab.slots[0].batches[0]
            lab.dispatcher.on_output(slot, batch, 7, OUT, ["a", "b"])
            lab.dispatcher.on_output(slot, batch, 7, ERR, ["c"])
            lab.dispatcher.on_output(slot, batch, 8, OUT, ["d"])
            lab.outbox.send_events()
            lab.slots[0].finish()
            lab.slots[0].finish()
            await eventually(lambda: not lab.intake.held, 5)
        said = lambda: [event for frame in opened(ear) for event in frame.events]  # noqa: E731
        await eventually(lambda: len(said()) == 8, 5)
        assert [event[:4] for event in said()[:3]] == [
            Event(7, OUT, "a")[:4],
            Event(7, OUT, "b")[:4],
            Event(7, ERR, "c")[:4],
        ]
        numbers = [(event.counter, event.run, event.index) for event in said()]
        first = [(7, 1, 0), (7, 1, 1), (7, 1, 2), (8, 2, 0)]
        assert numbers == [*first, (7, 3, 0), (7, 3, 1), (7, 3, 2), (8, 4, 0)]
