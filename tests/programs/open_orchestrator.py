"""The orchestrator with its checks of rights switched off, to see that a test of them would notice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import orchestrator
from memory_system.security import guard

if __name__ == "__main__":
    allow: Any = lambda *_: None  # noqa: E731
    guard.authorise = allow
    sys.exit(orchestrator.main())
