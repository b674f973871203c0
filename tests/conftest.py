"""What all tests share."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from llmasos.syscalls import garbage

# A shell that starts the tests in the background lets them ignore Ctrl-C, which is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """torch and transformers are there now, and never garbage."""
    garbage.collect_rarely()


@pytest.fixture(scope="session")
def smollm2_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the default model, really fetched, once a session. Who writes in a home takes a copy."""
    home = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer", "--home", str(home)]
    done = subprocess.run([*command, "--model", "smollm2"], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:]
    return home
