"""What the gateway does while nobody waits for it: background responses, batches, fine-tuning jobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

from llmasos.syscalls import errors

log = logging.getLogger("llmasos.gateway")


class Works:
    """Tasks by the id of what they work on. They end with the gateway; its store tells the next one what was
    under way."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._crowds: Counter[str] = Counter()

    def start(self, id: str, work: Coroutine[Any, Any, None], *, crowd: str = "") -> None:
        """`crowd` names those of whom `check` admits so many and no more."""
        task = self._tasks[id] = asyncio.create_task(work)
        self._crowds[crowd] += 1
        task.add_done_callback(lambda done: self._ended(id, crowd, done))

    def check(self, crowd: str, most: int) -> None:
        """Raises QueueFull when `most` of the crowd are under way."""
        if self._crowds[crowd] >= most:
            raise errors.QueueFull(
                f"{most} {crowd} are under way already", hint="wait for one, or cancel it", retry_after=1
            )

    @contextlib.contextmanager
    def within(self, crowd: str, most: int) -> Iterator[None]:
        """One more of the crowd, for what is no task of its own. Raises QueueFull."""
        self.check(crowd, most)
        self._crowds[crowd] += 1
        try:
            yield
        finally:
            self._leave(crowd)

    def _leave(self, crowd: str) -> None:
        self._crowds[crowd] -= 1
        if not self._crowds[crowd]:
            del self._crowds[crowd]

    def _ended(self, id: str, crowd: str, task: asyncio.Task[None]) -> None:
        self._leave(crowd)
        if self._tasks.get(id) is task:
            del self._tasks[id]
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("work on %s failed", id, exc_info=problem)

    def __contains__(self, id: str) -> bool:
        return id in self._tasks

    async def stop(self, id: str) -> None:
        """Cancels the work on `id`, if there is any here, and waits for its end."""
        if (task := self._tasks.get(id)) is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def close(self) -> None:
        for id in list(self._tasks):
            await self.stop(id)
