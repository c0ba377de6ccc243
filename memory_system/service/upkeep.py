"""Puts the maintenance of the store together from the parts of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memory_system.cache import Caches
from memory_system.embedding import Embedder, EmbeddingQueue
from memory_system.search.engine import SearchEngine
from memory_system.search.index import SearchIndex
from memory_system.service.archiving import ArchivingService
from memory_system.service.checking import Checking
from memory_system.service.consolidating import Consolidating
from memory_system.service.exports import Exports
from memory_system.service.maintaining import MaintainingService
from memory_system.service.merges import Merges
from memory_system.service.reindexing import Reindexing
from memory_system.service.runs import Runs
from memory_system.service.sweeps import Sweeps
from memory_system.settings import Settings
from memory_system.storage.readers import Readers
from memory_system.storage.writer import Writer


@dataclass(frozen=True, slots=True)
class Parts:
    """What maintenance works on."""

    writer: Writer
    readers: Readers
    index: SearchIndex
    engine: SearchEngine
    caches: Caches
    embedder: Embedder
    embedding: EmbeddingQueue


class Upkeep:
    """The services of the admin actions, and the runs that they have in common."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        database = Path(settings.storage.path)
        self.runs = Runs(parts.writer, parts.readers, settings)
        self.maintaining = _maintaining(settings, database, parts, self.runs)
        self.exports = Exports(database)
        self.archiving = ArchivingService(self.runs, parts.writer, self.exports, parts.embedder, settings)


def _maintaining(settings: Settings, database: Path, parts: Parts, runs: Runs) -> MaintainingService:
    readers, maintenance = parts.readers, settings.maintenance
    consolidating = Consolidating(settings, parts.writer, readers, parts.engine, parts.embedder)
    return MaintainingService(
        runs,
        parts.writer,
        readers,
        parts.index,
        Sweeps(readers, settings),
        Merges(consolidating, maintenance.slice_rows),
        Checking(database, parts.index, maintenance.share),
        Reindexing(readers, parts.index, parts.caches, parts.embedder, parts.embedding),
    )
