"""Who answers a call: one `match` over the syscall table.

A handler returns the reply, or None when the answer comes later (the request then stays open). Whatever it
raises becomes the request's one final answer; a bug becomes KernelFault with an id, and the daemon lives.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, assert_never, cast

import msgspec
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from . import (
    adapters,
    encoding,
    faults,
    files,
    following,
    migration,
    planning,
    residency,
    resume,
    snapshots,
    training,
)
from .beams import BeamSearch
from .infer import Infer
from .modelfs import dataset_files
from .modelfs.names import ModelName, parse_name, parse_path
from .process import Process
from .sessions import Request, Session
from .shares import paths
from .tenants import Subject

if TYPE_CHECKING:
    from .loop import Kernel


def handle(kernel: Kernel, session_id: bytes, subject: Subject, frames: list[bytes]) -> None:
    """Decodes and serves one message of a client."""
    if kernel.sessions.strikes.get(session_id, 0) >= kernel.config.max_bad_frames:
        return
    match wire.decode_request(frames):
        case wire.Refused(id_, error):
            if isinstance(error, errors.BadFrame):
                _strike(kernel, session_id, subject)
            kernel.sessions.refuse(session_id, id_, error)
        case wire.Credit(id_, n):
            if (session := kernel.sessions.by_id.get(session_id)) and (entry := session.open.get(id_)):
                entry.credit(n)
        case wire.Cancel(id_):
            if (session := kernel.sessions.by_id.get(session_id)) and (entry := session.open.get(id_)):
                entry.cancel()
        case wire.Request() as request:
            _serve(kernel, session_id, subject, request)


def _strike(kernel: Kernel, session_id: bytes, subject: Subject) -> None:
    """Counts a frame that is no message; who sends too many is not listened to any more."""
    strikes = kernel.sessions.strikes[session_id] = kernel.sessions.strikes.get(session_id, 0) + 1
    if strikes == kernel.config.max_bad_frames:
        kernel.log.warn(f"client {subject.pid} of {subject.path} sent {strikes} bad frames: shut out")
        kernel.audit.note("shut out", subject.path, bad_frames=strikes)
        kernel.end_session(session_id)


def _serve(kernel: Kernel, session_id: bytes, subject: Subject, request: wire.Request) -> None:
    try:
        session = _session(kernel, session_id, subject, request)
        kept = _is_kept(session, cast(table.Syscall, request.call))
        kernel.sessions.open(session, request.id, type(request.call), kept, kernel.config.max_requests)
    except errors.LLMasOSError as error:
        kernel.sessions.refuse(session_id, request.id, error)
        return
    key = (session_id, request.id)
    try:
        call = cast(table.Syscall, request.call)
        session.subject.require(call.needs, call.name)
        if kept and (frames := kernel.ledger.answered(session.key, request.id)):
            again = isinstance(call, table.Infer) and resume.set_back(
                kernel, session, request.id, call, frames
            )
            if not again:
                kernel.sessions.answer_again(key, frames)
                return
        if kept and isinstance(call, table.SpawnModel | table.Infer | table.Fork | table.Restore):
            kernel.store.require_room()
        if call.needs is t.Capability.ADMIN:
            kernel.audit.before(call.name, session.subject.path, **_facts(call))
        reply = _dispatch(kernel, session, key, call, request.credits)
        if reply is not None:
            kernel.sessions.reply(key, reply)
    except errors.LLMasOSError as error:
        if isinstance(error, errors.PermissionDenied):
            kernel.audit.note("refused", session.subject.path, call=request.call.name, why=error.message)
        kernel.sessions.fail(key, error)
    except Exception as bug:
        fault = f"{kernel.random.getrandbits(32):08x}"
        kernel.log.write("error", f"kernel fault {fault} in {request.call.name}")
        faults.tell(f"kernel fault {fault}", bug)
        kernel.sessions.fail(key, errors.KernelFault(f"kernel fault {fault}", hint="see the daemon's log"))


def _is_kept(session: Session, call: table.Syscall) -> bool:
    """Whether the answer has to be kept for a client that lost its connection before it came. A one-shot
    infer can be made again instead."""
    if isinstance(call, table.Infer):
        return session.returns and call.pid is not None
    return session.returns and call.Item is None and type(call) not in table.READ_ONLY


def _facts(call: table.Call) -> dict[str, str | int]:
    """What the audit log tells of an administrator's call: its plain fields."""
    if isinstance(call, table.AuthorizeKey):
        return {"tenant": call.key.tenant, "key": call.key.public, "rights": " ".join(call.key.rights)}
    fields = ((name, getattr(call, name)) for name in call.__struct_fields__ if name != call.payload)
    return {name: value for name, value in fields if isinstance(value, str | int)}


def _session(kernel: Kernel, session_id: bytes, subject: Subject, request: wire.Request) -> Session:
    """The session of a request; the first one has to be a hello. Raises NotGreeted, QueueFull."""
    session = kernel.sessions.by_id.get(session_id)
    if session is None:
        if not isinstance(request.call, table.Hello):
            raise errors.NotGreeted("the first call of a connection is hello", hint="connect again")
        if subject.key:
            # What the key may do now, not when its connection came.
            current = kernel.keys.subject(subject.key)
            if current is None:
                raise errors.PermissionDenied("the key was revoked")
            subject = current
        if len(kernel.sessions.by_id) >= kernel.config.max_sessions:
            raise errors.QueueFull("too many connections", hint="the limit is max_sessions")
        session = kernel.sessions.by_id[session_id] = Session(session_id, subject, session_id)
    elif not session.greeted and not isinstance(request.call, table.Hello):
        raise errors.NotGreeted("hello was refused", hint="install the same version on both sides")
    return session


def _dispatch(
    kernel: Kernel, session: Session, request: Request, call: table.Syscall, credits_: int
) -> t.Wire | None:
    subject, processes = session.subject, kernel.processes
    match call:
        case table.Hello():
            return _hello(kernel, session, call)
        case table.Whoami():
            return table.WhoamiReply(
                subject=subject.path, uid=subject.uid, pid=subject.pid, admin=subject.admin
            )
        case table.SpawnModel():
            _spawn(kernel, session, request, call)
            return None
        case table.Infer():
            _infer(kernel, session, request, call, credits_)
            return None
        case table.Encode():
            _encode(kernel, session, request, call)
            return None
        case table.Fork():
            _refuse_new_work(kernel)
            owner = None if call.detached else session.key
            return processes.fork(processes.find(call.pid, subject), call.count, owner, kernel.now())
        case table.Wait():
            _wait(kernel, processes.find(call.pid, subject), request, call.timeout_s)
            return None
        case table.Train():
            _refuse_new_work(kernel)
            return training.start(kernel, session, call)
        case table.Follow():
            following.follow(kernel, processes.find(call.pid, subject), request, call.after, credits_)
            return None
        case table.Kill():
            process = processes.find(call.pid, subject)
            if process.owner != subject.path:
                signal = str(call.signal)
                kernel.audit.note("signal", subject.path, pid=call.pid, owner=process.owner, signal=signal)
            processes.signal(process, call.signal)
            return table.Done()
        case table.SetPriority():
            return _set_priority(kernel, session, call)
        case table.Truncate():
            processes.truncate(processes.find(call.pid, subject), call.length)
            return table.Done()
        case table.Snapshot():
            snapshots.snapshot(kernel, subject, request, call)
            return None
        case table.Restore():
            _refuse_new_work(kernel)
            snapshots.restore(kernel, session, request, call)
            return None
        case table.Discard():
            kernel.store.sessions.remove(subject.path, call.source)
            return table.Done()
        case table.Migrate():
            migration.migrate(kernel, processes.find(call.pid, subject), request, call.device)
            return None
        case table.Ps():
            return _ps(kernel, subject, call)
        case table.StatProcess():
            process = processes.find(call.pid, subject)
            return process.info(kernel.now(), planning.places(kernel, process.pool).get(process.pid, 0))
        case table.Ls():
            return table.LsReply(entries=files.ls(kernel, subject, call.path))
        case table.Stat():
            return files.stat(kernel, subject, call.path)
        case table.Read():
            size, data = files.read(kernel, subject, call.path, call.offset, call.length)
            return table.ReadReply(size=size, data=data)
        case table.Write():
            return _write(kernel, subject, call)
        case table.Link():
            if call.replace:
                _may_replace(kernel, subject, call.target)
            return kernel.store.link(call.source, call.target, subject.may_command, call.replace)
        case table.Unlink():
            _unlink(kernel, subject, call.path)
            return table.Done()
        case table.Pull():
            _refuse_new_work(kernel)
            _pull(kernel, subject, request, call, credits_)
            return None
        case table.Df():
            return files.df(kernel, subject)
        case table.Lsdev():
            devices = kernel.devices.values()
            return table.LsdevReply([device.info(kernel.now(), subject.may_command) for device in devices])
        case table.Stats():
            if subject.holds(t.Capability.AUDIT):
                return table.StatsReply(True, kernel.metrics.families(kernel))
            return table.StatsReply(False, kernel.metrics.use_of(subject.path))
        case table.Dmesg():
            kernel.readers.start(request, call.after, call.follow, credits_)
            return None
        case table.ReadAudit():
            size, data = kernel.audit.read(call.offset, min(call.length, files.MAX_READ))
            return table.ReadReply(size=size, data=data)
        case table.Keys():
            return table.KeysReply(server=kernel.server_key, keys=kernel.keys.entries())
        case table.AuthorizeKey():
            kernel.keys_changed(kernel.keys.authorize(call.key))
            return table.KeysReply(server=kernel.server_key, keys=kernel.keys.entries())
        case table.RevokeKey():
            kernel.keys_changed(kernel.keys.revoke(call.who))
            return table.KeysReply(server=kernel.server_key, keys=kernel.keys.entries())
        case table.Quotas():
            return _quotas(kernel, subject)
        case table.SetQuota():
            kernel.quotas.set(call.path, call.quota)
            kernel.ledger.quota(call.path, call.quota)
            kernel.fail_what_never_fits()
            return _quotas(kernel, subject)
        case table.Shutdown():
            kernel.drain(call.drain_s)
            return table.Done()
        case _:
            assert_never(call)


def _hello(kernel: Kernel, session: Session, call: table.Hello) -> table.HelloReply:
    if session.greeted:
        raise errors.InvalidRequest("hello was already said on this connection")
    if call.version != table.VERSION or call.table_hash != table.table_hash():
        raise errors.VersionMismatch(
            f"the kernel speaks version {table.VERSION}, table {table.table_hash()}",
            hint="install the same version of llmasos on both sides, or restart the daemon",
        )
    if session.subject.key:
        kernel.audit.note("login", session.subject.path, key=session.subject.key)
    if call.tenant is not None:
        kernel.audit.note("become", session.subject.path, tenant=call.tenant)
        session.subject = session.subject.assumed(call.tenant, call.rights)
    session.greeted = True
    session.subject = session.subject.narrowed(call.label)
    if call.token:
        session.key = f"{session.subject.path}:{call.token}".encode()
        kernel.returned(session)
    return table.HelloReply(
        version=table.VERSION,
        table_hash=table.table_hash(),
        boot_id=kernel.boot_id,
        subject=session.subject.path,
        max_payload=wire.MAX_PAYLOAD,
    )


def _pull(kernel: Kernel, subject: Subject, request: Request, call: table.Pull, credits_: int) -> None:
    name = parse_name(call.model)
    model = str(name)
    if "\0" in call.source:
        raise errors.InvalidArgument("a source has no zero byte", field="source")
    if call.source:
        _may_replace(kernel, subject, model)
    if call.source.startswith("run:"):
        raise errors.InvalidArgument("runs are committed by the kernel", field="source")
    if call.source and not call.source.startswith(("hf:", "pypi:", "merge:")):
        subject.require(t.Capability.FILES, "a source on the daemon's disk")
    owner = _owner_of_pulled(kernel, subject, name, call.source)
    kernel.audit.note("import", subject.path, model=model, source=call.source)
    kernel.imports.watch(model, call.source, owner, request, credits_, kernel.config.max_imports)


def _owner_of_pulled(kernel: Kernel, subject: Subject, model: ModelName, source: str) -> str:
    """Everybody has what is pulled ("") unless it is made of what is somebody's. Raises NoSuchModel for what
    the caller does not see."""
    parts = [source.removeprefix("merge:")] if source.startswith("merge:") else []
    parts += [str(model.base)] if model.adapter else []
    private = [kernel.store.resolve(part, subject.may_command).owner for part in parts]
    return subject.path if any(private) else ""


def _may_replace(kernel: Kernel, subject: Subject, model: str) -> None:
    """What a name stands for concerns everybody: only the administrator changes it."""
    try:
        kernel.store.resolve(model)
    except errors.LLMasOSError:
        return
    subject.require(t.Capability.ADMIN, f"replacing {model}")
    kernel.audit.before("replace", subject.path, model=model)


def _write(kernel: Kernel, subject: Subject, call: table.Write) -> table.WriteReply:
    """Adds to a data set of the caller. Raises QuotaExceeded."""
    name = dataset_files.parse_path(call.path)
    if not name:
        raise errors.InvalidArgument("only data sets can be written: /datasets/NAME", field="path")
    kernel.store.require_room()
    room = len(call.data)
    for path, limit in kernel.quotas.limits_of(subject.path):
        if limit.disk_bytes is not None:
            room = min(room, limit.disk_bytes - files.disk_used(kernel, path))
    size = kernel.store.datasets.write(
        subject.path, name, call.offset, call.data, call.last, room, kernel.now()
    )
    return table.WriteReply(size)


def _unlink(kernel: Kernel, subject: Subject, path: str) -> None:
    """Removes what is the caller's own; of what is everybody's it is an administrator's act."""
    if name := dataset_files.parse_path(path):
        kernel.store.datasets.remove(subject.path, name)
        return
    meanings = parse_path(path)
    if not meanings or meanings[0].file:
        raise errors.InvalidArgument(
            "a model or a data set is removed: /models/NAME, /datasets/NAME", field="path"
        )
    model = str(meanings[0].model)
    owner = ""  # of a damaged one, too
    with suppress(errors.Corrupt):
        owner = kernel.store.resolve(model, subject.may_command).owner
    if not owner:
        subject.require(t.Capability.ADMIN, f"removing {model}")
        kernel.audit.before("unlink", subject.path, model=model)
    kernel.store.unlink(model, kernel.pinned(), subject.may_command)


def _refuse_new_work(kernel: Kernel) -> None:
    if kernel.draining:
        raise errors.ShuttingDown("the daemon is shutting down", hint="start it again: llmasosd")


def _new_process(
    kernel: Kernel,
    session: Session,
    call: table.SpawnModel | table.Infer | table.Encode,
    model: str,
    detached: bool,
) -> Process:
    _refuse_new_work(kernel)
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


def _spawn(kernel: Kernel, session: Session, request: Request, call: table.SpawnModel) -> None:
    """Answers when the model is resident, so that what cannot be loaded fails here and not later."""
    process = _new_process(kernel, session, call, call.model, call.detached)
    pool = process.pool
    cancelled = False

    def ready(error: errors.LLMasOSError | None) -> None:
        if cancelled:
            return
        loaded = pool.loaded
        if error is None and loaded is not None and loaded.encodes:
            error = _generates_nothing(process)
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
        nonlocal cancelled
        cancelled = True
        kernel.processes.discard(process)
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))

    kernel.sessions.on_cancel(request, cancel)
    adapters.when_ready(kernel, pool, process.adapter, ready)


def _generates_nothing(process: Process) -> errors.UnsupportedModel:
    return errors.UnsupportedModel(
        f"{process.model} is an encoder: it generates no text", hint="call encode, or `llsh embed`"
    )


def _infer(kernel: Kernel, session: Session, request: Request, call: table.Infer, credits_: int) -> None:
    if (call.pid is None) == (call.model is None):
        raise errors.InvalidArgument("infer takes a pid or a model, and not both", field="pid")
    if len(call.tokens) % 4:
        raise errors.InvalidArgument("tokens are packed u32: a multiple of 4 bytes", field="tokens")
    resume.check(call)
    _refuse_new_work(kernel)
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


def _encode(kernel: Kernel, session: Session, request: Request, call: table.Encode) -> None:
    encoding.check(call)
    _refuse_new_work(kernel)
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
        raise _generates_nothing(process)
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


def _wait(kernel: Kernel, process: Process, request: Request, timeout_s: float | None) -> None:
    kernel.processes.wait(process, request)

    def give_up(error: errors.LLMasOSError) -> None:
        kernel.processes.stop_waiting(process, request, error)

    kernel.sessions.on_cancel(request, lambda: give_up(errors.TimedOut("cancelled")))
    if timeout_s is not None and process.exit is None:
        late = errors.TimedOut(f"process {process.pid} still runs after {timeout_s:g} s")
        call_off = kernel.at(kernel.now() + timeout_s, lambda: give_up(late))
        kernel.sessions.on_close(request, call_off)


def _set_priority(kernel: Kernel, session: Session, call: table.SetPriority) -> t.ProcessInfo:
    process = kernel.processes.find(call.pid, session.subject)
    session.subject.require_priority(call.sched_class, call.nice)
    if call.sched_class is not None:
        process.sched_class = call.sched_class
    if call.nice is not None:
        process.nice = call.nice
    for member in [process, *(process.infer.members if process.infer else [])]:
        member.pool.queue.touch(member)
    kernel.ledger.process(process)
    return process.info(kernel.now(), planning.places(kernel, process.pool).get(process.pid, 0))


def _quotas(kernel: Kernel, subject: Subject) -> table.QuotasReply:
    blocks: Counter[str] = Counter()
    for process in kernel.processes:
        if held := len(process.table.blocks):
            for path in paths(process.owner):
                blocks[path] += held
    return table.QuotasReply(
        quotas=[
            node.info(path, blocks[path], files.disk_used(kernel, path), kernel.now())
            for path, node in kernel.quotas.nodes()
            if subject.may_command(path)
        ]
    )


def _places(kernel: Kernel) -> dict[int, int]:
    """Queue places by pid, from 1 for each pool, of what could run but is not in the step."""
    places: dict[int, int] = {}
    for device in kernel.devices.values():
        for pool in device.pools:
            places |= planning.places(kernel, pool)
        places |= device.runs.places(kernel.config.aging_s, lambda process: 0.0)
    return places


def _ps(kernel: Kernel, subject: Subject, call: table.Ps) -> table.PsReply:
    seen = [
        p
        for p in kernel.processes
        if p.pid > call.after and p.beam_of is None and subject.may_command(p.owner)
    ]
    places = _places(kernel)
    rows = [p.info(kernel.now(), places.get(p.pid, 0)) for p in seen[: call.limit]]
    return table.PsReply(processes=rows, more=len(seen) > call.limit)
