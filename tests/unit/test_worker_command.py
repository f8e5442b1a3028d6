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
    "options", [("--gpu", "-1"), ("--slots", "0"), ("--slots", "1000000"), ("--gpu", "x")]
)
def test_numbers_that_make_no_sense_are_wrong_usage(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main([*options])
    assert refused.value.code == 2
