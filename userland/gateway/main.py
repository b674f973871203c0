"""`llmasos-gateway`: `llsh serve` as a program of its own."""

from __future__ import annotations

import sys

from ..llsh.main import dispatch
from ..llsh.shell import Shell


def main() -> int:
    """Entry point of `llmasos-gateway`."""
    return dispatch(["serve", *sys.argv[1:]], Shell())


if __name__ == "__main__":
    sys.exit(main())
