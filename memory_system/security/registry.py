"""The grants of a running program: read from their file, and read anew when it changes.

`look` is called every second by the authenticator's thread, and before a key is refused; everything else may be called
from any thread, as a change replaces what there was in one step.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from memory_system.errors import AccessDenied, ConfigError
from memory_system.grants import Grants, Identity
from memory_system.log import get_logger

log = get_logger("security")

_MAX_CHAINS: Final = 10_000

Stamp = tuple[int, int, int, int]


class Registry:
    """Who a key is. When the file has changed and is not usable, the grants from before stay; `problem` says why."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is missing or not usable."""
        self.path = path
        self.problem = ""
        self._looking = threading.Lock()
        self._stamp = _stamp(path)
        self._use(Grants.load(path))

    def __repr__(self) -> str:
        return f"Registry({self.path}, {len(self.grants.by_key)} keys{', out of date' if self.problem else ''})"

    @property
    def grants(self) -> Grants:
        return self._current[0]

    def identity(self, user_id: str | None, on_behalf_of: str | None = None) -> Identity:
        """Who sends messages with this User-Id (a public key), and for whom. Raises AccessDenied."""
        known = self._current[1].get((user_id, on_behalf_of))
        return known if known is not None else self._find(user_id, on_behalf_of)

    def lets_in(self, domain: str, public: str) -> bool:
        """Whether a key may connect to sockets of this kind, as the file says at this moment."""
        grant = self.grants.by_key.get(public)
        if grant is None or not grant.may_enter(domain):
            self.look()  # or another thread has, since
            grant = self.grants.by_key.get(public)
        return grant is not None and grant.may_enter(domain)

    def look(self) -> bool:
        """Whether the file had changed; then its grants hold from now on, if they are usable. Never raises."""
        with self._looking:
            stamp = _stamp(self.path)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                grants = Grants.load(self.path)
            except ConfigError as error:
                if isinstance(error.__cause__, OSError):
                    self._stamp = None  # what cannot be read now is tried again: perhaps no file was left to open it
                if error.message != self.problem:
                    log.error("grants_not_usable", reason=f"{error.message}; the grants from before stay in force")
                self.problem = error.message
                return False
            self._use(grants)
            self.problem = ""
            log.info("grants_read", keys=len(grants.by_key))
            return True

    def _use(self, grants: Grants) -> None:
        # Both at once: what these grants allowed is forgotten with them, whoever is looking it up at this moment.
        self._current: tuple[Grants, dict[tuple[str | None, str | None], Identity]] = (grants, {})

    def _find(self, user_id: str | None, on_behalf_of: str | None) -> Identity:
        """Whoever is refused may have been granted a moment ago: another program may have read that sooner."""
        before = self._current
        try:
            return self._looked_up(user_id, on_behalf_of)
        except AccessDenied:
            self.look()
            if self._current is before:
                raise
            return self._looked_up(user_id, on_behalf_of)

    def _looked_up(self, user_id: str | None, on_behalf_of: str | None) -> Identity:
        grants, known = self._current
        if user_id is None:
            raise AccessDenied("the connection has no key")
        identity = grants.identity(user_id)
        if on_behalf_of is not None:
            identity = grants.acting(identity, on_behalf_of)
        if len(known) >= _MAX_CHAINS:
            known.clear()
        known[user_id, on_behalf_of] = identity
        return identity


def _stamp(path: Path) -> Stamp | None:
    """What changes with each change of the file; None when it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode
