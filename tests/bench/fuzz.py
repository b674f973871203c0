"""Sends the gateway what its API document allows and what it does not: no answer may be a fault of the
server, and none may have a status that is not documented.

    python tests/bench/fuzz.py [--examples 200]

The test of the same name with more examples of each operation, drawn anew each time: a real daemon with the
null driver, a real gateway, three tenants. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=200)
    arguments = parser.parse_args()
    environment = {**os.environ, "LLMASOS_FUZZ_EXAMPLES": str(arguments.examples)}
    command = [sys.executable, "-m", "pytest", "-q", "tests/gateway/test_fuzz.py", "--timeout=3600"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
