"""What is to be indexed: read for the jobs that make an index anew."""

from __future__ import annotations

from memory_system.storage.readers import Readers


async def count_texts(readers: Readers) -> int:
    """How many memories the index is to have."""
    return int((await readers.fetch("SELECT count(*) FROM memories WHERE memory_type <> 'session'"))[0][0])


async def texts_after(readers: Readers, row_id: int, limit: int) -> list[tuple[int, bytes]]:
    """The next memories that have a vector or are to have one: row_id, content digest."""
    found = await readers.fetch(
        "SELECT row_id, content_digest FROM memories WHERE row_id > ? AND memory_type <> 'session' "
        "ORDER BY row_id LIMIT ?",
        (row_id, limit),
    )
    return [(row_id, digest) for row_id, digest in found]


async def namespaces(readers: Readers) -> list[str]:
    """All that were ever written to."""
    return [name for (name,) in await readers.fetch("SELECT namespace FROM namespaces ORDER BY namespace")]
