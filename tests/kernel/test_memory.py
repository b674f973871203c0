"""The block tables against a naive model: every process reads back exactly the tokens it wrote."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from llmasos.kernel.memory import Memory, Table, blocks_for

BLOCKS = 12
TOKENS = st.lists(st.integers(0, 1), max_size=60)


class Context:
    """A process as the naive model sees it."""

    def __init__(self, salt: bytes) -> None:
        self.table = Table(salt)
        self.tokens: list[int] = []
        self.computed = 0


class MemoryMachine(RuleBasedStateMachine):
    """Slots hold the token last written there; sharing, copying and reuse must never show."""

    contexts = Bundle("contexts")

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(BLOCKS)
        self.slots: dict[int, list[int]] = {block: [-1] * 16 for block in range(BLOCKS)}
        self.alive: list[Context] = []

    @rule(
        target=contexts, salt=st.sampled_from([b"a", b"b"]), tokens=st.lists(st.integers(0, 1), max_size=60)
    )
    def spawn(self, salt: bytes, tokens: list[int]) -> Context:
        context = Context(salt)
        context.tokens = tokens
        context.computed = self.memory.match(context.table, tokens, max(0, len(tokens) - 1))
        self.alive.append(context)
        return context

    @rule(context=contexts, count=st.integers(1, 40), extra=st.lists(st.integers(0, 1), max_size=20))
    def compute(self, context: Context, count: int, extra: list[int]) -> None:
        if context not in self.alive:
            return
        context.tokens += extra
        end = min(len(context.tokens), context.computed + count)
        if end == context.computed:
            return
        free, table = self.memory.free, list(context.table.blocks)
        room = self.memory.reserve(context.table, context.computed, end)
        if room is None:
            assert (self.memory.free, context.table.blocks) == (free, table)
            return
        for source, target in room.copies:
            self.slots[target] = list(self.slots[source])
        for position in range(context.computed, end):
            self.slots[context.table.blocks[position // 16]][position % 16] = context.tokens[position]
        context.computed = end
        self.memory.publish(context.table, context.tokens, end)

    @rule(target=contexts, context=contexts, count=st.integers(1, 3))
    def fork(self, context: Context, count: int) -> object:
        if context not in self.alive:
            return multiple()
        free = self.memory.free
        children = []
        for _ in range(count):
            child = Context(context.table.salt)
            child.tokens, child.computed = list(context.tokens), context.computed
            child.table = self.memory.fork(context.table)
            children.append(child)
        assert self.memory.free == free, "a fork takes no block"
        self.alive += children
        return multiple(*children)

    @rule(context=contexts, length=st.integers(0, 60))
    def truncate(self, context: Context, length: int) -> None:
        if context not in self.alive:
            return
        del context.tokens[length:]
        context.computed = min(context.computed, length)
        self.memory.truncate(context.table, context.computed)
        assert len(context.table.blocks) == blocks_for(context.computed)

    @rule(context=consumes(contexts))
    def end(self, context: Context) -> None:
        if context in self.alive:
            self.alive.remove(context)
            self.memory.release(context.table)

    @invariant()
    def tables_agree(self) -> None:
        self.memory.check([c.table for c in self.alive])

    @invariant()
    def everybody_reads_what_it_wrote(self) -> None:
        for c in self.alive:
            read = [self.slots[c.table.blocks[p // 16]][p % 16] for p in range(c.computed)]
            assert read == c.tokens[: c.computed]

    def teardown(self) -> None:
        for c in self.alive:
            self.memory.release(c.table)
        assert self.memory.free == BLOCKS


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_equal_prefixes_share_and_other_tenants_do_not() -> None:
    memory, tokens = Memory(16), list(range(50))
    first = Table(b"alice")
    memory.reserve(first, 0, 50)
    memory.publish(first, tokens, 50)
    again = Table(b"alice")
    assert memory.match(again, tokens, 49) == 48
    assert again.blocks == first.blocks[:3]
    foreign = Table(b"bob")
    assert memory.match(foreign, tokens, 49) == 0


def test_a_prefix_outlives_its_process_until_the_room_is_needed() -> None:
    memory, tokens = Memory(4), list(range(64))
    table = Table()
    memory.reserve(table, 0, 64)
    memory.publish(table, tokens, 64)
    memory.release(table)
    assert memory.free == 4
    again = Table()
    assert memory.match(again, tokens, 63) == 48
    memory.release(again)
    other = Table()
    memory.reserve(other, 0, 64)
    memory.release(other)
    assert memory.match(Table(), tokens, 63) == 0


def test_eight_forks_of_512_tokens_need_at_most_eight_blocks_more() -> None:
    memory = Memory(100)
    parent = Table()
    memory.reserve(parent, 0, 511)
    used = memory.total - memory.free
    for _ in range(8):
        child = memory.fork(parent)
        memory.reserve(child, 511, 512)
    assert memory.total - memory.free - used <= 8
