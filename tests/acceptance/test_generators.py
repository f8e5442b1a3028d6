"""Streams of generators from end to end: whole and in order, whatever the items weigh."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import flame
from flame.errors import StoreError, WorkerLost
from flame.testing import embedded
from lab.cluster import LabCluster
from lab.wait import wait_until

LARGE = 200_000
SHAPES = [[LARGE, 5, LARGE], [LARGE, 5], [5, LARGE], [LARGE], [LARGE, LARGE + 1], [5], []]


def texts(sizes: list[int]) -> Iterator[str]:
    for size in sizes:
        yield "x" * size


async def later(sizes: list[int]) -> AsyncIterator[str]:
    for size in sizes:
        await asyncio.sleep(0)
        yield "x" * size


def numbers(count: int) -> Iterator[tuple[int, bytes]]:
    """Many items, now and then a large one."""
    for number in range(count):
        yield number, bytes(LARGE if number % 100 == 50 else 3)


def tagged(folder: str, sizes: list[int]) -> Iterator[str]:
    """Items that tell which run gave them; the first run stops before its last item."""
    with Path(folder, "runs").open("a") as file:
        file.write("x")
    run = len(Path(folder, "runs").read_text())
    for number, size in enumerate(sizes):
        if run == 1 and number == len(sizes) - 1:
            time.sleep(60)
        yield str(run) * size


def texts_and_death(sizes: list[int]) -> Iterator[str]:
    yield from texts(sizes)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["rabbit", "embedded"])
def runner(request: pytest.FixtureRequest) -> Iterator[flame.Runner]:
    """A runner whose calls go through RabbitMQ, or through this process."""
    opened: AbstractContextManager[flame.Client] = embedded()
    if request.param == "rabbit":
        cluster: LabCluster = request.getfixturevalue("cluster")
        cluster.worker("--slots", "2")
        opened = cluster.client()
    with opened as client, flame.Runner("t", client=client) as made:
        yield made


def test_large_and_small_items_come_whole_and_in_order(runner: flame.Runner) -> None:
    for generator in (texts, later):
        service = runner.service(generator)
        futures = [service(sizes) for sizes in SHAPES]
        for sizes, future in zip(SHAPES, futures, strict=True):
            assert [len(text) for text in future.stream()] == sizes
            assert [len(text) for text in future.get(30)] == sizes


def test_a_long_stream_with_large_items_among_it_comes_whole(runner: flame.Runner) -> None:
    future = runner.service(numbers)(2000)
    assert [number for number, _ in future.stream()] == list(range(2000))
    assert [number for number, _ in future.get(30)] == list(range(2000))


def test_async_for_gives_large_and_small_items_in_order(runner: flame.Runner) -> None:
    async def read(sizes: list[int]) -> list[int]:
        future = runner.service(texts)(sizes)
        streamed = [len(text) async for text in future.stream()]
        assert [len(text) for text in await future] == streamed
        return streamed

    async def main() -> list[list[int]]:
        return await asyncio.gather(*map(read, SHAPES))

    assert asyncio.run(main()) == SHAPES


def test_maps_and_executors_give_the_items_as_lists(runner: flame.Runner) -> None:
    expected = [list(texts(sizes)) for sizes in SHAPES]
    assert list(runner.service(texts).map(SHAPES)) == expected
    with flame.Executor(client=runner.client) as executor:
        assert list(executor.map(texts, SHAPES)) == expected


def test_a_stream_goes_on_elsewhere_when_its_worker_is_killed(
    cluster: LabCluster, tmp_path: Path
) -> None:
    sizes = [LARGE, 5, LARGE, 5, LARGE]
    first = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(tagged)(str(tmp_path), sizes)
        stream = future.stream()
        begun = [next(stream) for _ in range(4)]
        first.kill()
        cluster.worker("--slots", "1")
        streamed = begun + list(stream)
        assert [(text[0], len(text)) for text in streamed] == [
            (run, size) for run, size in zip("11112", sizes, strict=True)
        ]
        assert future.get(30) == streamed


def test_the_items_of_a_call_that_dies_come_before_its_error(cluster: LabCluster) -> None:
    cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        future = runner.service(texts_and_death)([LARGE, 5, LARGE])
        stream = future.stream()
        assert [len(next(stream)) for _ in range(3)] == [LARGE, 5, LARGE]
        with pytest.raises(WorkerLost):
            next(stream)
        with pytest.raises(WorkerLost):
            future.get(30)


def test_an_item_that_cannot_be_stored_fails_its_call(cluster: LabCluster) -> None:
    store = cluster.folder / "store"
    store.mkdir()
    (store / "objects").touch()  # where the folder of that name would be
    worker = cluster.worker("--slots", "1")
    with cluster.client() as client, flame.Runner("t", client=client) as runner:
        service = runner.service(texts)
        future = service([5, LARGE, 5])
        stream = future.stream()
        assert next(stream) == "x" * 5
        with pytest.raises(StoreError, match="could not be stored"):
            next(stream)
        with pytest.raises(StoreError, match="could not be stored"):
            future.get(30)
        assert service([5, 6]).get(30) == ["x" * 5, "x" * 6]
        wait_until(lambda: worker.health.get("held") == 0, 30)
