"""Marks of programs that have embedded clusters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flame_infra import programs
from flame_infra.programs import Programs


def arrived(folder: Path, name: str) -> Programs:
    program = Programs(folder, name)
    with program.alone():
        program.come()
    return program


def kill(program: Programs) -> None:
    """What the kernel does when a process ends."""
    assert program._lock is not None
    os.close(program._lock)
    program._lock = None


def test_only_those_are_gone_that_were_killed(tmp_path: Path) -> None:
    us, killed, _, ended = [arrived(tmp_path, name) for name in ("us", "killed", "lives", "ended")]
    assert [*us.gone()] == []
    kill(killed)
    ended.leave()
    ended.leave()
    assert [*us.gone()] == ["killed"]
    assert [*us.gone()] == []
    assert sorted(mark.name for mark in tmp_path.iterdir()) == ["lives.program", "us.program"]


def test_what_was_not_cleared_up_to_the_end_is_found_again(tmp_path: Path) -> None:
    us, killed = arrived(tmp_path, "us"), arrived(tmp_path, "killed")
    kill(killed)

    def clear_up() -> None:
        for _ in us.gone():
            raise OSError("the disk is full")

    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            clear_up()
    assert [*us.gone()] == ["killed"]


def test_a_program_that_was_stopped_holds_nobody_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_LONGEST_WAIT_S", 0.0)
    stopped, us = Programs(tmp_path, "stopped"), Programs(tmp_path, "us")
    with stopped.alone(), pytest.raises(OSError, match="was it stopped"), us.alone():
        pass
    with us.alone():
        us.come()
