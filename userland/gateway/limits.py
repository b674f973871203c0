"""What a caller's quota leaves him, as the headers that clients' retries and dashboards read."""

from __future__ import annotations

import asyncio
import time

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from ..aio import AsyncClient

FRESH_S = 0.5
"""So old may be what the kernel said of a quota, or of a model."""


class Limits:
    """The quota of one tenant, asked of the kernel at most once in FRESH_S."""

    def __init__(self, aio: AsyncClient) -> None:
        self._aio = aio
        self._info: t.QuotaInfo | None = None
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def refresh(self) -> None:
        """A tenant without limits is asked for seldom, so it costs nothing."""
        async with self._asking:
            age = time.monotonic() - self._asked_at
            if age < (FRESH_S if self._info is not None else 10 * FRESH_S):
                return
            self._asked_at = time.monotonic()
            try:
                found = (await self._aio.call(table.Quotas())).quotas
            except errors.LLMasOSError:
                return
            subject = self._aio.hello.subject
            self._info = next((row for row in found if row.path == subject and row.limit), None)

    def headers(self, anthropic: bool) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-* (OpenAI), or anthropic-ratelimit-*; none without a limit. Requests are those that may
        run or wait at once, tokens a minute's: OpenAI's are the generated ones."""
        info = self._info
        if info is None or info.limit is None:
            return []
        kinds = {
            "requests": (info.limit.queue, info.limit.queue and info.limit.queue - info.queue),
            "input-tokens": (info.limit.tokens_in, info.tokens_in),
            "output-tokens": (info.limit.tokens_out, info.tokens_out),
        }
        found = []
        for kind, (limit, left) in kinds.items():
            if not limit or left is None:
                continue
            left = max(0, left)
            seconds = 0.0 if kind == "requests" else 60 * (limit - left) / limit
            if anthropic:
                reset = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
                name = f"anthropic-ratelimit-{kind}"
                values = {f"{name}-limit": limit, f"{name}-remaining": left, f"{name}-reset": reset}
            else:
                name = {"output-tokens": "tokens"}.get(kind, kind)
                values = {
                    f"x-ratelimit-limit-{name}": limit,
                    f"x-ratelimit-remaining-{name}": left,
                    f"x-ratelimit-reset-{name}": f"{seconds:.3g}s",
                }
            found += [(key.encode(), str(value).encode()) for key, value in values.items()]
        return found
