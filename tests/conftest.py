"""What holds for all tests and for the programs that they start."""

from __future__ import annotations

import os
import signal

# Nobody reports to an error bus that was not asked for.
os.environ["MEMORY_ERROR_BUS_ADDR"] = ""
# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
