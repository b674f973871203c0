"""How work is let in: the process that a spawn, an infer or an encode is for is found or made, its quota is
charged, its model waited for, and then it may run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from . import adapters, encoding, residency, resume
from .beams import BeamSearch
from .infer import Infer
from .process import Process
from .sessions import Request, Session

if TYPE_CHECKING:
    from .loop import Kernel


def refuse_new_work(kernel: Kernel) -> None:
    if kernel.draining:
        raise errors.ShuttingDown("the daemon is shutting down", hint="start it again: llmasosd")


def _new_process(
    kernel: Kernel,
    session: Session,
    call: table.SpawnModel | table.Infer | table.Encode,
    model: str,
    detached: bool,
) -> Process:
    refuse_new_work(kernel)
    session.subject.require_priority(call.sched_class, call.nice)
    kernel.processes.room_for(session.subject.path, 1)
    manifest = kernel.store.resolve(model, session.subject.may_command)
    pool, adapter = residency.place(kernel, manifest, call.device, call.dtype)
    label = "infer" if isinstance(call, table.Infer) else call.label
    return kernel.processes.spawn(
        session.subject.path,
        None if detached else session.key,
        pool,
        call.sched_class,
        call.nice,
        label,
        kernel.now(),
        adapter,
    )


def spawn(kernel: Kernel, session: Session, request: Request, call: table.SpawnModel) -> None:
    """Answers when the model is resident, so that what cannot be loaded fails here and not later."""
    process = _new_process(kernel, session, call, call.model, call.detached)
    pool = process.pool

    def ready(error: errors.LLMasOSError | None) -> None:
        loaded = pool.loaded
        if error is None and loaded is not None and loaded.encodes:
            error = _generates_nothing(process, loaded.encodes)
        if error is not None or loaded is None:
            kernel.processes.discard(process)
            kernel.sessions.fail(request, error or errors.DeviceUnavailable("the device went away"))
            return
        kernel.processes.name(process)
        kernel.sessions.reply(
            request,
            table.SpawnReply(
                pid=process.pid,
                model=process.model,
                digest=process.digest,
                device=pool.device_name,
                context_length=loaded.context_length,
            ),
        )

    def cancel() -> None:
        adapters.forgo(pool, process.adapter, ready)
        kernel.processes.discard(process)
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))

    kernel.sessions.on_cancel(request, cancel)
    adapters.when_ready(kernel, pool, process.adapter, ready)


def _generates_nothing(process: Process, encodes: t.Encodes) -> errors.UnsupportedModel:
    return errors.UnsupportedModel(
        f"{process.model} is an encoder: it generates no text", hint=t.ENCODED_BY[encodes]
    )


def infer(kernel: Kernel, session: Session, request: Request, call: table.Infer, credits_: int) -> None:
    if (call.pid is None) == (call.model is None):
        raise errors.InvalidArgument("infer takes a pid or a model, and not both", field="pid")
    if len(call.tokens) % 4:
        raise errors.InvalidArgument("tokens are packed u32: a multiple of 4 bytes", field="tokens")
    resume.check(call)
    refuse_new_work(kernel)
    if call.beams is not None:
        _check_beams(kernel, session, call, call.beams)
    arrived = kernel.now()
    if (grammar := call.sampling.grammar) is None:
        _admit(kernel, session, request, call, credits_, arrived)
        return
    if not call.sampling.stop_token_ids:
        raise errors.InvalidArgument("a grammar needs a stop token", field="sampling.stop_token_ids")
    open_ = True

    def cancel() -> None:
        nonlocal open_
        open_ = False
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))

    def checked(problem: errors.LLMasOSError | None) -> None:
        if not open_ or not kernel.sessions.is_open(request):
            return
        try:
            if problem is not None:
                raise problem
            _admit(kernel, session, request, call, credits_, arrived)
        except errors.LLMasOSError as refusal:
            kernel.sessions.fail(request, refusal)

    kernel.sessions.on_cancel(request, cancel)
    kernel.grammars.check(session.subject.path, grammar, checked)


def _admit(
    kernel: Kernel, session: Session, request: Request, call: table.Infer, credits_: int, arrived: float
) -> None:
    """Lets an infer in whose arguments are good, as soon as its model is there."""
    if call.pid is not None:
        process = kernel.processes.find(call.pid, session.subject)
        kernel.processes.must_be_idle(process)
        owner = process.owner
    else:
        owner = session.subject.path
    again = (call.seen or call.scored) and kernel.charges.knows(session.key, request[1], kernel.now())
    new = len(call.tokens) // 4
    if call.pid is not None and call.whole:
        new -= _held(process, call, t.unpack_tokens(call.tokens))
    over = kernel.quotas.start(owner, 0 if again else new, kernel.now())
    kernel.charges.made(session.key, request[1])

    def answered() -> None:
        if not session.leaving:
            kernel.charges.answered(session.key, request[1])

    kernel.sessions.on_close(request, answered)
    kernel.sessions.on_close(request, over)
    if call.pid is None:
        process = _new_process(kernel, session, call, call.model or "", detached=False)
    cancelled = False
    extra = 0

    def start(error: errors.LLMasOSError | None) -> None:
        if cancelled:
            return
        try:
            if error is not None:
                raise error
            if process not in process.pool.processes:
                raise errors.ProcessEnded(f"process {process.pid} has ended")
            kernel.processes.must_be_idle(process)
            _begin(kernel, process, request, call, credits_ + extra)
        except errors.LLMasOSError as refusal:
            kernel.sessions.fail(request, refusal)
            if call.model is not None:
                kernel.processes.discard(process)

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True
        adapters.forgo(process.pool, process.adapter, start)
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))
        if call.model is not None:
            kernel.processes.discard(process)

    def credit(n: int) -> None:
        nonlocal extra
        extra = min(extra + n, wire.MAX_CREDITS)

    def late() -> None:
        nonlocal cancelled
        if process.infer is not None and process.infer.request == request:
            kernel.processes.end_infer(process, t.Finish.DEADLINE)
            return
        cancelled = True  # its model is being loaded still
        adapters.forgo(process.pool, process.adapter, start)
        known = len(process.tokens)
        seed = call.sampling.seed or 0
        kernel.sessions.reply(request, table.InferReply(process.pid, t.Finish.DEADLINE, 0, 0, 0, known, seed))
        if call.model is not None:
            kernel.processes.discard(process)

    if call.deadline_ms is not None:
        call_off = kernel.at(arrived + call.deadline_ms / 1000, late)
        kernel.sessions.on_close(request, call_off)
    kernel.sessions.on_cancel(request, cancel)
    kernel.sessions.on_credit(request, credit)
    adapters.when_ready(kernel, process.pool, process.adapter, start)


def encode(kernel: Kernel, session: Session, request: Request, call: table.Encode) -> None:
    encoding.check(call)
    refuse_new_work(kernel)
    over = kernel.quotas.start(session.subject.path, sum(call.lengths), kernel.now())
    kernel.sessions.on_close(request, over)
    process = _new_process(kernel, session, call, call.model, detached=False)
    encoding.encode(kernel, request, call, process)


def _check_beams(kernel: Kernel, session: Session, call: table.Infer, beams: t.Beams) -> None:
    if beams.num_return_sequences > beams.num_beams:
        raise errors.InvalidArgument(
            "num_return_sequences exceeds num_beams", field="beams.num_return_sequences"
        )
    if call.sampling.temperature > 0:
        raise errors.InvalidArgument(
            "beam search does not sample", field="sampling.temperature", hint="use temperature 0"
        )
    if call.max_tokens == 0:
        raise errors.InvalidArgument("beam search needs max_tokens above 0", field="max_tokens")
    kernel.processes.room_for(session.subject.path, beams.num_beams + 1)


def _held(process: Process, call: table.Infer, tokens: list[int]) -> int:
    """How many of the `tokens` of an infer, which are the whole context, the process has already; at least
    one of its input is left to be computed."""
    held, most = process.tokens, max(0, len(tokens) - call.seen - 1)
    if len(held) <= most and tokens[: len(held)] == held:
        return len(held)
    return next((place for place in range(min(len(held), most)) if held[place] != tokens[place]), most)


def _begin(kernel: Kernel, process: Process, request: Request, call: table.Infer, credits_: int) -> None:
    """Appends the input and makes the process runnable. Raises what `table.Infer` names."""
    loaded = process.pool.loaded
    assert loaded is not None
    if loaded.encodes:
        raise _generates_nothing(process, loaded.encodes)
    tokens, before = t.unpack_tokens(call.tokens), len(process.tokens)
    if call.whole:
        before = _held(process, call, tokens)
        tokens = tokens[before:]
    length = before + len(tokens)
    if length == 0:
        raise errors.InvalidArgument("the context is empty", field="tokens", hint="send at least one token")
    if tokens and max(tokens) >= loaded.vocab_size:
        raise errors.InvalidArgument(f"token ids go up to {loaded.vocab_size - 1}", field="tokens")
    if call.public > (0 if before else length):
        raise errors.InvalidArgument("only the beginning of a context can be public", field="public")
    start = length - call.seen
    limit = loaded.context_length if call.max_tokens is None else start + call.max_tokens
    beams = call.beams
    kernel.admit(process.pool, process.owner, length, limit, beams.num_beams if beams else 0)
    sampling = call.sampling
    if sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=kernel.random.getrandbits(63))
    stop_ids = frozenset(sampling.stop_token_ids)
    if before < len(process.tokens):
        kernel.processes.truncate(process, before)
    process.tokens += tokens
    if before == 0:
        process.table.public = call.public // t.BLOCK_TOKENS
    # A token is sampled from the logits of the last position, which has to be computed in this infer; to
    # score the input takes the logits of every one of its positions.
    scores = sampling.prompt_logprobs and call.scored < start - before
    keep = max(0, before - 1) if scores else length - 1
    if process.computed > keep:
        process.computed = keep
        process.pool.memory.truncate(process.table, keep)
    process.mirror.stale = True
    process.infer = Infer(
        request=request,
        sampling=sampling,
        first_input=before,
        start=start,
        limit=limit,
        credits=credits_,
        reap=call.model is not None,
        leave=call.exit,
        tally=kernel.metrics.came(process),
        arrived=kernel.now(),
        prefix=process.pool.memory.known(process.table, process.tokens, length - 1),
        beams=BeamSearch(beams, stop_ids, limit - length) if beams else None,
        prompt_length=process.unfinished.prompt_length if process.unfinished and start == before else 0,
    )
    infer, process.unfinished = process.infer, None
    if scores and before == 0 and not call.scored:
        infer.take_prompt(0, [t.Chosen(float("nan"))])
    infer.scored = max(before, 1)
    resume.go_on(infer, call, tokens[start - before :])
    process.generated += call.seen

    def cancel() -> None:
        if process.infer is infer:
            kernel.processes.end_infer(process, t.Finish.CANCELLED)

    def credit(n: int) -> None:
        infer.credits = min(infer.credits + n, wire.MAX_CREDITS)
        if process.infer is infer:
            kernel.deliver(process)

    kernel.sessions.on_cancel(request, cancel)
    kernel.sessions.on_credit(request, credit)
    kernel.settle(process)
