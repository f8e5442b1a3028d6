"""A child's output becomes lines of calls, within bounds, however the bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame_worker.capture import MARK_END, MARK_START
from flame_worker.output import LastWords, OutputSplitter


class Listener:
    """Collects lines by call; ``running`` is the call that runs."""

    def __init__(self, max_bytes: int = 10_000, max_lines: int = 1000) -> None:
        self.lines: dict[int, list[str]] = {}
        self.running = -1
        self.splitter = OutputSplitter(self.emit, lambda: self.running, max_bytes, max_lines)

    def emit(self, serial: int, lines: list[str]) -> None:
        self.lines.setdefault(serial, []).extend(lines)


def mark(serial: int) -> bytes:
    return MARK_START + str(serial).encode() + MARK_END


def test_marked_lines_go_to_their_call() -> None:
    listener = Listener()
    listener.splitter.feed(mark(4) + b"one\ntwo\n" + mark(5) + b"three\n")
    assert listener.lines == {4: ["one", "two"], 5: ["three"]}


def test_a_line_without_end_counts_when_its_call_ends() -> None:
    listener = Listener()
    listener.splitter.feed(mark(4) + b"half")
    assert listener.lines == {}
    listener.splitter.end_call()
    listener.splitter.feed(mark(5) + b"next\n")
    assert listener.lines == {4: ["half"], 5: ["next"]}


def test_unmarked_lines_go_to_the_running_call() -> None:
    listener = Listener()
    listener.running = 7
    listener.splitter.feed(b"from C code\n")
    listener.splitter.feed(mark(7) + b"from Python\n")
    listener.running = 8
    listener.splitter.feed(b"more C code\n")
    assert listener.lines == {7: ["from C code", "from Python"], 8: ["more C code"]}


def test_a_mark_may_come_before_the_result_of_the_call_before() -> None:
    listener = Listener()
    listener.running = 3
    listener.splitter.feed(mark(4) + b"early\n")
    assert listener.lines == {4: ["early"]}


def test_too_many_lines_are_dropped_and_the_next_call_starts_afresh() -> None:
    listener = Listener(max_lines=3)
    listener.splitter.feed(mark(1) + b"x\n" * 10 + b"partial")
    listener.splitter.feed(b"more\n" * 10)
    listener.splitter.feed(mark(2) + b"y\n")
    assert listener.lines[1][:3] == ["x"] * 3
    assert "dropped" in listener.lines[1][3]
    assert len(listener.lines[1]) == 4
    assert listener.lines[2] == ["y"]


def test_too_many_bytes_are_dropped() -> None:
    listener = Listener(max_bytes=100)
    for _ in range(50):
        listener.splitter.feed(mark(1) + b"x" * 30)
    listener.splitter.end_call()
    assert len(listener.lines[1]) == 1
    assert "dropped" in listener.lines[1][0]


def test_a_long_line_comes_in_pieces() -> None:
    listener = Listener(max_bytes=10**6)
    listener.splitter.feed(mark(1) + b"x" * 200_000 + b"\n")
    assert "".join(listener.lines[1]) == "x" * 200_000
    assert max(map(len, listener.lines[1])) == 64 * 1024


_texts = st.lists(
    st.tuples(st.integers(0, 50), st.lists(st.text(alphabet="ab \x00\x02\x03é", max_size=8))),
    max_size=8,
    unique_by=lambda item: item[0],
).map(sorted)


@given(_texts, st.lists(st.integers(1, 30)))
def test_however_the_bytes_are_cut_the_lines_are_the_same(
    calls: list[tuple[int, list[str]]], cuts: list[int]
) -> None:
    data = b"".join(
        mark(serial) + "".join(line + "\n" for line in lines).encode() for serial, lines in calls
    )
    listener = Listener()
    for cut in cuts:
        piece, data = data[:cut], data[cut:]
        listener.splitter.feed(piece)
    listener.splitter.feed(data)
    listener.splitter.end_call()
    assert listener.lines == {serial: lines for serial, lines in calls if lines}


@given(st.lists(st.binary(max_size=60)))
def test_random_bytes_never_stop_the_splitter(pieces: list[bytes]) -> None:
    listener = Listener(max_bytes=200, max_lines=20)
    for piece in pieces:
        listener.splitter.feed(MARK_START[:3] + piece)
    listener.splitter.end_call()
    assert sum(map(len, listener.lines.values())) <= 21 * max(1, len(listener.lines))


@given(st.lists(st.tuples(st.sampled_from("aé€😀"), st.integers(0, 20_000)), max_size=60))
def test_last_words_are_the_end_within_their_bounds(parts: list[tuple[str, int]]) -> None:
    words, lines = LastWords(), [character * count for character, count in parts]
    for line in lines:
        words.hear([line])
    said = str(words)
    assert "\n".join(lines).endswith(said)
    assert len(said.encode()) <= 8 * 1024
    assert said.count("\n") < 40
    assert len(said.encode()) > 8 * 1024 - 4 or said == "\n".join(lines[-40:])
