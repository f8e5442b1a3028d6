"""What becomes of the calls of a child that ends with its worker."""

from __future__ import annotations

from flame_broker.errors import WorkerLost
from flame_worker.batches import Batch, Lost
from flame_worker.holding import Holding
from flame_worker.outbox import Outbox

__all__ = ["give_back"]


def give_back(lost: Lost, outbox: Outbox) -> None:
    """Give leased calls back to the orchestrator; what is not acked goes to others by itself.

    A call that must not run twice, and has begun, has ended with this.
    """
    begun = [*lost.unsent, *filter(None, [lost.running])]
    for batch, counter in begun:
        holding = _holding_of(batch)
        if holding.run and batch.spec.at_most_once:
            calls = [call for call in batch.calls if call.counter == counter]
            outbox.failure(holding, calls, WorkerLost, "its worker was stopped while it ran")
        else:
            _hand_back(batch, counter, outbox)
    for batch, counter in lost.unstarted:
        _hand_back(batch, counter, outbox)


def _hand_back(batch: Batch, counter: int, outbox: Outbox) -> None:
    holding = _holding_of(batch)
    if holding.run:
        outbox.hand_back(holding, [call for call in batch.calls if call.counter == counter])


def _holding_of(batch: Batch) -> Holding:
    return batch.context.holding  # type: ignore[attr-defined,no-any-return]  # the dispatcher's
