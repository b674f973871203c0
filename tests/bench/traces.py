"""Traces of requests: the CSV that simulator and replay read, and a maker of synthetic ones.

Columns: time (seconds from the start), tenant, class, prompt_tokens, output_tokens, and optionally prefix_id
and prefix_tokens: requests of a tenant with the same prefix_id begin with the same so many tokens. Contents
are made from the names alone, so every run of a trace sends the same tokens.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from llmasos.syscalls.types import SchedClass
from msgspec import Meta

VOCABULARY = range(1000, 40_000)  # token ids that every model of the bench has, and that are plain text

Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Request(msgspec.Struct, frozen=True):
    """One line of a trace."""

    time: Annotated[float, Meta(ge=0)]
    tenant: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    sched_class: SchedClass = msgspec.field(name="class")
    prompt_tokens: Count
    output_tokens: Count
    prefix_id: str = ""
    prefix_tokens: Annotated[int, Meta(ge=0)] = 0

    def tokens(self, place: int) -> list[int]:
        """The prompt of the trace's line `place`."""
        shared = min(self.prefix_tokens if self.prefix_id else 0, self.prompt_tokens)
        common = random.Random(f"prefix {self.prefix_id}").choices(VOCABULARY, k=shared)
        return common + random.Random(f"line {place}").choices(VOCABULARY, k=self.prompt_tokens - shared)


def read(path: Path) -> list[Request]:
    """The requests by time. Raises ValueError naming the line that is wrong."""
    requests = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            filled = {name: value for name, value in row.items() if value}
            try:
                requests.append(msgspec.convert(filled, Request, strict=False))
            except msgspec.ValidationError as problem:
                raise ValueError(f"{path}, line {number}: {problem}") from None
    if not requests:
        raise ValueError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.time)


def write(path: Path, requests: Iterable[Request]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.encode_name for field in msgspec.structs.fields(Request))
        writer.writerows(msgspec.structs.astuple(request) for request in requests)


def synthetic(seconds: float, rate: float, seed: int) -> list[Request]:
    """`rate` requests a second, Poisson: three quarters are chats of two tenants, with short prompts behind a
    system prompt of 64 tokens; the rest is batch work of a third, with longer ones."""
    dice = random.Random(seed)
    requests, now = [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        if dice.random() < 0.75:
            tenant = dice.choice(["ann", "bob"])
            prompt, output = 64 + round(dice.lognormvariate(3.5, 0.7)), round(dice.lognormvariate(3.5, 0.5))
            more = (f"system {tenant}", 64)
            kind = SchedClass.INTERACTIVE
        else:
            tenant, kind, more = "night", SchedClass.BATCH, ("", 0)
            prompt, output = round(dice.lognormvariate(5.2, 0.5)), round(dice.lognormvariate(4.0, 0.5))
        made = (round(now, 3), tenant, kind, min(prompt, 1500), max(2, min(output, 400)), *more)
        requests.append(Request(*made))
    return requests
