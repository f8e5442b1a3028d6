"""Results that leave a worker together fit the messages of every broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_broker.messages import FRAME_BYTES, Result, Status
from flame_broker.transport import Delivery
from lab.bench import Bench, bench, frame_of
from lab.wait import eventually


async def test_results_that_come_at_once_are_split_to_fit_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    on_reply = Bench.on_reply

    def measured(lab: Bench, delivery: Delivery) -> None:
        sizes.append(len(delivery.body))
        on_reply(lab, delivery)

    monkeypatch.setattr(Bench, "on_reply", measured)
    async with bench(tmp_path) as lab:
        await lab.submit(frame_of(range(12)))
        await eventually(lambda: lab.slots[0].batches, 5)
        slot, batch = lab.slots[0], lab.slots[0].batches[0]
        results = [Result(n, Status.OK, bytes(FRAME_BYTES // 3)) for n in range(12)]
        slot.owner.on_results(slot, batch, results)  # type: ignore[arg-type]  # a played slot
        await lab.settled(12)
        assert sorted(result.counter for result in lab.finals) == [*range(12)]
        assert len(sizes) == 4
        assert max(sizes) < FRAME_BYTES + 1024
