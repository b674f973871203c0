"""The daemon under systemd: the unit, and the notifications that go with it (sd_notify(3)).

Without $NOTIFY_SOCKET every notification is nothing. Nobody imports a library for a datagram.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress

_UNIT = """\
[Unit]
Description=LLMasOS, an operating system for large language models

[Service]
Type=notify
# The kernel, a child, says that its loop turns.
NotifyAccess=all
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
WatchdogSec=60
TimeoutStartSec=60
# SIGTERM goes to the supervisor alone, which lets the kernel drain.
KillMode=mixed
TimeoutStopSec=30
Restart=on-failure
RestartSec=1
# Wrong usage or configuration, a damaged journal, another daemon: trying again does not help.
RestartPreventExitStatus=2 65 75
LimitNOFILE=65536
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=default.target
"""


def unit() -> str:
    """The unit file for this installation, for `systemctl --user` as it is."""
    return _UNIT.format(command=f"{sys.executable} -m llmasos.kernel.main")


def notify(state: str) -> None:
    """Tells systemd, if it started us: "READY=1", "STOPPING=1", "WATCHDOG=1". A lost one is no reason to
    fail."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out:
        out.sendto(state.encode(), address)


def watchdog_s() -> float | None:
    """Seconds between two signs of life, a third of what systemd waits for one; None: it does not wait."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    if not limit.isdecimal() or not int(limit) or not os.environ.get("NOTIFY_SOCKET"):
        return None
    return int(limit) / 3e6
