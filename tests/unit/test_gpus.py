"""GPUs are handed out whole or in shares, and never twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import ResourceError
from flame_worker import gpus
from flame_worker.gpus import GpuPool, GpuShare, detect_gpus


def test_whole_gpus_are_exclusive() -> None:
    pool = GpuPool(["a", "b", "c"])
    assert len(pool) == 3
    two = pool.take(2)
    assert two is not None
    assert len(set(two.ids)) == 2
    assert pool.take(2) is None
    pool.give_back(two)
    three = pool.take(3)
    assert three is not None
    assert set(three.ids) == {"a", "b", "c"}


def test_shares_fill_one_card_before_they_open_another() -> None:
    pool = GpuPool(2)
    shares = [pool.take(0.25) for _ in range(4)]
    assert {share.ids for share in shares if share} == {("0",)}
    whole = pool.take(1)
    assert whole == GpuShare(("1",), 1.0)
    assert pool.take(0.25) is None


@pytest.mark.parametrize("amount", [0, -1, 1.5, 2.25])
def test_amounts_that_make_no_sense_are_refused(amount: float) -> None:
    with pytest.raises(ResourceError, match="gpu="):
        GpuPool(4).take(amount)


@given(st.lists(st.sampled_from([0.25, 0.5, 1, 2, -1])))
def test_no_card_is_ever_lent_more_than_once(steps: list[float]) -> None:
    pool, lent = GpuPool(3), list[GpuShare]()
    for step in steps:
        if step < 0 and lent:
            pool.give_back(lent.pop(0))
        elif step > 0 and (share := pool.take(step)) is not None:
            lent.append(share)
    for name in ("0", "1", "2"):
        assert sum(share.amount for share in lent if name in share.ids) <= 1


def test_asking_what_would_be_free_lends_nothing() -> None:
    pool = GpuPool(2)
    halves = [share for share in (pool.take(0.5) for _ in range(3)) if share]
    assert pool.after(halves[:2]).take(1) == GpuShare(("0",), 1.0)
    assert pool.after([halves[0], halves[1]]).take(2) is None
    assert pool.after(halves).take(2) is not None
    assert pool.take(1) is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("GPU-aa", "GPU-ab", "GPU-b")),
        ("1,0", ("GPU-ab", "GPU-aa")),
        ("GPU-b", ("GPU-b",)),
        ("0,7,1", ("GPU-aa",)),
        ("GPU-a", ()),
        ("", ()),
        ("-1", ()),
    ],
)
def test_the_workers_own_restriction_holds(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(gpus, "_nvml_uuids", lambda: ("GPU-aa", "GPU-ab", "GPU-b"))
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert detect_gpus(environ) == expected
