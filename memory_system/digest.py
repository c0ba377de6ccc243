"""The digest that ties a vector, a cache entry and an index entry to the text they were made from."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

DIGEST_BYTES: Final = 16


def content_digest(text: str) -> bytes:
    """Return the BLAKE2b digest of the text's UTF-8 form, 16 bytes.

    Raises UnicodeEncodeError for a lone surrogate; the decoder lets none in.
    """
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
