"""Who owns which KV block of one resident model.

Owns block numbers, not their contents: reference counts, the hash chain that lets equal prefixes share,
copy-on-write. It never calls upward: it answers, or says "no room" (None), and the scheduler decides.

A block is free (count 0), private (count 1, no hash) or published (hash set: full, immutable, findable).
A free block may still be published: it is found until it is taken for something else, least recently used
first. A published or shared block is never written: `reserve` swaps in a copy, or unpublishes a block that
has no other owner.

Hash chain after vLLM's automatic prefix caching: block i's key covers all tokens before its end.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

from llmasos.syscalls.types import BLOCK_TOKENS, pack_tokens


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` positions."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(slots=True)
class Table:
    """The block table of one process: block of position p is `blocks[p // 16]`. `keys` are the hash
    chain's keys of the leading full blocks, as far as somebody asked; the first `shown` of them are of
    blocks that are computed and were published. `salt` separates those who must not share; only the first
    `public` blocks are keyed by `commons` instead, which all have who publish what they begin with."""

    salt: bytes = b""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    shown: int = 0
    commons: bytes = b""
    public: int = 0

    def empty(self) -> Table:
        """A table of nothing, in the same sharing domains."""
        return Table(self.salt, commons=self.commons, public=self.public)

    def parent(self, place: int) -> bytes:
        """What the key of block `place` is chained to."""
        if place == self.public and place > 0:
            return self.salt + self.keys[-1]  # from here on nobody else's keys are the same
        if place > 0:
            return self.keys[-1]
        return self.commons if self.public else self.salt


@dataclass(frozen=True, slots=True)
class Room:
    """What `reserve` did: block copies the device has to make before writing, as (source, target)."""

    copies: list[tuple[int, int]]


_NOTHING = Room([])


class Memory:
    """The blocks 0 … `total`-1 of one pool."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._count = [0] * total
        self._key: list[bytes | None] = [None] * total
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))

    @property
    def free(self) -> int:
        """Blocks nobody owns, published or not."""
        return len(self._free)

    def match(self, table: Table, tokens: list[int], limit: int) -> int:
        """Extends `table`, all of whose blocks are full and computed, by published blocks that hold what
        comes next in tokens[:limit].

        Returns the number of tokens that it covers then, a multiple of 16.
        """
        for index in range(len(table.blocks), limit // BLOCK_TOKENS):
            block = self._published.get(self.key(table, tokens, index))
            if block is None:
                break
            self._share(block)
            table.blocks.append(block)
        table.shown = max(table.shown, len(table.blocks))
        return len(table.blocks) * BLOCK_TOKENS

    def known(self, table: Table, tokens: list[int], limit: int) -> int:
        """How many blocks of tokens[:limit] behind those of `table` `match` would find."""
        first = len(table.blocks)
        for index in range(first, limit // BLOCK_TOKENS):
            if self.key(table, tokens, index) not in self._published:
                return index - first
        return max(0, limit // BLOCK_TOKENS - first)

    def key(self, table: Table, tokens: list[int], index: int) -> bytes:
        """What names the full block `index` of a process with these tokens: a hash of all before its end."""
        while len(table.keys) <= index:
            place = len(table.keys)
            parent = table.parent(place)
            chunk = pack_tokens(tokens[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS])
            table.keys.append(hashlib.blake2b(parent + chunk, digest_size=32).digest())
        return table.keys[index]

    def reserve(self, table: Table, start: int, end: int) -> Room | None:
        """Makes positions start … end-1 of `table` writable. None: no room, and nothing was changed."""
        first = start // BLOCK_TOKENS
        if end <= len(table.blocks) * BLOCK_TOKENS and table.shown <= first == len(table.blocks) - 1:
            tail = table.blocks[first]
            if self._count[tail] == 1 and self._key[tail] is None:
                return _NOTHING  # who generates is here, at 15 of 16 tokens
        shared = [i for i in range(first, min(blocks_for(end), len(table.blocks))) if self._shared(table, i)]
        missing = max(0, blocks_for(end) - len(table.blocks))
        if len(shared) + missing > len(self._free):
            return None
        copies = []
        for index in shared:
            block = self._take()
            copies.append((table.blocks[index], block))
            self._drop(table.blocks[index])
            table.blocks[index] = block
        for index in range(first, len(table.blocks)):
            self._unpublish(table.blocks[index])
        table.shown = min(table.shown, first)
        table.blocks.extend(self._take() for _ in range(missing))
        return Room(copies)

    def publish(self, table: Table, tokens: list[int], computed: int) -> None:
        """Makes the full blocks of the first `computed` tokens findable."""
        full = computed // BLOCK_TOKENS
        if full <= table.shown:
            return
        for index in range(table.shown, full):
            key = self.key(table, tokens, index)
            if key not in self._published:
                self._published[key] = table.blocks[index]
                self._key[table.blocks[index]] = key
        table.shown = full

    def fork(self, table: Table) -> Table:
        """A second table over the same blocks."""
        for block in table.blocks:
            self._count[block] += 1
        return Table(
            table.salt, list(table.blocks), list(table.keys), table.shown, table.commons, table.public
        )

    def truncate(self, table: Table, length: int) -> None:
        """Gives up the blocks behind the first `length` tokens."""
        keep = blocks_for(length)
        for block in reversed(table.blocks[keep:]):
            self._drop(block)
        del table.blocks[keep:]
        del table.keys[length // BLOCK_TOKENS :]
        table.shown = min(table.shown, len(table.keys))

    def release(self, table: Table) -> None:
        """Gives up everything, tail first, so that prefixes are reused last."""
        self.truncate(table, 0)

    def check(self, tables: list[Table]) -> None:
        """Asserts that `tables` are all there are and that every count is right (tests, idle check)."""
        counts = [0] * self.total
        for table in tables:
            for block in table.blocks:
                counts[block] += 1
        assert counts == self._count, "reference counts differ from the tables"
        assert set(self._free) == {b for b, n in enumerate(counts) if n == 0}, "free list is wrong"
        assert all(self._key[b] == k for k, b in self._published.items()), "published map is wrong"

    def _shared(self, table: Table, index: int) -> bool:
        return self._count[table.blocks[index]] > 1

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._unpublish(block)
        self._count[block] = 1
        return block

    def _share(self, block: int) -> None:
        if self._count[block] == 0:
            del self._free[block]
        self._count[block] += 1

    def _drop(self, block: int) -> None:
        self._count[block] -= 1
        if self._count[block] == 0:
            self._free[block] = None
            if self._key[block] is None:
                self._free.move_to_end(block, last=False)

    def _unpublish(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._published[key]
            self._key[block] = None
