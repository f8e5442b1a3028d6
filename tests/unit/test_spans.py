"""The numbers of a frame's calls, as columns and as bits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame_orchestrator.spans import Span

counters = st.lists(st.integers(1, 10_000), min_size=1, max_size=50, unique=True)


@given(counters)
def test_a_span_survives_its_columns(numbers: list[int]) -> None:
    span = Span.of(numbers)
    loaded = Span.load(span.first, span.last, span.pack())
    assert list(loaded.counters) == sorted(numbers)


@given(counters, counters)
def test_bits_and_counters_say_the_same(numbers: list[int], others: list[int]) -> None:
    span = Span.of(numbers)
    bits = span.bits(sorted(others))
    assert span.picked(bits) == sorted({*numbers} & {*others})


def test_consecutive_counters_need_no_list() -> None:
    assert Span.of([3, 1, 2]).pack() is None
    assert Span.of([1, 3]).pack() is not None
