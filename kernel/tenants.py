"""Who may do what. Identity comes from the socket (the peer's uid, or a CURVE key), never from a message,
unless an administrator says on whose behalf it speaks.

A subject is a path: `user`, or `user/label` for a session that narrowed itself. A subject sees and
commands what lies at or below it. Rights are denied unless held: the daemon's own user and root hold all,
other local users what `user_rights` says, a key what its entry says; a sub-tenant never more than its parent.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmasos.syscalls import errors
from llmasos.syscalls.types import Capability, Rights, SchedClass

from .shares import is_below

LABEL_RIGHTS = frozenset(
    {
        Capability.CONNECT,
        Capability.SEE,
        Capability.INFER,
        Capability.PROCESS,
        Capability.TRAIN,
        Capability.MODELS,
        Capability.FILES,
    }
)
"""The most that a sub-tenant can hold, however much its parent does."""


@dataclass(frozen=True, slots=True)
class Subject:
    """`path` is what owns processes; `uid` and `pid` are the local peer's, `key` is a remote one's public key
    in hexadecimal (uid and pid are then -1). An administrator holds every right."""

    path: str
    uid: int
    pid: int
    admin: bool
    rights: frozenset[Capability] = frozenset({Capability.CONNECT})
    key: str = ""

    def may_command(self, owner: str) -> bool:
        """Whether this subject sees and commands what `owner` owns."""
        return self.admin or is_below(owner, self.path)

    def narrowed(self, label: str, rights: Rights | None = None) -> Subject:
        """The sub-tenant `label` of this subject, with at most `rights`; it is nobody's administrator."""
        if not label:
            return self
        held = LABEL_RIGHTS if self.admin else LABEL_RIGHTS & self.rights
        if rights is not None:
            held &= {Capability.CONNECT, *rights}
        return Subject(f"{self.path}/{label}", self.uid, self.pid, False, held, self.key)

    def assumed(self, tenant: str, rights: Rights) -> Subject:
        """The tenant that an administrator's local session becomes. Raises PermissionDenied for others."""
        if not self.admin:
            raise errors.PermissionDenied(
                f"{self.path} cannot become {tenant}", hint="the daemon's own user can", tenant=tenant
            )
        held = frozenset({Capability.CONNECT, *rights}) - {Capability.ADMIN}
        return Subject(tenant, self.uid, self.pid, False, held)

    def holds(self, right: Capability) -> bool:
        return self.admin or right in self.rights

    def require(self, right: Capability, what: str) -> None:
        """Raises PermissionDenied for `what` when `right` is not held."""
        if not self.holds(right):
            raise errors.PermissionDenied(
                f"{what} needs the right {right}, which {self.path} does not have",
                hint="the daemon's own user, unlabelled, has all",
                right=str(right),
                tenant=self.path,
            )

    def require_priority(self, sched_class: SchedClass | None, nice: int | None) -> None:
        """Raising oneself above others is a right of its own, as in Unix."""
        if sched_class is SchedClass.REALTIME:
            self.require(Capability.PRIORITY, "class realtime")
        if nice is not None and nice < 0:
            self.require(Capability.PRIORITY, "a negative nice value")
