"""Schedules on PostgreSQL: what two orchestrators do at once is done once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from sqlalchemy import select

from flame_broker.messages import Call, CallFrame, CallSpec, Deposit, Target
from flame_broker.schedules import CatchUp
from flame_broker.topology import calls_queue, custody_queue
from flame_orchestrator.custody import Custody, Fenced
from flame_orchestrator.database import open_database
from flame_orchestrator.ledger import Ledger
from flame_orchestrator.schedules import Plan, Schedules
from flame_orchestrator.schema import kept
from lab.bench import KEYRING
from lab.postgres import PostgresServer

KEY = KEYRING.signer
CALLS = calls_queue(KEY.hex_id, "default", "c1").name
NOON = 4_102_488_000.0  # 2100-01-01, 12:00 UTC


def test_a_moment_has_one_call_whatever_two_orchestrators_do_at_once(
    postgres: PostgresServer,
) -> None:
    engine = open_database(postgres.database("schedules"))
    custody = Custody(engine, Ledger(engine), KEY)
    orders = Schedules(engine, custody, KEY)
    frame = CallFrame(CALLS, "", "", CallSpec(Target("m:f")), (Call(0, b""),))
    deposit = Deposit(custody_queue(KEY.hex_id).name, frame, (0.0,), ("",))
    plan = Plan("s", "* * * * *", "UTC", CatchUp.LATEST, overlap=True, deposit=deposit)
    epochs = [custody.lead("one"), custody.lead("two")]

    def play(share: int) -> None:
        for step in range(12):
            orders.put(plan)
            orders.run("s", f"order {step}")
            with suppress(Fenced):
                orders.fire(epochs[share], NOON + 60 * step, NOON + 60 * step)

    with ThreadPoolExecutor(4) as threads:
        for playing in [threads.submit(play, share) for share in (0, 1, 1, 1)]:
            playing.result(60)
    orders.fire(epochs[1], NOON + 60 * 12, NOON + 60 * 12)
    with engine.connect() as connection:
        calls = connection.execute(select(kept).order_by(kept.c.counter)).all()
    due = [call.due_at for call in calls if call.once is None]
    assert [call.counter for call in calls] == [*range(1, len(calls) + 1)]
    assert due == sorted({*due})
    assert due[-1] == NOON + 60 * 12
    assert sum(call.once is not None for call in calls) == 12
    assert orders.show("s")["fired"] == len(calls)
    orders.remove("s")
    engine.dispose()
