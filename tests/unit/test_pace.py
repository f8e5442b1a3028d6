"""What is known of a target's pace, and when it is good enough to count on."""

from __future__ import annotations

from flame_broker.messages import Target
from flame_worker.pace import Pace

TARGET = Target("m:f")


def test_nothing_is_known_of_a_target_that_never_ran() -> None:
    assert Pace().guess_s(TARGET, 1) is None
    assert Pace().foresee_s(TARGET, 1, 1.0) is None


def test_a_steady_target_is_foreseen_after_a_few_calls() -> None:
    pace = Pace()
    for _ in range(8):
        pace.learn(TARGET, 1, 0.1)
    assert abs((pace.foresee_s(TARGET, 1, 0.01) or 0) - 0.1) < 1e-9


def test_a_target_whose_calls_vary_is_guessed_but_not_foreseen() -> None:
    pace = Pace()
    for number in range(50):
        pace.learn(TARGET, 1, 0.05 if number % 2 else 0.15)
    assert pace.foresee_s(TARGET, 1, 0.01) is None
    assert pace.guess_s(TARGET, 1)


def test_one_call_of_another_length_ends_the_foresight_for_a_while() -> None:
    pace = Pace()
    for _ in range(8):
        pace.learn(TARGET, 1, 0.1)
    pace.learn(TARGET, 1, 5.0)
    assert pace.foresee_s(TARGET, 1, 0.01) is None
