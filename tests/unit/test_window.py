"""How many calls a client has on their way: enough for the workers, not more."""

from __future__ import annotations

from flame.window import FIRST_CALLS, LEAST_CALLS, MOST_CALLS, Window


def full(window: Window) -> Window:
    window.inside = window.limit
    return window


def test_it_doubles_with_each_round_trip_at_first() -> None:
    window = full(Window(_since=0.0))
    window.settled(FIRST_CALLS, now=0.01)
    assert window.limit == 2 * FIRST_CALLS


def test_results_that_come_while_there_is_room_say_nothing() -> None:
    window = Window(_since=0.0)
    window.inside = 10
    window.settled(10, now=0.01)
    assert window.limit == FIRST_CALLS


def test_it_holds_half_a_second_of_work_at_the_measured_rate() -> None:
    window = full(Window(_since=0.0))
    window.settled(4000, now=0.1)
    assert window.limit == 20_000


def test_slow_calls_leave_the_queue_to_others() -> None:
    window = full(Window(_since=0.0))
    for step in range(1, 50):
        window.settled(2, now=step * 0.11)
    assert window.limit == LEAST_CALLS


def test_a_queue_that_runs_dry_lets_more_go_and_stays_so() -> None:
    window = full(Window(_since=0.0))
    for _ in range(4):
        window.starved()
    assert window.limit == 16 * LEAST_CALLS
    window.settled(1, now=1.0)
    assert window.limit == 16 * LEAST_CALLS


def test_it_never_leaves_its_bounds() -> None:
    window = full(Window(_since=0.0))
    window.settled(10_000_000, now=0.1)
    assert window.limit == MOST_CALLS
    for _ in range(100):
        window.starved()
    assert window.limit == MOST_CALLS
