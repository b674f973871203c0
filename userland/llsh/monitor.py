"""What `top` shows: a picture of the machine a moment ago, and how a person looks at it.

A Snapshot is what was true; a View is what was chosen: the order, the selected process, a question being
answered. Neither owns a connection or the terminal: keys come in as names, acts go out to `top`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmasos.syscalls import table
from llmasos.syscalls import types as t

from . import quantity
from .processes import rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from ..client import Client

HELP = """\
c   sort by tokens a second    m   by KV blocks       t   by tokens generated
a   by age                     p   by pid             o   by owner
up, down  select a process
k   kill it    s   stop it, or let it go on    r   change its nice value
q   leave      any key goes back"""

KEYS = "c m t a p o sort   k kill  s stop/cont  r renice   ? help  q quit"

# The busiest first: what runs, what could run; everything else after.
_RANK = {t.State.RUNNING: 0, t.State.READY: 1, t.State.NEW: 2}

ORDERS: dict[str, tuple[str, Callable[[t.ProcessInfo], Any]]] = {
    "c": ("tokens/s", lambda p: (_RANK.get(p.state, 3), -p.tokens_per_s, p.pid)),
    "m": ("KV blocks", lambda p: (-p.blocks, p.pid)),
    "t": ("tokens generated", lambda p: (-p.generated, p.pid)),
    "a": ("age", lambda p: (-p.age_s, p.pid)),
    "p": ("pid", lambda p: p.pid),
    "o": ("owner", lambda p: (p.owner, p.pid)),
}
"""Sort key -> (its name, how it sorts)."""

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Act:
    """What a key asks for: "quit", "kill", "stop", "cont" or "nice" of `pid`, to `value`."""

    name: str
    pid: int = 0
    value: int = 0


class Snapshot:
    """What one screen shows."""

    def __init__(self, client: Client) -> None:
        self.processes = [process for process in client.ps() if process.state is not t.State.ZOMBIE]
        self.devices = client.call(table.Lsdev()).devices

    @property
    def owners(self) -> list[str]:
        return sorted({process.owner for process in self.processes})

    def title(self) -> str:
        running = sum(process.state is t.State.RUNNING for process in self.processes)
        queued = sum(process.queue_place > 0 for process in self.processes)
        speed = sum(process.tokens_per_s for process in self.processes)
        return (
            f"llmasos {time.strftime('%H:%M:%S')}   {quantity.number(len(self.processes), 'process')},"
            f" {running} running, {queued} queued   {quantity.number(len(self.owners), 'tenant')}"
            f"   {speed:.1f} tokens/s"
        )

    def device(self, device: t.DeviceInfo) -> str:
        memory = f"{quantity.size(device.memory_free)} of {quantity.size(device.memory_total)} free"
        return f"{device.name}  {device.state}  step {device.step_ms:.1f} ms  {memory}"

    def pool(self, pool: t.PoolInfo) -> str:
        used = pool.blocks_total - pool.blocks_free
        share = 100 * used / pool.blocks_total if pool.blocks_total else 0.0
        keeps = f"KV {used}/{pool.blocks_total} blocks ({share:.0f} %)"
        return (
            f"  {pool.model.removesuffix(':latest')} {pool.dtype}"
            f"  {f'encodes to {pool.encodes}' if pool.encodes else keeps}"
            f"  {quantity.number(pool.processes, 'process')}"
        )

    def tenants(self) -> list[str]:
        """A line an owner: what all its processes together have and do."""
        lines = []
        for owner in self.owners:
            own = [process for process in self.processes if process.owner == owner]
            lines.append(
                f"{self.letter(owner)} {owner}  {quantity.number(len(own), 'process')}"
                f"  {sum(p.blocks for p in own)} blocks  {sum(p.tokens_per_s for p in own):.1f} tokens/s"
            )
        return lines

    def letter(self, owner: str) -> str:
        return LETTERS[self.owners.index(owner) % len(LETTERS)]

    def colour(self, owner: str) -> str:
        return COLOURS[self.owners.index(owner) % len(COLOURS)]

    def plain(self) -> str:
        """The head of the screen for a pipe."""
        lines = [self.title()]
        for device in self.devices:
            lines += [self.device(device), *map(self.pool, device.pools)]
        return "\n".join([*lines, *self.tenants()])

    def blocks(self, device: t.DeviceInfo, pool: t.PoolInfo, width: int) -> Text:
        """The pool's KV memory as a bar of `width` cells: a letter an owner, dots for what is free.

        Blocks that processes share count for each of them, so owners' parts are scaled to what is in use.
        """
        from rich.text import Text

        held: Counter[str] = Counter()
        for process in self.processes:
            if process.model == pool.model and process.device == device.name:
                held[process.owner] += process.blocks
        used = pool.blocks_total - pool.blocks_free
        scale = min(1.0, used / held.total()) if held.total() else 0.0
        bar, filled, upto = Text("  ["), 0, 0.0
        room = max(1, width - 4)
        for owner in sorted(held):
            upto += held[owner] * scale
            # At least a cell for who has anything.
            cells = max(round(room * upto / max(1, pool.blocks_total)), filled + (held[owner] > 0)) - filled
            cells = min(cells, room - filled)
            bar.append(self.letter(owner) * cells, style=self.colour(owner))
            filled += cells
        bar.append("." * (room - filled) + "]")
        return bar


class View:
    """How a person looks at it. `press` takes a key's name and may return what is to be done."""

    def __init__(self) -> None:
        self.order = "c"
        self.selected = 0  # a pid; 0: the first of the list
        self.helps = False
        self.message = ""
        self._asks = ""  # what is being typed for: "kill" or "nice"
        self._typed = ""

    def sorted(self, snapshot: Snapshot) -> list[t.ProcessInfo]:
        return sorted(snapshot.processes, key=ORDERS[self.order][1])

    def current(self, snapshot: Snapshot) -> t.ProcessInfo | None:
        """The selected process, or the first one when that is gone."""
        listed = self.sorted(snapshot)
        chosen = next((process for process in listed if process.pid == self.selected), None)
        return chosen or (listed[0] if listed else None)

    def press(self, key: str, snapshot: Snapshot) -> Act | None:
        self.message = ""
        process = self.current(snapshot)
        if self._asks:
            return self._answer(key, process)
        if self.helps:
            self.helps = False
        elif key in ("q", "Q", "ctrl-c", "ctrl-d"):
            return Act("quit")
        elif key in ("?", "h"):
            self.helps = True
        elif key in ORDERS:
            self.order = key
            self.message = f"sorted by {ORDERS[key][0]}"
        elif key in ("up", "down") and process:
            listed = [p.pid for p in self.sorted(snapshot)]
            place = listed.index(process.pid) + (1 if key == "down" else -1)
            self.selected = listed[min(max(place, 0), len(listed) - 1)]
        elif key in ("k", "s", "r") and process is None:
            self.message = "no process"
        elif key == "s" and process:
            self.selected = process.pid
            return Act("cont" if process.state is t.State.STOPPED else "stop", process.pid)
        elif key in ("k", "r") and process:
            # The list may be sorted anew while somebody types.
            self.selected = process.pid
            self._asks, self._typed = {"k": "kill", "r": "nice"}[key], ""
        return None

    def _answer(self, key: str, process: t.ProcessInfo | None) -> Act | None:
        """Takes a key of an answer; the act when it is complete."""
        if key == "backspace":
            self._typed = self._typed[:-1]
        elif len(key) == 1 and (key.isdecimal() or key == "-") and len(self._typed) < 6:
            self._typed += key
        elif key == "y" and self._asks == "kill":
            key = "enter"
        elif key != "enter":
            self._asks = ""
            self.message = "left alone"
        if key != "enter":
            return None
        asked, self._asks = self._asks, ""
        if process is None or process.pid != self.selected:
            self.message = f"process {self.selected} is gone"
            return None
        if asked == "kill":
            return Act("kill", process.pid)
        try:
            value = int(self._typed)
        except ValueError:
            value = 20
        if not -20 <= value <= 19:
            self.message = "a nice value is from -20 to 19"
            return None
        return Act("nice", process.pid, value)

    def status(self) -> str:
        """The last line: a question, a remark, or the keys."""
        if self._asks == "kill":
            return f"kill process {self.selected}? y or Enter"
        if self._asks == "nice":
            return f"new nice value of process {self.selected}: {self._typed}_"
        return self.message or KEYS

    def screen(self, snapshot: Snapshot, width: int, height: int) -> RenderableType:
        """The whole screen. What is least needed goes first when there is little room: tenants, the KV map,
        devices."""
        from rich.console import Group
        from rich.text import Text

        def line(text: str, style: str = "") -> Text:
            return Text(text, style=style, no_wrap=True, overflow="ellipsis")

        status = line(self.status(), "dim" if self.status() == KEYS else "bold")
        if self.helps:
            shown = [line(text) for text in HELP.splitlines()][: max(0, height - 2)]
            return Group(*shown, Text(), status)
        head = [line(snapshot.title(), "bold")]
        for device in snapshot.devices:
            head.append(line(snapshot.device(device)))
            for pool in device.pools:
                head += [line(snapshot.pool(pool)), snapshot.blocks(device, pool, width)]
        for owner, text in zip(snapshot.owners, snapshot.tenants(), strict=True):
            head.append(line(text, snapshot.colour(owner)))
        least = min(len(snapshot.processes), 3) + 3  # processes, their title, a blank line and the status
        gap = [Text()] if height > 5 else []
        head = [*head[: max(1, height - least - 1)], *gap]
        room = max(1, height - len(head) - 2)
        listed = self.sorted(snapshot)
        current = self.current(snapshot)
        place = listed.index(current) if current else 0
        first = max(0, place - room + 1)
        table_ = rows(listed[first : first + room]).fitted(width)
        if current:
            table_.rows[place - first].style = "reverse"
        return Group(*head, table_, status)
