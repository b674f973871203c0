"""An infer that is asked for again: its client lost the connection, or the kernel died, before it was
answered.

The client brings the tokens it was sent. They are appended behind the input, and generation goes on: the seed
and the position alone decide what comes next, so it is what would have come. If the infer had ended already
its process is set back to where it began first, so that nothing is in the context twice. Every token reaches
the client exactly once, and so does the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.syscalls import errors, table, wire
from llmasos.syscalls.types import Finish

from . import restore

if TYPE_CHECKING:
    from .infer import Infer
    from .loop import Kernel
    from .sessions import Session


def set_back(kernel: Kernel, session: Session, id_: int, call: table.Infer, frames: list[bytes]) -> bool:
    """Makes the process of an infer that was answered with `frames` what it was before, to be gone through
    again. False: there is no need, the client has everything but the answer. Raises NoSuchProcess, and
    ProcessBusy when others went on with the process."""
    (answer,) = wire.decode_answers(frames)
    reply = wire.typed_reply(table.Infer, answer)
    assert isinstance(reply, table.InferReply)
    scored = not call.sampling.prompt_logprobs or call.scored == reply.prompt_tokens
    told = bool(reply.sequences) or (call.seen == reply.generated_tokens and scored)
    if reply.finish is Finish.KILLED or (told and reply.finish is not Finish.CANCELLED):
        return False
    assert call.pid is not None
    process = kernel.processes.find(call.pid, session.subject)
    if process.exit is not None and call.exit:
        old = process.pool
        pool, process.adapter = restore.place_of(
            kernel, process.model, process.digest, old.device_name, old.dtype
        )
        kernel.processes.revive(process, pool)
    if process.infer is not None or len(process.tokens) != reply.context:
        raise errors.ProcessBusy(f"process {process.pid} has gone on since this infer")
    process.generated -= reply.generated_tokens
    kernel.processes.truncate(process, reply.context - reply.generated_tokens - reply.prompt_tokens)
    kernel.ledger.take_back(session.key, id_)
    return True


def check(call: table.Infer) -> None:
    """Raises InvalidArgument for a resumption that cannot be."""
    most = len(call.tokens) // 4
    if call.seen > (most if call.max_tokens is None else min(most, call.max_tokens)):
        raise errors.InvalidArgument("more tokens were seen than asked for or sent", field="seen")
    if call.seen and call.beams is not None:
        raise errors.InvalidArgument("beam search starts anew, nothing of it was seen", field="seen")


def go_on(infer: Infer, call: table.Infer, seen: list[int]) -> None:
    """Books what the client has: `seen` tokens, and scores of the input."""
    infer.made = infer.brought = len(seen)
    infer.seq = call.seq
    infer.scored += max(0, call.scored - (infer.first_input == 0))
    if seen and seen[-1] in call.sampling.stop_token_ids:
        infer.finish = Finish.STOP
    elif seen and infer.start + len(seen) >= infer.limit:
        infer.finish = Finish.LENGTH
