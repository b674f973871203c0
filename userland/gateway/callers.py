"""Who calls: from the API key of a request to a session of its tenant with the kernel."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from ..aio import AsyncClient
from ..client import Client
from ..llm import LLM
from ..models import full_name
from ..tokenizer import Tokenizer
from .access import ApiKeys
from .limits import FRESH_S, Limits

MOST_TOKENIZERS = 32
"""Tokenizers that are kept, of all models together: one takes up to 100 MB."""

LABEL = "http"
"""As whom callers without a key come, where none is asked for: a sub-tenant of the gateway's own user."""


def user_of(tenant: str) -> str:
    """Whose key would be more than a session of `tenant`: its own, without one the gateway's user's."""
    return tenant.removesuffix(f"/{LABEL}")


class Unauthorized(errors.PermissionDenied):
    """No key, or one that nobody has. Never travels over the socket."""


class Tokenizers:
    """Those of all callers' models, by the model's digest: each is read once."""

    def __init__(self) -> None:
        self._known: dict[str, Tokenizer] = {}
        self._reading = asyncio.Lock()

    async def of(self, client: Client, model: str, digest: str) -> Tokenizer:
        async with self._reading:
            tokenizer = self._known.pop(digest, None)
            if tokenizer is None:
                tokenizer = await asyncio.to_thread(Tokenizer.load, client, model)
            self._known[digest] = tokenizer  # the latest used is the last
            while len(self._known) > MOST_TOKENIZERS:
                del self._known[next(iter(self._known))]
            return tokenizer


@dataclass(frozen=True, slots=True)
class Known:
    """A model as it was when the kernel was last asked for it."""

    digest: str
    llm: LLM
    asked_at: float


@dataclass(eq=False)
class Caller:
    """A tenant's session with the kernel; all its requests share one."""

    client: Client
    tokenizers: Tokenizers
    models: dict[str, Known] = field(default_factory=dict)
    rights: frozenset[t.Capability] = frozenset()
    login: tuple[str, t.Rights] = ("", ())
    """What `Callers.session` takes; `Callers.again` takes it as JSON gives it back."""

    def __post_init__(self) -> None:
        self.aio = AsyncClient(connection=self.client.connection)
        self.limits = Limits(self.aio)

    @property
    def tenant(self) -> str:
        return self.client.hello.subject

    @property
    def has_key(self) -> bool:
        return bool(self.login[0])

    def needs(self, *rights: t.Capability) -> None:
        """Raises PermissionDenied without one of them. For what the gateway keeps itself: the kernel looks
        after the rest."""
        if self.rights.isdisjoint(rights):
            who = "the key lacks" if self.has_key else "who comes without a key does not have"
            raise errors.PermissionDenied(
                f"{who} the right {' or '.join(rights)}", right=rights[0], tenant=self.tenant
            )

    async def llm(self, name: str) -> LLM:
        """The model `name`, which was there FRESH_S ago: beside many requests the question is a good part of
        the way to a first token, and the kernel looks again. Raises NoSuchModel, UnsupportedModel."""
        full = full_name(name)
        known = self.models.get(full)
        if known is not None and time.monotonic() - known.asked_at < FRESH_S:
            return known.llm
        try:
            found = await self.aio.call(table.Stat(f"/models/{full}"))
        except (errors.NotFound, errors.InvalidRequest):
            raise errors.NoSuchModel(
                f"The model {name!r} does not exist or you do not have access to it.", hint=self._way_to(name)
            ) from None
        asked_at = time.monotonic()
        if known is not None and known.digest == found.digest:
            llm = known.llm
        else:
            length = found.details.get("context_length")
            if not isinstance(length, int) or length <= 0:
                raise errors.UnsupportedModel(f"{full} does not say how long its context is")
            tokenizer = await self.tokenizers.of(self.client, full, found.digest)
            llm = LLM(self.client, full, tokenizer, context_length=length)
        self.models[full] = Known(found.digest, llm, asked_at)
        return llm

    def _way_to(self, name: str) -> str:
        ways = ["`llsh list` shows what is there"]
        if "+" not in name:  # adapters are made here
            ways.append(f"`llsh pull {name}` brings one in")
        if not self.has_key:
            user = user_of(self.tenant)
            ways.append(f"what {user} trained a key sees: `llsh key api new NAME --as {user}`")
        return "; ".join(ways)


class Callers:
    """All callers. `address` is the kernel's. Without `keys` (None) everybody is a part of the gateway's own
    user; with them nobody comes in without one, also when the last one is gone."""

    def __init__(self, address: str | None, keys: ApiKeys | None) -> None:
        self._address = address
        self.keys = keys
        self._known: dict[tuple[str, t.Rights], Caller] = {}
        self._tokenizers = Tokenizers()
        self._opening = asyncio.Lock()
        self._own: Caller | None = None

    async def of(self, key: str | None) -> Caller:
        """Raises Unauthorized, DaemonUnreachable."""
        tenant, rights = "", t.TENANT_RIGHTS
        if self.keys is not None:
            entry = self.keys.find(key) if key else None
            if entry is None:
                raise Unauthorized(
                    "Incorrect API key provided." if key else "You didn't provide an API key.",
                    hint="send `Authorization: Bearer KEY`; `llsh key api new NAME --as TENANT` makes one",
                )
            tenant, rights = entry.tenant, entry.rights
        return await self.session(tenant, rights)

    async def session(self, tenant: str, rights: t.Rights) -> Caller:
        """That of a tenant; without one it is the gateway's own. Raises DaemonUnreachable."""
        if (caller := self._known.get((tenant, rights))) is None:
            async with self._opening:
                if (caller := self._known.get((tenant, rights))) is None:
                    caller = await asyncio.to_thread(self._open, tenant, rights)
                    self._known[tenant, rights] = caller
        return caller

    async def again(self, login: list[Any]) -> Caller:
        """Who came with this `login`, for work that goes on without him. Raises DaemonUnreachable, and
        Unauthorized when no key of his is left."""
        tenant, rights = login
        if tenant and self.keys is not None and tenant not in {key.tenant for key in self.keys.all()}:
            raise Unauthorized(f"no API key of {tenant} is left")
        return await self.session(tenant, tuple(t.Capability(right) for right in rights))

    async def own(self) -> Caller:
        """The gateway's own user, who administers the kernel: for what is told to all who may ask."""
        if self._own is None:
            client = await asyncio.to_thread(Client, self._address)
            self._own = self._own or Caller(client, self._tokenizers)
        return self._own

    async def probe(self) -> Caller:
        """The gateway's own session, for questions about the kernel itself."""
        return await self.session("", t.TENANT_RIGHTS)

    def _open(self, tenant: str, rights: t.Rights) -> Caller:
        label = "" if tenant else LABEL
        client = Client(self._address, label=label, tenant=tenant or None, rights=rights)
        return Caller(client, self._tokenizers, rights=frozenset(rights), login=(tenant, rights))

    def close(self) -> None:
        for caller in self._known.values():
            caller.client.close()
        self._known.clear()
        if self._own is not None:
            self._own.client.close()


async def authenticated(request: Request) -> Caller:
    """FastAPI dependency: who calls. The key is a bearer token, or Anthropic's `x-api-key`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    callers: Callers = request.app.state.callers
    caller = request.state.caller = await callers.of(key)
    await caller.limits.refresh()
    return caller
