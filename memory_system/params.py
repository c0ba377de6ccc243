"""The types of request fields, with their ranges and lengths, and the root of all request data."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct, UnsetType

from memory_system import protocol as p

# \A and \Z: `$` would let a trailing newline pass.
_PRINTABLE = r"\A[^\x00-\x1f\x7f]+\Z"

Id = Annotated[str, Meta(min_length=1, max_length=p.MAX_ID_CHARS, pattern=_PRINTABLE)]
Name = Annotated[str, Meta(min_length=1, max_length=p.MAX_NAME_CHARS, pattern=_PRINTABLE)]
Chain = Annotated[str, Meta(min_length=1, max_length=p.MAX_CHAIN_CHARS, pattern=_PRINTABLE)]
Tag = Annotated[str, Meta(min_length=1, max_length=p.MAX_TAG_CHARS, pattern=_PRINTABLE)]
Tags = Annotated[list[Tag], Meta(max_length=p.MAX_TAGS)]
_NO_NUL = r"\A[^\x00]*\Z"
Content = Annotated[str, Meta(min_length=1, max_length=p.MAX_CONTENT_BYTES, pattern=_NO_NUL)]
Text = Annotated[str, Meta(max_length=4096, pattern=_NO_NUL)]
Query = Annotated[str, Meta(min_length=1, max_length=p.MAX_QUERY_CHARS, pattern=_NO_NUL)]
Cursor = Annotated[str, Meta(min_length=1, max_length=1024)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
# Years 0 to 9999, which also keeps infinities and NaN out.
Time = Annotated[float, Meta(ge=-62_167_219_200.0, le=253_402_300_799.0)]
# Up to three hundred years.
Timeout = Annotated[float, Meta(gt=0.0, le=1e10)]
Limit = Annotated[int, Meta(ge=1, le=p.MAX_RESULTS)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Tier = Literal["short", "medium", "long"]
State = Literal["active", "archived"]
SortOrder = Literal["asc", "desc"]
SortField = Literal[
    "created_at", "updated_at", "occurred_at", "last_accessed_at", "importance", "access_count", "version", "memory_id"
]
SearchMode = Literal["hybrid", "dense", "keyword"]
Cosine = Annotated[float, Meta(ge=-1.0, le=1.0)]
Weight = Annotated[float, Meta(ge=0.0, le=10.0)]
HalfLife = Annotated[float, Meta(ge=0.001, le=36_500.0)]  # days
Expansion = Literal["parent", "neighbours"]

# The encoding of "absent" for a raw field; `null` arrives as the bytes of null.
ABSENT = Raw(b"")


def check_content(content: str | UnsetType) -> None:
    """The limit is in bytes; what msgspec checks is characters."""
    if isinstance(content, str) and 4 * len(content) > p.MAX_CONTENT_BYTES < (size := len(content.encode())):
        raise ValueError(f"`content` has {size} bytes, the limit is {p.MAX_CONTENT_BYTES}")


class Params(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The root of all request data; unknown fields are refused (legacy callers: see decoding.py)."""
