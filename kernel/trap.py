"""Who answers a call: one `match` over the syscall table.

A handler returns the reply, or None when the answer comes later (the request then stays open). Whatever it
raises becomes the request's one final answer; a bug becomes KernelFault with an id, and the daemon lives.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, assert_never, cast

from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from . import (
    admission,
    faults,
    files,
    following,
    migration,
    planning,
    resume,
    snapshots,
    training,
)
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
        if subject.key:
            # What the key may do now, not when its connection came.
            current = kernel.keys.subject(subject.key)
            if current is None:
                raise errors.PermissionDenied("the key was revoked")
            subject = current
        if not isinstance(request.call, table.Hello):
            raise errors.NotGreeted("the first call of a connection is hello", hint="connect again")
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
            admission.spawn(kernel, session, request, call)
            return None
        case table.Infer():
            admission.infer(kernel, session, request, call, credits_)
            return None
        case table.Encode():
            admission.encode(kernel, session, request, call)
            return None
        case table.Fork():
            admission.refuse_new_work(kernel)
            owner = None if call.detached else session.key
            return processes.fork(processes.find(call.pid, subject), call.count, owner, kernel.now())
        case table.Wait():
            _wait(kernel, processes.find(call.pid, subject), request, call.timeout_s)
            return None
        case table.Train():
            admission.refuse_new_work(kernel)
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
            admission.refuse_new_work(kernel)
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
            admission.refuse_new_work(kernel)
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
        rights = t.TENANT_RIGHTS if call.rights is None else call.rights
        session.subject = session.subject.assumed(call.tenant, rights)
    session.greeted = True
    session.subject = session.subject.narrowed(call.label, call.rights)
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
    if call.source.startswith("merge:"):
        training.must_be_free(kernel, model)  # it is made here too, and was not meant to replace
    elif call.source:
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
