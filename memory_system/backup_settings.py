"""The settings of backups: where copies of the database go, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


@dataclass(frozen=True, slots=True)
class BackupSettings:
    dir: str = key(
        "",
        "Folder of the backups, best on another disk; a relative path starts at the project folder. "
        "Empty: backups, beside the database.",
        noun="a folder path, or empty",
        is_path=True,
    )
    keep: int = key(3, "The newest backups are kept, this many of them.", unit="backups", span=(1, 10_000))
    keep_days: int = key(
        14, "Besides, the last backup of each day (UTC) is kept for this long; 0: none.", unit="days", span=(0, 36_500)
    )
