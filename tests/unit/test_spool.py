"""The worker's spool, when the program around an embedded worker ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_broker.messages import CallSpec, Status, Target
from lab.bench import bench, frame_of
from lab.wait import eventually


async def test_calls_fail_when_threads_take_no_more_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path) as lab:
        lab.spool.close()
        by_value = CallSpec(Target("f", "a" * 64, 9, "3.11"), "c1")
        await lab.submit(frame_of([1], spec=by_value))
        await lab.settled(1)
        await lab.submit(frame_of([2]))
        await eventually(lambda: lab.slots[0].started)
        lab.slots[0].finish(result=lab.spooled(2, b"x" * 100_000, Status.OK))
        await lab.settled(2)
    assert [result.status for result in lab.finals] == [Status.FAILED, Status.FAILED]
    assert not caplog.records
