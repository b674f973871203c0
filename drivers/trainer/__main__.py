"""The process of one training run: attaches to the kernel's bus, is told what to train, computes while it has
a grant.

    python -m llmasos.drivers.trainer --run 3 --bus /run/user/1000/llmasos/bus.sock --parent 4711

Ends with status 0 when it is done, told to leave, or the kernel is gone (the next one starts it again); with
1 when it failed, which it has told. Killed at any moment, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys

from . import life


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmasos.drivers.trainer", description=__doc__)
    parser.add_argument("--run", type=int, required=True, help="the kernel's number of the run")
    parser.add_argument("--bus", required=True, help="path of the kernel's Unix stream socket")
    parser.add_argument("--parent", type=int, default=0, help="end when this is not the parent process")
    parser.add_argument("--ranks", type=int, default=0, help="of a group: how many there are")
    parser.add_argument("--rank", type=int, default=0, help="of a group: which one this is")
    parser.add_argument("--device", default="cpu", help="of a group: where it computes, cpu or cuda")
    parser.add_argument("--rendezvous", default="", help="of a group: where its ranks meet")
    arguments = parser.parse_args()
    faulthandler.enable()
    # Ctrl-C on the terminal is for the kernel, which then closes the bus.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return life.live(arguments)


if __name__ == "__main__":
    sys.exit(main())
