"""The settings of consolidation: which fading memories become one, and how long what is said of them may be."""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


def _summariser(text: str) -> None:
    module, colon, name = text.partition(":")
    if text != "extractive" and not (colon and module and name.isidentifier()):
        raise ValueError("not a summariser")


@dataclass(frozen=True, slots=True)
class ConsolidationSettings:
    min_related_memories: int = key(
        2, "Fewest memories that are merged into one; duplicates always are.", unit="memories", span=(2, 50)
    )
    max_related_memories: int = key(
        3, "Most memories that are merged into one, duplicates counted once.", unit="memories", span=(2, 50)
    )
    max_chars: int = key(
        300,
        "Memories are merged that have no more text together, or than two of their parent's have on average.",
        unit="characters",
        span=(1, 1_000_000),
    )
    similarity_threshold: float = key(
        0.4, "Mean cosine from which memories of one parent, or related ones, are kin.", span=(0.01, 1)
    )
    window_h: float = key(
        24.0, "Kin lie at most this far apart, by when they occurred, else were created.", unit="h", span=(0, 876_000)
    )
    duplicate_similarity: float = key(0.97, "Cosine from which two memories say the same.", span=(0.01, 1))
    summary_share: float = key(0.9, "Length of a summary, as a share of its originals' length.", span=(0.01, 1))
    summary_max_chars: int = key(4000, "Longest summary.", unit="characters", span=(1, 60_000))
    summariser: str = key(
        "extractive",
        "What makes a summary: extractive, or a callable of your own as module:name (docs/lifecycle.md).",
        noun="extractive or module:name",
        check=_summariser,
    )
    summariser_timeout_s: float = key(60.0, "Longest wait for one summary.", unit="s", span=(0.1, 86_400))
