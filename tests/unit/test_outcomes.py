"""How failures are described, and rebuilt."""

from __future__ import annotations

import pytest

from flame_broker import errors, outcomes
from flame_broker.errors import MalformedMessage, RemoteError, StoreError, WorkerLost


class Stubborn(Exception):
    """Cannot be rebuilt from its ``args``: pickle calls ``Stubborn(message)``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def _raised(exc: Exception) -> Exception:
    with pytest.raises(type(exc)) as caught:
        _raise(exc)
    return caught.value


def _raise(exc: Exception) -> None:
    raise exc


def test_an_exception_arrives_as_itself_with_the_remote_traceback_as_its_cause() -> None:
    got = outcomes.decode_error(outcomes.encode_error(_raised(KeyError("x"))), "c-1")
    assert isinstance(got, KeyError)
    assert got.args == ("x",)
    assert isinstance(got.__cause__, RemoteError)
    assert "in _raise" in got.__cause__.traceback
    assert got.__cause__.call_id == "c-1"


def test_one_that_cannot_be_rebuilt_arrives_as_a_remote_error() -> None:
    got = outcomes.decode_error(outcomes.encode_error(_raised(Stubborn("boom", 7))), "c-1")
    assert isinstance(got, RemoteError)
    assert got.type_name.endswith("Stubborn")
    assert "boom" in str(got)
    assert "Traceback" in str(got)


def test_one_whose_str_raises_is_still_described() -> None:
    got = outcomes.decode_error(outcomes.encode_error(Mute()), "c-1")
    cause = got if isinstance(got, RemoteError) else got.__cause__
    assert "Mute" in str(cause)
    assert "str() failed" in str(cause)


def test_a_huge_message_is_clipped() -> None:
    payload = outcomes.encode_error(ValueError("x" * 10_000_000))
    assert len(payload) < 200_000


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n != "EnvironmentBuildError"])
def test_every_error_of_ours_survives_as_a_failure(name: str) -> None:
    kind = getattr(errors, name)
    got = outcomes.decode_failure(outcomes.encode_failure(kind, "why"), "c-1")
    assert type(got) is kind
    assert "why" in str(got)


def test_a_lost_worker_knows_its_call() -> None:
    got = outcomes.decode_failure(outcomes.encode_failure(WorkerLost, "killed"), "c-9")
    assert isinstance(got, WorkerLost)
    assert got.call_id == "c-9"
    assert not isinstance(
        outcomes.decode_failure(outcomes.encode_failure(StoreError, "x"), ""), WorkerLost
    )


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x90", b"\x92\xa3abc\xa3abc"])
def test_nonsense_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        outcomes.decode_failure(payload, "c-1")


class Undescribable(Exception):
    def __getattr__(self, name: str) -> object:
        raise ValueError(name)


def raise_undescribable() -> None:
    raise Undescribable


def test_an_exception_that_cannot_be_described_still_has_a_name_and_a_traceback() -> None:
    with pytest.raises(Undescribable) as caught:
        raise_undescribable()
    rebuilt = outcomes.decode_error(outcomes.encode_error(caught.value), "c-1")
    remote = rebuilt.__cause__ or rebuilt  # Python 3.13 describes it by itself
    assert isinstance(remote, RemoteError)
    assert "Undescribable" in remote.type_name
    assert "raise Undescribable" in str(remote)


@pytest.mark.parametrize("letter", ["x", "ü", "\udcff", "🔥"])
def test_what_an_exception_or_failure_says_is_clipped_in_bytes(letter: str) -> None:
    text = letter * 200_000
    for payload in (
        outcomes.encode_failure(WorkerLost, text),
        outcomes.encode_error(_raised(ValueError(text))),
    ):
        assert len(payload) < 128 * 1024
    assert "bytes left out" in str(outcomes.decode_failure(
        outcomes.encode_failure(WorkerLost, text), "c-1"
    ))  # fmt: skip
