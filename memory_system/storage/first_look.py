"""A store is locked and looked at in a thread of its own, while its program gets ready."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memory_system.storage.database import StoreLock, lock_store, look_at


class FirstLook:
    """Begins at once. Nothing of the store changes, and nobody else can open it, until `close`."""

    def __init__(self, path: Path) -> None:
        thread = ThreadPoolExecutor(1, "first-look")
        self._path = path
        self._lock: StoreLock | None = None
        self._found = thread.submit(self._look)
        thread.shutdown(wait=False)

    def __repr__(self) -> str:
        return f"<FirstLook {self._path} {'over' if self._found.done() else 'running'}>"

    def result(self) -> None:
        """Wait until the store may be opened. Raises what `lock_store` and `look_at` do."""
        self._found.result()

    def close(self) -> None:
        """Let go of the store, once the look is over. Idempotent."""
        self._found.exception()
        if self._lock is not None:
            self._lock.release()

    def _look(self) -> None:
        self._lock = lock_store(self._path)
        look_at(self._path)
