"""Targets that are coroutines or generators, run to their end in a child."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio

__all__ = ["STREAMED", "Coroutines"]

STREAMED: Final = frozenset({AsyncGeneratorType, CoroutineType, GeneratorType})
"""Types of return values that are not the result yet."""

_END: Final = object()


class Coroutines:
    """One event loop for the life of the process, made when a call first needs it."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine; tasks that it leaves behind are cancelled, as ``asyncio.run`` does."""
        try:
            return self._run(coroutine)
        finally:
            self._cancel_leftovers()

    def items(self, generator: AsyncGenerator[Any, None]) -> Iterator[Any]:
        """The items of an async generator."""
        try:
            while (item := self._run(_next(generator))) is not _END:
                yield item
        finally:
            self._run(generator.aclose())
            self._cancel_leftovers()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _cancel_leftovers(self) -> None:
        import asyncio

        assert self._runner is not None
        tasks = asyncio.all_tasks(self._runner.get_loop())
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        self._run(_settled(tasks))


async def _next(generator: AsyncGenerator[Any, None]) -> Any:
    return await anext(generator, _END)


async def _settled(tasks: set[asyncio.Task[Any]]) -> None:
    import asyncio

    await asyncio.gather(*tasks, return_exceptions=True)
