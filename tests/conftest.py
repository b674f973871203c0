"""What all tests share."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background lets them ignore Ctrl-C, which is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
