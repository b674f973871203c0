"""What the gateway does while nobody waits for it: background responses, batches, fine-tuning jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("llmasos.gateway")


class Works:
    """Tasks by the id of what they work on. They end with the gateway; its store tells the next one what was
    under way."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, id: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[id] = asyncio.create_task(work)
        task.add_done_callback(lambda done: self._ended(id, done))

    def _ended(self, id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(id) is task:
            del self._tasks[id]
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("work on %s failed", id, exc_info=problem)

    async def stop(self, id: str) -> None:
        """Cancels the work on `id`, if there is any here, and waits for its end."""
        if (task := self._tasks.get(id)) is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def close(self) -> None:
        for id in list(self._tasks):
            await self.stop(id)
