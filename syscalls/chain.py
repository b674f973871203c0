"""The audit log's format: JSON lines, each holding the hash of the one before it and its own. No I/O.

A changed, removed, added or moved record breaks the chain where it happened. What only the head tells is
whether the end was cut off: note it elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from . import errors

GENESIS = "0" * 64
"""What the first record names as the one before it."""

_SEAL = b',"hash":"'


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One event: `time` in seconds since 1970, who did it, and facts about it (never prompt text).
    `prev` is the hash of the record before, in hexadecimal."""

    seq: int
    time: float
    event: str
    subject: str
    facts: dict[str, str]
    prev: str


def seal(record: Record) -> tuple[bytes, str]:
    """(the line of a record with its newline, its hash)."""
    body = msgspec.json.encode(record)
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + _SEAL + digest.encode() + b'"}\n', digest


def unseal(line: bytes) -> tuple[Record, str]:
    """(record, hash) of a line, with or without its newline. Raises Corrupt."""
    body, _, end = line.rstrip(b"\n").rpartition(_SEAL)
    digest = hashlib.sha256(body + b"}").hexdigest()
    if end != digest.encode() + b'"}':
        raise errors.Corrupt("a record of the audit log is not what its hash says")
    try:
        return msgspec.json.decode(body + b"}", type=Record), digest
    except msgspec.DecodeError:
        raise errors.Corrupt("a record of the audit log is not one") from None


def verify(lines: Iterable[bytes]) -> tuple[int, str]:
    """(how many records, hash of the last). Raises Corrupt naming the first line that breaks the chain."""
    head, count = GENESIS, 0
    for count, line in enumerate(lines, 1):
        try:
            record, digest = unseal(line)
        except errors.Corrupt as damage:
            raise errors.Corrupt(f"line {count}: {damage.message}", line=count) from None
        if record.prev != head or record.seq != count:
            raise errors.Corrupt(f"line {count} does not follow the one before it", line=count)
        head = digest
    return count, head
