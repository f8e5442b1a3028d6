"""Room is kept for the class that has waited longest with none of its calls started."""

from __future__ import annotations

from flame_worker.aging import AGED_S, Aging


def test_room_is_kept_for_calls_that_have_waited_long() -> None:
    aging = Aging()
    assert aging.look({"c2": 0}, now=0.0) is None
    assert aging.look({"c2": 0}, now=AGED_S) is None
    assert aging.look({"c2": 0}, now=AGED_S + 1) == "c2"


def test_a_class_of_which_calls_start_is_not_kept_waiting() -> None:
    aging = Aging()
    for second in range(20):
        assert aging.look({"c1": second}, now=second) is None


def test_a_class_of_which_nothing_waits_is_forgotten() -> None:
    aging = Aging()
    aging.look({"c2": 0}, now=0.0)
    aging.look({}, now=1.0)
    assert aging.look({"c2": 0}, now=AGED_S + 1) is None


def test_classes_take_turns_by_how_long_they_have_waited() -> None:
    aging = Aging()
    aging.look({"c1": 7, "c2": 0}, now=0.0)
    aging.look({"c1": 8, "c2": 0}, now=1.0)
    assert aging.look({"c1": 8, "c2": 0}, now=AGED_S + 2) == "c2"
    assert aging.look({"c1": 8, "c2": 1}, now=AGED_S + 3) == "c1"
    assert aging.look({"c1": 9, "c2": 1}, now=2 * AGED_S + 4) == "c2"
