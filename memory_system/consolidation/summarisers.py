"""What makes the text of a merged memory: the extractive summary, or a callable that the settings name.

A summariser is called with the originals in the order of time, the length that its text may have, and a function that
turns texts into vectors. It returns the text, or better its pieces, each with the place of the original it is taken
from: when an original is deleted, its pieces go, while a text without pieces has to go as a whole.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memory_system.consolidation import summary
from memory_system.consolidation.summary import Sentence
from memory_system.errors import ConfigError

EXTRACTIVE: Final = "extractive"

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Awaitable[Vectors]]
Pieces = Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Original:
    """One of the memories that are merged. `at_s`: when it occurred, else was created, epoch seconds."""

    memory_id: str
    content: str
    at_s: float


# A plain function runs in a thread, a coroutine function on the service's loop, which it must not hold up.
Summariser = Callable[[Sequence[Original], int, Embed], str | Pieces | Awaitable[str | Pieces]]


async def extractive(originals: Sequence[Original], budget_chars: int, embed: Embed) -> Pieces:
    """The sentences that say most of what the originals have in common, each with who says it."""
    labels = [summary.label(original.content) for original in originals]
    found = summary.split([original.content for original in originals])
    vectors = await embed([sentence.text for sentence in found])
    told = [Sentence(sentence.source, _labelled(sentence.text, labels[sentence.source])) for sentence in found]
    return [(told[at].source, told[at].text) for at in summary.choose(told, vectors, budget_chars)]


def load(name: str) -> Summariser:
    """The summariser of this name: extractive, or `module:callable`. Raises ConfigError."""
    if name == EXTRACTIVE:
        return extractive
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module of somebody else may fail at its import in any way
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"consolidation.summariser: {name!r} cannot be imported ({reason})") from error
    if not callable(found):
        raise ConfigError(f"consolidation.summariser: {name!r} is not callable")
    summariser: Summariser = found
    return summariser


async def summarise(
    summariser: Summariser, originals: Sequence[Original], budget_chars: int, embed: Embed
) -> tuple[str, Pieces | None]:
    """The text, with its pieces where the summariser told them. Raises ValueError for what is neither."""
    on_the_loop: bool = inspect.iscoroutinefunction(summariser)
    if on_the_loop:
        made = summariser(originals, budget_chars, embed)
    else:
        made = await asyncio.to_thread(summariser, originals, budget_chars, embed)
    result = await made if inspect.isawaitable(made) else made
    if isinstance(result, str):
        return _checked(result), None
    pieces = [(int(source), _checked(text)) for source, text in result]
    if not pieces or any(not 0 <= source < len(originals) for source, _ in pieces):
        raise ValueError("a summary needs pieces, each of one of the originals")
    return "", pieces


def _checked(text: str) -> str:
    if not isinstance(text, str) or not text.strip() or "\x00" in text:
        raise ValueError("a summary needs text, without NUL")
    return text.strip()


def _labelled(text: str, says: str | None) -> str:
    return text if says is None or text.startswith(f"{says}:") else f"{says}: {text}"
