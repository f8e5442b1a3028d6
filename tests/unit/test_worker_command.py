"""What ``flame-worker`` is told is checked before it takes calls."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from flame_worker import command, gpus

_numbers = count()


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_BROKER_URL", f"memory://command-{next(_numbers)}")
    monkeypatch.setenv("FLAME_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(command, "show_logs", lambda **_: None)  # it would last for the whole run


@pytest.mark.parametrize("found", [(), ("GPU-a",), ("GPU-a", "GPU-b")])
def test_more_gpus_than_there_are_is_a_configuration_error(
    found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "_nvml_uuids", lambda: found)
    assert command.main(["--gpu", "3"]) == command.EXIT_CONFIG
    message = capsys.readouterr().err
    assert "gpu=3" in message
    assert f"GPUs found: {len(found)}" in message


def test_gpus_that_the_worker_may_not_see_do_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "_nvml_uuids", lambda: ("GPU-a", "GPU-b"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert command.main(["--gpu", "2"]) == command.EXIT_CONFIG
    assert "GPUs found: 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--cpu", "-1", "expected a number above 0"),
        ("--cpu", "nan", "expected a number above 0"),
        ("--cpu", "some", "expected a number above 0"),
        ("--drain-timeout", "-1", "expected seconds, 0 or more"),
        ("--drain-timeout", "nan", "expected seconds, 0 or more"),
        ("--pool", "a.b", "expected letters, digits"),
        ("--mem", "lots", "expected a size such as 16g"),
        ("--mem", "-1", "expected a size such as 16g"),
        ("--mem", "1g,cpu=2", "expected a size such as 16g"),
        ("--recycle-memory", "lots", "expected a size such as 16g"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_was_expected(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main([f"{option}={value}"])
    assert refused.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"argument {option}: {value}: {expected}" in message


@pytest.mark.parametrize(
    "options", [("--gpu", "-1"), ("--slots", "0"), ("--slots", "1000000"), ("--gpu", "x")]
)
def test_numbers_that_make_no_sense_are_wrong_usage(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main([*options])
    assert refused.value.code == 2
