"""What goes into the next step, and when it is sent: chooses, makes room, builds the message.

While a step is on a device the next one is planned from what is certain of the first one's result, but sent
only shortly before the first one is expected to end (loop.py tells why that is safe).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmasos.drivers import base

from . import encoding, grants, newcomers, residency, scheduler, swapping, watchdog
from .claims import Claims
from .devices import Device, Flight, Part, Pool, build
from .effects import ToWorker
from .memory import blocks_for
from .pace import PASS_ROWS
from .process import Process
from .scheduler import Share

if TYPE_CHECKING:
    from .loop import Kernel

LEAD_S = 0.004
"""The step behind the running one is sent so long before the running one is expected to end: time to plan,
send and decode it. Steps shorter than two leads are sent at once."""

ROUNDS_S = 0.033
"""Steps in which everybody only generates are repeated by the device as long as they take no more than this:
two frames of a screen, so nobody sees it. Who arrives does not wait for it: see Batch.cuts."""

MOST_ROUNDS = 16

SHORT_S = 0.03
"""A step in which people generate takes no longer than this, as far as reading the weights is no more than a
quarter of it and it is twice one pass: shorter steps serve less, longer ones let who arrives wait."""

ESTIMATED_CHUNK = 64
"""So many tokens of a prompt a step computes, as far as dividing its places between tenants goes."""


def advance(kernel: Kernel, device: Device) -> None:
    """Loads what is wanted, or plans and sends steps as long as the device is to have one more."""
    if not grants.yields(kernel, device) or device.worker is None or device.loading:
        return
    for pool in device.pools:
        if not pool.ready and (pool.awaited or pool.processes):
            if not device.flights:
                residency.load(kernel, device, pool)
            return
    while len(device.flights) < 2 and (
        not device.flights or kernel.now() >= device.ahead_at or _keeps_others(device)
    ):
        chosen = next_pool(kernel, device)
        if chosen is not None and not _plan(kernel, device, chosen):
            return
        if chosen is None:
            if not device.flights and device.granted is None and len(device.runs):
                grants.grant(kernel, device)
            return


def _keeps_others(device: Device) -> bool:
    """Whether the device repeats a step and somebody waits who is not in it."""
    if device.flights[0].rounds == 1 or math.isinf(device.ahead_at):
        return False
    return any(not process.flights for pool in device.pools for process in pool.queue)


def places(kernel: Kernel, pool: Pool) -> dict[int, int]:
    """Queue places by pid, from 1, of those that could run and are not in a step."""
    return pool.queue.places(kernel.config.aging_s, lambda process: estimate(pool, process))


def next_pool(kernel: Kernel, device: Device) -> Pool | None:
    """The one whose first process goes before those of the others, and before who trains; those of one tenant
    take turns. None: nobody can run, or who trains is to go first."""
    ready = [pool for pool in device.pools if pool.ready and len(pool.queue)]
    trains = device.granted is None and len(device.runs) > 0
    if len(ready) + trains < 2:
        return ready[0] if ready else None
    aging_s = kernel.config.aging_s
    heads = [(head, pool) for pool in ready if (head := pool.queue.head(aging_s)) is not None]
    first, chosen = min(heads, key=lambda one: (one[0][:-1], one[1].served), default=(None, None))
    if trains and (head := device.runs.head(aging_s)) is not None and (first is None or head < first):
        return None
    return chosen


def estimate(pool: Pool, process: Process) -> float:
    """Seconds that a process gets of a step, about."""
    return pool.pace.cost(min(process.lacking, ESTIMATED_CHUNK))


def _plan(kernel: Kernel, device: Device, pool: Pool) -> bool:
    """Sends the next step. False: nothing can be sent now."""
    if pool.loaded is not None and pool.loaded.encodes:
        taken = pool.queue.take(kernel.config.aging_s, lambda process: 0.0)  # a step may be one tenant's
        try:
            return encoding.plan(kernel, device, pool, taken)
        finally:
            pool.queue.settle()
    taken = pool.queue.take(kernel.config.aging_s, lambda process: estimate(pool, process))
    try:
        first, looked = _newcomers(kernel, device, pool, taken)
        if first and divide(kernel, device, pool, iter(first), apart=True):
            return True
        again = (process for process in looked if process.runnable)  # who may have been pushed out meanwhile
        return divide(kernel, device, pool, itertools.chain(again, taken))
    finally:
        pool.queue.settle()


def _newcomers(
    kernel: Kernel, device: Device, pool: Pool, taken: Iterator[Process]
) -> tuple[list[Process], list[Process]]:
    """Those at the head of `taken` who get a short step of their own, unless the one before was such a step;
    and all that had to be looked at."""
    first: list[Process] = []
    looked: list[Process] = []
    before = device.flights[-1] if device.flights else None
    if before is None or before.apart or before.pool is not pool or not newcomers.gain(pool, before):
        return first, looked
    tokens, goes_first = pool.pace.tokens_within(0, _bounds(kernel, pool)[0]), newcomers.before(pool, before)
    for process in taken:
        looked.append(process)
        tokens -= process.lacking
        if tokens < 0 or not goes_first(process):
            break
        first.append(process)
    return first, looked


def _bounds(kernel: Kernel, pool: Pool) -> tuple[float, float]:
    """Seconds of the longest step beside who generates, and of the longest."""
    # Where reading the weights takes that long already, as long again goes to who is in the step.
    longest_s = max(kernel.config.step_ms / 1000, 2 * pool.pace.fixed)
    return min(longest_s, max(SHORT_S, 4 * pool.pace.fixed, 2 * pool.pace.one_pass)), longest_s


def divide(
    kernel: Kernel,
    device: Device,
    pool: Pool,
    taken: Iterator[Process],
    apart: bool = False,
    overtakes: bool = False,
) -> bool:
    """Sends a step of those `taken`, in their order. False: nothing can be sent now. One of newcomers `apart`
    from the others is not sent if they lack room. One that `overtakes` takes no memory from others: what they
    lose may still be being read."""
    description = device.description
    assert description is not None
    step_tokens = kernel.config.step_tokens or description.step_tokens
    step_s, longest_s = _bounds(kernel, pool)
    # Who arrives waits for the step that runs, so it is kept short, however many generate.
    most = min(description.max_sequences, step_tokens, max(PASS_ROWS, pool.pace.rows_within(step_s)))
    claims = Claims(pool, kernel.quotas, max(PASS_ROWS, pool.pace.rows_within(step_s)), pushes=not overtakes)
    some = refused = refusals = 0  # of those taken; of the refused those whose tenants are asked further

    def let_in() -> Iterator[Share]:
        nonlocal some, refused, refusals
        for process in taken:
            some += 1
            if (lacking := process.lacking) >= base.BLOCK_TOKENS:
                had = len(process.table.blocks)
                _match_prefix(kernel, process)
                claims.took(process, len(process.table.blocks) - had)
                if not process.runnable:  # a shared prefix was all that it wanted
                    continue
                lacking = process.lacking
            if claims.lets_in(process):
                yield Share(process, lacking)
                continue
            process.refused = claims.lacks
            refused += 1
            if claims.lacks != "quota":  # that is a matter of its owner, not of its tenant
                pool.queue.pass_over(process)
                continue
            refusals += 1
            if refusals == scheduler.MOST_REFUSALS:
                return

    more = let_in()
    # Whose turn it is: who is not let in keeps nobody from running.
    turn = list(itertools.islice(more, most))
    if not turn and not refused:
        return bool(some)
    if len(pool.queue) > 1 or apart:
        step_tokens = min(step_tokens, max(most, pool.pace.tokens_within(0, longest_s)))
    if (prompt := next((want for want in turn if want.count > PASS_ROWS), None)) is not None:
        needs = pool.pace.token * prompt.count
        rows = pool.pace.rows_within(max(step_s - needs, step_s / 4, 1.25 * pool.pace.fixed))
        turn = _with_room_for_prompts(turn, rows)
        most = len(turn)
    rows = sum(1 for want in turn if want.count == 1)
    chunk_tokens = pool.pace.tokens_within(rows, step_s)
    settled: set[int] = set()  # in the step already, or pushed out of it
    keys: set[bytes] = set()  # of the blocks that the step fills with prompts
    must_land = force = False

    def reserve(process: Process, count: int) -> bool:
        nonlocal must_land
        if process.pid in settled or (count > 1 and _is_filled_elsewhere(kernel, device, process, keys)):
            return False
        if not _reserve(kernel, claims, process, count, settled, force):
            process.refused = "quota" if claims.over(process, 1) else "memory"
            must_land |= claims.victim(process, settled, flying=True, force=force) is not None
            return False
        process.refused = ""
        settled.add(process.pid)
        if count >= base.BLOCK_TOKENS:
            keys.update(_filled(process, count))
        return True

    shares = scheduler.plan(turn, more, most, step_tokens, chunk_tokens, reserve)
    if not shares and apart:
        return False
    if not shares and not must_land:
        # Those whose turn it is may all lack room: who has the strongest claim to memory never does.
        runnable = (process for process in pool.queue if process.runnable)
        if (first := min(runnable, key=claims.claim, default=None)) is not None:
            force = True
            shares = scheduler.plan([Share(first, first.lacking)], (), 1, step_tokens, chunk_tokens, reserve)
    if must_land or not shares:
        # Somebody could take the blocks of a weaker one if that were not in flight: going on ahead would
        # keep it there for ever.
        device.ahead_at = math.inf
        return False
    _send(kernel, device, pool, claims, shares, keys, apart, overtakes)
    return True


def _with_room_for_prompts(turn: list[Share], rows: int) -> list[Share]:
    """Of those whose turn it is, the prompts and the first `rows` of those that generate."""
    numbers = itertools.count()
    return [want for want in turn if want.count > 1 or next(numbers) < rows]


def _match_prefix(kernel: Kernel, process: Process) -> None:
    """Lets a prompt share what others have computed since it was last planned."""
    infer, table, before = process.infer, process.table, process.computed
    if process.ahead or before % base.BLOCK_TOKENS:
        return
    if process.swap:  # comes back whole
        return
    if infer is None or infer.scoring:
        return
    memory = process.pool.memory
    if len(table.blocks) * base.BLOCK_TOKENS > before:  # room that was made and not used
        memory.truncate(table, before)
        process.mirror.stale = True
    process.computed = memory.match(table, process.tokens, len(process.tokens) - 1)
    process.pool.holders.add(process)
    if process.computed == before:
        return
    process.mirror.stale = True
    if infer.first_token is None:
        gained = process.computed - max(before, infer.first_input)
        infer.cached = min(infer.cached + max(0, gained), infer.start - infer.first_input)
    kernel.settle(process)


def _is_filled_elsewhere(kernel: Kernel, device: Device, process: Process, keys: set[bytes]) -> bool:
    """Whether the next block of a prompt is being computed for somebody else, in flight or in the step
    being planned (`keys`): to wait for it is cheaper than to compute it twice."""
    infer, start = process.infer, process.computed + process.ahead
    if infer is None or infer.scoring or process.lacking <= base.BLOCK_TOKENS or start % base.BLOCK_TOKENS:
        return False
    filled = [keys, *(flight.keys for flight in device.flights if flight.pool is process.pool)]
    if not any(filled):
        return False
    key = process.pool.memory.key(process.table, process.tokens, start // base.BLOCK_TOKENS)
    return any(key in names for names in filled)


def _reserve(
    kernel: Kernel, claims: Claims, process: Process, count: int, settled: set[int], force: bool
) -> bool:
    """Makes room for `count` more tokens of `process`, taken from others if need be."""
    pool, had = process.pool, len(process.table.blocks)
    start, end = process.reach(count)
    if process.swap:  # what others have computed again or still hold is shared, the rest comes from the file
        pool.holders.add(process)
        pool.memory.match(process.table, process.tokens, process.computed)
        claims.took(process, len(process.table.blocks) - had)
        had = len(process.table.blocks)
    more = blocks_for(end) - len(process.table.blocks)
    room = None
    while (path := claims.over(process, more)) or (
        room := pool.memory.reserve(process.table, start, end)
    ) is None:
        victim = claims.victim(process, settled, force=force, path=path)
        if victim is None:
            if process.swap:
                pool.memory.release(process.table)
                claims.took(process, -had)
            return False
        blocks = len(victim.table.blocks)
        kernel.recorder.pushed(victim.pid, process.pid, blocks)
        claims.took(victim, -blocks)
        swapping.push_out(kernel, victim)
        settled.add(victim.pid)
    if process.swap:
        swapping.bring_in(kernel, process)
    claims.admit(process)
    pool.holders.add(process)
    claims.took(process, len(process.table.blocks) - had)
    if room.copies:
        process.mirror.stale = True
        pool.copies += room.copies
    return True


def _send(
    kernel: Kernel,
    device: Device,
    pool: Pool,
    claims: Claims,
    shares: list[Share],
    keys: set[bytes],
    apart: bool,
    overtakes: bool,
) -> None:
    assert device.worker is not None
    now, drafts = kernel.now(), _drafts(kernel, pool, shares)
    rounds = _rounds(pool, shares, alone=len(shares) == len(pool.queue))
    cuts = len(device.flights) > 0 and device.flights[-1].rounds > 1 and not overtakes
    cuts = cuts and any(not share.process.flights for share in shares)
    parts, rows, tokens = [], 0, 0
    for share in shares:
        process, count = share.process, share.count
        infer = process.infer
        assert infer is not None
        sample = infer.samples and infer.beams is None and count == process.lacking
        draft = drafts if drafts and sample and infer.drafts else 0
        extra = draft + rounds - 1
        # Guesses and rounds take what is free and push nobody out.
        if extra and not _spare(claims, process, *process.reach(count, extra)):
            draft, extra, rounds = 0, 0, 1
        parts.append(Part(process, infer, count, sample, draft, extra, process.epoch))
        if not infer.tally.planned:
            kernel.metrics.planned(infer)
        if count == 1:
            rows += 1
        else:
            tokens += count
    _charge(pool, parts, rounds, now)
    copies, pool.copies = pool.copies, []
    ticket = next(kernel.numbers)
    flight = Flight(
        ticket, pool, parts, copies, keys, rows, tokens, rounds, apart=apart, overtakes=overtakes, cuts=cuts
    )
    kernel.recorder.sent(device.name, flight, len(pool.queue))
    kernel.effects.append(ToWorker(device.worker, base.Step(build(flight))))
    sent(kernel, device, flight)


def _charge(pool: Pool, parts: list[Part], rounds: int, now: float) -> None:
    fixed = pool.pace.fixed / len(parts)
    for part in parts:
        scheduler.charge(part.process, rounds * (pool.pace.cost(part.count) + fixed), now)


def landed(kernel: Kernel, flight: Flight, rounds: int) -> None:
    """Gives back what was charged for rounds that were not computed."""
    if rounds < flight.rounds:
        _charge(flight.pool, flight.parts, rounds - flight.rounds, kernel.now())


def sent(kernel: Kernel, device: Device, flight: Flight) -> None:
    """Books that a step is on its way."""
    flight.pool.served, flight.left = flight.ticket, flight.expected()
    if flight.overtakes:
        interrupted, now = device.flights[0], kernel.now()
        interrupted.lost += flight.left or 0.0
        if interrupted.left is not None:
            interrupted.left = max(0.0, interrupted.left - (now - device.begun))
        device.flights.appendleft(flight)
    else:
        device.flights.append(flight)
    if device.flights[0] is flight:
        watch(kernel, device)


def _spare(claims: Claims, process: Process, start: int, end: int) -> bool:
    """Makes room up to position `end` if it is there and its owner may have it."""
    had = len(process.table.blocks)
    if claims.over(process, blocks_for(end) - had):
        return False
    if process.pool.memory.reserve(process.table, start, end) is None:
        return False
    claims.took(process, len(process.table.blocks) - had)
    return True


def _drafts(kernel: Kernel, pool: Pool, shares: list[Share]) -> int:
    """How many tokens each process of a step may guess. Each may take a block for that, and as many have
    to be left for who needs one for certain."""
    spare = PASS_ROWS - sum(share.count for share in shares)
    if spare < len(shares) or pool.memory.free < 2 * len(shares):
        return 0
    return min(kernel.config.draft_tokens, spare // len(shares))


def _rounds(pool: Pool, shares: list[Share], alone: bool) -> int:
    """How often the device may repeat a step without asking: as long as that is no longer than one step of
    many may be, and there is nobody but those who generate. It halves what kernel and client cost a token."""
    if not (alone and pool.loaded and pool.loaded.repeats) or pool.memory.free < 2 * len(shares):
        return 1
    for share in shares:
        infer = share.process.infer
        if share.count != 1 or share.process.lacking != 1 or not infer or not infer.samples or infer.beams:
            return 1
    expected = pool.pace.expected(len(shares), 0)
    return max(1, min(MOST_ROUNDS, int(ROUNDS_S / expected))) if expected else 1


def watch(kernel: Kernel, device: Device) -> None:
    """The first flight begins now, or goes on. Sets when the one behind it is sent, if it is not yet."""
    device.alarm()
    device.ahead_at = math.inf
    if not device.flights:
        return
    watchdog.begun(kernel, device)
    left, now = device.flights[0].left, kernel.now()
    if len(device.flights) == 1 and left is not None:
        device.ahead_at = now if left < 2 * LEAD_S else now + left - LEAD_S
        if device.ahead_at > now:
            device.alarm = kernel.at(device.ahead_at, lambda: None)


def _filled(process: Process, count: int) -> list[bytes]:
    """The names of the blocks that the next `count` positions of a prompt complete."""
    start = process.computed + process.ahead
    memory, table, tokens = process.pool.memory, process.table, process.tokens
    whole = range(start // base.BLOCK_TOKENS, (start + count) // base.BLOCK_TOKENS)
    return [memory.key(table, tokens, index) for index in whole]
