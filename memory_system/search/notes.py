"""What the ranking has to know of a text beside its words: 64 bits, made when the text is indexed and kept with it."""

from __future__ import annotations

from typing import Final

# To be raised when the bits come to mean something else: they are then made anew.
VERSION: Final = 2

# The text ends with a question: what follows it below the same parent is likely the answer.
ASKS: Final = 1

_MARKS: Final = ("?", "\uff1f", "\u061f")  # Latin, full width, Arabic
# An end without a single sign is not looked for in a whole book.
_LOOKED_AT_CHARS: Final = 2000


def note(text: str) -> int:
    """The bits of a text."""
    return ASKS * asks(text)


def asks(text: str) -> bool:
    """Whether the text ends with a question mark; a last remark in brackets, such as an image's caption, aside."""
    end = text[-_LOOKED_AT_CHARS:].rstrip()
    if end.endswith("]"):
        end = end[: max(0, end.rfind("["))].rstrip()
    return end.endswith(_MARKS)
