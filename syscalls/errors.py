"""Every error that crosses a boundary, with its number: the same class is raised in the kernel and in
the client.

    LLMasOSError
    ├── InvalidRequest          the caller's fault; the same request will fail again
    │   ├── BadFrame            not msgpack, too big, too deep, wrong envelope
    │   ├── UnknownCall
    │   ├── InvalidArgument     names the field
    │   ├── VersionMismatch     client and kernel have different syscall tables
    │   └── NotGreeted          the first call on a connection must be `hello`
    ├── PermissionDenied
    ├── NotFound
    │   ├── NoSuchProcess
    │   ├── NoSuchModel
    │   ├── NoSuchFile
    │   ├── NoSuchDevice
    │   └── NoSuchKey
    ├── Conflict
    │   ├── AlreadyExists
    │   ├── ProcessBusy         the process already has an `infer` or `wait` of that kind
    │   └── ProcessEnded        a zombie: only `wait` applies
    ├── LimitExceeded
    │   ├── ContextOverflow     prompt + max_tokens exceed the model's context
    │   ├── NeverFits           more memory than the device has, even when empty
    │   ├── TooManyProcesses
    │   ├── QueueFull
    │   └── QuotaExceeded       of the owner; `retry_after` seconds from now it may be otherwise
    ├── Unavailable             try again later; nothing was changed
    │   ├── DaemonUnreachable
    │   ├── ConnectionLost
    │   ├── DeviceUnavailable
    │   ├── ShuttingDown
    │   ├── TimedOut
    │   └── StorageFailed       a file could not be written or read: the disk is full or broken
    ├── DeviceFault             the driver failed this request
    ├── ModelError
    │   ├── UnsupportedModel    architecture, dtype or option that no driver computes
    │   ├── RefusedFile         pickles, code, `auto_map`: never read
    │   ├── Corrupt             a file is not what its digest says
    │   └── PullFailed          no source could deliver the model
    └── KernelFault             a bug in the kernel; carries an id that `dmesg` shows

On the wire an error is a map {code, message, hint, details}. Messages never hold prompt or completion text.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LLMasOSError(Exception):
    """Base of every error of LLMasOS.

    `message` says what happened, `hint` what to do next, `details` holds fields for programs
    (values are str, int or float).
    """

    code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **details: str | int | float) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, str | int | float] = details

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequest(LLMasOSError):
    code = 10


class BadFrame(InvalidRequest):
    code = 11


class UnknownCall(InvalidRequest):
    code = 12


class InvalidArgument(InvalidRequest):
    code = 13


class VersionMismatch(InvalidRequest):
    code = 14


class NotGreeted(InvalidRequest):
    code = 15


class PermissionDenied(LLMasOSError):
    code = 20


class NotFound(LLMasOSError):
    code = 30


class NoSuchProcess(NotFound):
    code = 31


class NoSuchModel(NotFound):
    code = 32


class NoSuchFile(NotFound):
    code = 33


class NoSuchDevice(NotFound):
    code = 34


class NoSuchKey(NotFound):
    code = 36


class Conflict(LLMasOSError):
    code = 40


class AlreadyExists(Conflict):
    code = 41


class ProcessBusy(Conflict):
    code = 42


class ProcessEnded(Conflict):
    code = 43


class LimitExceeded(LLMasOSError):
    code = 50


class ContextOverflow(LimitExceeded):
    code = 51


class NeverFits(LimitExceeded):
    code = 52


class TooManyProcesses(LimitExceeded):
    code = 53


class QueueFull(LimitExceeded):
    code = 54


class QuotaExceeded(LimitExceeded):
    code = 55


class Unavailable(LLMasOSError):
    code = 60


class DaemonUnreachable(Unavailable):
    code = 61


class ConnectionLost(Unavailable):
    code = 62


class DeviceUnavailable(Unavailable):
    code = 63


class ShuttingDown(Unavailable):
    code = 64


class TimedOut(Unavailable):
    code = 65


class StorageFailed(Unavailable):
    code = 66


class DeviceFault(LLMasOSError):
    code = 70


class ModelError(LLMasOSError):
    code = 80


class UnsupportedModel(ModelError):
    code = 81


class RefusedFile(ModelError):
    code = 82


class Corrupt(ModelError):
    code = 83


class PullFailed(ModelError):
    code = 84


class KernelFault(LLMasOSError):
    code = 90


def _tree(root: type[LLMasOSError]) -> dict[int, type[LLMasOSError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[int, type[LLMasOSError]] = _tree(LLMasOSError)


def to_wire(error: LLMasOSError) -> dict[str, Any]:
    """The map that travels for `error`."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "details": error.details}


def from_wire(body: dict[str, Any]) -> LLMasOSError:
    """The exception for a received map; an unknown code (a newer kernel) becomes the base class."""
    kind = BY_CODE.get(body.get("code", 1), LLMasOSError)
    details = {str(key): value for key, value in dict(body.get("details", {})).items()}
    details.pop("hint", None)
    return kind(str(body.get("message", "unknown error")), hint=str(body.get("hint", "")), **details)
