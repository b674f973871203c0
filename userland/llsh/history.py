"""Where lines typed in llsh are remembered: $LLMASOS_HOME, or the XDG state folder. Readable by their owner
alone, because prompts are private."""

from __future__ import annotations

import os
from pathlib import Path

from llmasos.syscalls import address


def history_file(name: str) -> Path:
    """The history called `name` ("llsh", "chat"), made if it is not there. Raises OSError."""
    if os.environ.get(address.HOME_VARIABLE):
        folder = address.home_folder()
    else:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        folder = Path(state) / "llmasos"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_history"
    path.touch(mode=0o600, exist_ok=True)
    return path
