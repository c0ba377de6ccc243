"""Caches: what makes the service faster and whose loss costs nothing but time. See `caches.py` for the whole."""

from memory_system.cache.caches import Caches, make_caches
from memory_system.cache.records import RecordCache
from memory_system.cache.results import ResultCache, ResultKey
from memory_system.cache.vectors import LayeredVectorCache

__all__ = ["Caches", "LayeredVectorCache", "RecordCache", "ResultCache", "ResultKey", "make_caches"]
