"""Who may do what. Identity comes from the socket (the peer's uid), never from a message.

A subject is a path: `user`, or `user/label` for a session that narrowed itself. A subject sees and
commands what lies at or below it; the daemon's own user, unlabelled, and root are administrators.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmasos.syscalls import errors
from llmasos.syscalls.types import SchedClass


@dataclass(frozen=True, slots=True)
class Subject:
    """`path` is what owns processes; `uid` and `pid` are the peer's."""

    path: str
    uid: int
    pid: int
    admin: bool

    def may_command(self, owner: str) -> bool:
        """Whether this subject sees and commands what `owner` owns."""
        return self.admin or owner == self.path or owner.startswith(self.path + "/")

    def narrowed(self, label: str) -> Subject:
        """The sub-tenant `label` of this subject; it is nobody's administrator."""
        return Subject(f"{self.path}/{label}", self.uid, self.pid, False) if label else self

    def require_admin(self, what: str) -> None:
        if not self.admin:
            raise errors.PermissionDenied(
                f"{what} needs the daemon's administrator", hint="connect unlabelled"
            )

    def require_priority(self, sched_class: SchedClass | None, nice: int | None) -> None:
        """Raising oneself above others is the administrator's right, as in Unix."""
        if sched_class is SchedClass.REALTIME and not self.admin:
            raise errors.PermissionDenied("class realtime needs the daemon's administrator")
        if nice is not None and nice < 0 and not self.admin:
            raise errors.PermissionDenied("a negative nice value needs the daemon's administrator")
