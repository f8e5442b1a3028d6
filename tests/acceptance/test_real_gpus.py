"""Calls on real NVIDIA cards, with PyTorch: on a machine with neither they are skipped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import flame
from flame.errors import WorkerLost
from flame.testing import embedded
from flame_worker.command import EXIT_CONFIG
from flame_worker.gpus import detect_gpus

torch = pytest.importorskip("torch")

CARDS = detect_gpus()
pytestmark = [
    pytest.mark.skipif(not CARDS, reason="no NVIDIA card, driver or nvidia-ml-py here"),
    pytest.mark.timeout(300),
]


class Seen(NamedTuple):
    """What a call saw of the cards."""

    visible: str
    lent: tuple[str, ...]
    count: int
    error: float


@pytest.fixture(scope="module")
def runner() -> Iterator[flame.Runner]:
    with embedded() as client, flame.Runner("gpus", client=client) as runner:
        yield runner


def multiply(size: int) -> Seen:
    """Multiply matrices on the card, if there is one; how far it is from the cpu's product."""
    import torch

    call = flame.current_call()
    assert call is not None
    visible, lent = os.environ["CUDA_VISIBLE_DEVICES"], call.gpus
    if not torch.cuda.is_available():
        return Seen(visible, lent, torch.cuda.device_count(), 0.0)
    a, b = torch.rand(2, size, size, dtype=torch.float64)
    there = (a.to("cuda") @ b.to("cuda")).cpu()
    error = float((there - a @ b).norm() / (a @ b).norm())
    return Seen(visible, lent, torch.cuda.device_count(), error)


def hold(folder: str, name: str, other: str) -> tuple[str, float, float]:
    """Use the card until another call has said that it does; which card, from when to when."""
    import torch

    began = time.monotonic()
    torch.ones(1024, device="cuda").sum().item()
    Path(folder, name).touch()
    deadline = time.monotonic() + 60
    while other and not Path(folder, other).exists():
        assert time.monotonic() < deadline, f"{other} has not begun"
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic()


def fill(share: float, *, then_die: bool) -> int:
    """Take a share of the card's memory; its bytes."""
    import torch

    size = int(torch.cuda.get_device_properties(0).total_memory * share)
    taken = torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    if then_die:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(taken.numel())


def test_a_call_has_the_card_that_it_reserved_and_no_other(runner: flame.Runner) -> None:
    seen = runner.service(multiply, resreq="cpu=1,gpu=1")(512).get(timeout=120)
    assert seen.visible in CARDS
    assert (seen.lent, seen.count) == ((seen.visible,), 1)
    assert 0 < seen.error < 1e-12


def test_a_call_that_reserves_none_sees_none(runner: flame.Runner) -> None:
    assert runner.service(multiply)(64).get(timeout=120) == Seen("", (), 0, 0.0)


def test_shares_of_a_card_are_used_at_the_same_time(runner: flame.Runner, tmp_path: Path) -> None:
    service = runner.service(hold, resreq="cpu=1,gpu=0.5")
    both = [service(str(tmp_path), *names) for names in (("a", "b"), ("b", "a"))]
    (first, *_), (second, *_) = runner.get(both, timeout=180)
    assert first == second or len(CARDS) > 1


def test_whole_cards_are_used_by_one_call_at_a_time(runner: flame.Runner, tmp_path: Path) -> None:
    service = runner.service(hold, resreq="cpu=1,gpu=1")
    calls = [service(str(tmp_path), f"{n}", "") for n in range(2 * len(CARDS))]
    spans = sorted(runner.get(calls, timeout=180))
    for (card, _, ended), (next_card, began, _) in pairwise(spans):
        assert card != next_card or began >= ended


def test_the_memory_of_a_child_that_was_killed_is_there_for_the_next_call(
    runner: flame.Runner,
) -> None:
    service = runner.service(fill, resreq="cpu=1,gpu=1")
    for _ in range(2):
        with pytest.raises(WorkerLost, match="SIGKILL"):
            service(0.7, then_die=True).get(timeout=120)
    assert service(0.7, then_die=False).get(timeout=120) > 0


def ramp(size: int) -> Any:
    import torch

    return torch.arange(size, device="cuda")


def test_a_tensor_of_the_card_comes_back_as_one(runner: flame.Runner) -> None:
    made = runner.service(ramp, resreq="cpu=1,gpu=1")(1000).get(timeout=120)
    assert made.device.type == "cuda"
    assert made.sum().item() == 499500


def test_more_cards_than_there_are_is_an_error_that_says_so(runner: flame.Runner) -> None:
    (worker,) = runner.client.workers()
    assert worker["gpus"] == len(CARDS)
    start = "import sys; from flame_worker.command import main; sys.exit(main())"
    program = [sys.executable, "-c", start, "--gpu", "99"]
    environ = {**os.environ, "FLAME_BROKER_URL": "amqp://127.0.0.1:1", "FLAME_KEY": "k" * 40}
    refused = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60)
    assert refused.returncode == EXIT_CONFIG
    assert f"(GPUs found: {len(CARDS)})" in refused.stderr
