"""Settings of the agents; part of `settings.py`. What all agents share stands in `AgentsSettings`, below."""

from __future__ import annotations

from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

from memory_system.config_loader import key
from memory_system.utterance_settings import UtteranceSettings


def _endpoint(text: str) -> None:
    if text and not text.startswith(("tcp://", "ipc://")):
        raise ValueError("not an endpoint")


def _not_empty(text: str) -> None:
    if not text.strip():
        raise ValueError("empty")


@dataclass(frozen=True, slots=True)
class KnowledgeBaseSettings:
    port: int = key(5715, "TCP port of the knowledge base.", span=(1, 65535))
    floor: float = key(
        0.5, "Similarity below which a fact does not answer a question; docs/agents.md has its measure.", span=(-1, 1)
    )
    keyword_floor: float = key(
        0.5, "Share of a question's words that a fact needs where meanings cannot be compared.", span=(0, 1)
    )
    duplicate_similarity: float = key(
        0.97, "Similarity from which two facts of one topic are taken for the same.", span=(0, 1)
    )
    supersede: str = key(
        "auto",
        "Whether a new value of the same thing replaces the older one by itself, or only where the caller says so.",
        choices=("auto", "explicit"),
    )


@dataclass(frozen=True, slots=True)
class SessionMemorySettings:
    port: int = key(5574, "TCP port of the session memory.", span=(1, 65535))
    idle_timeout_s: float = key(
        1800.0,
        "A session ends by itself when nothing was added to it for so long, unless its creator says otherwise; 0: it "
        "does not.",
        unit="s",
        span=(0, 10**10),
    )
    context_limit: int = key(
        20, "Turns in a context where the caller gives neither limit nor token_budget.", unit="turns", span=(1, 1000)
    )
    relevant_share: float = key(
        0.3, "Share of a token budget that is kept for older turns about the caller's query.", span=(0, 1)
    )


@dataclass(frozen=True, slots=True)
class ContextManagerSettings:
    port: int = key(7111, "TCP port of the context manager.", span=(1, 65535))
    token_budget: int = key(
        1000, "Tokens that a context may have unless the caller says otherwise.", unit="tokens", span=(1, 1_000_000)
    )
    max_items: int = key(50, "Memories that a context may have, likewise.", unit="memories", span=(1, 1000))
    candidates: int = key(
        200,
        "Memories found for a question, among which those of its context are chosen.",
        unit="memories",
        span=(1, 1000),
    )
    # The search's score has both in it since it judges a turn with those around it: see docs/decisions.md.
    neighbour_weight: float = key(
        0.0,
        "How much a memory counts for those said just before and after it, beyond the search's score.",
        span=(0, 10),
    )
    session_weight: float = key(
        0.0,
        "How much the best of a session count for everything that was said in it, beyond the search's score.",
        span=(0, 10),
    )
    speaker_weight: float = key(
        0.06, "How much it counts that a memory was said by somebody whom the query names.", span=(0, 10)
    )
    importance_weight: float = key(0.1, "How much a memory's own importance counts.", span=(0, 10))
    recency_weight: float = key(0.1, "How much it counts that a memory is new.", span=(0, 10))
    recency_half_life_days: float = key(
        7.0, "Age at which being new counts half as much.", unit="days", span=(0.001, 36_500)
    )
    diversity: float = key(
        0.05, "How much it counts against a memory that it is like those chosen before it.", span=(0, 1)
    )
    brevity: float = key(
        0.025,
        "How much the tokens of a memory count against it: its score is divided by this power of them.",
        span=(0, 1),
    )
    time_zone: str = key(
        "UTC", "Where the days of a context begin.", noun="a time zone such as Asia/Manila", check=ZoneInfo
    )
    cache_entries: int = key(1000, "Contexts kept for when they are asked for again.", unit="contexts", span=(0, 10**6))
    cache_mb: float = key(32.0, "The same, by the size of their texts.", unit="MiB", span=(0, 65_536))
    cache_ttl_s: float = key(
        60.0,
        "How long a context is given again while nothing was changed: importance fades and days pass without a change.",
        unit="s",
        span=(0, 86_400),
    )
    stale_max_s: float = key(
        3600.0,
        "How old a context may be that is given, marked stale, while the memory service does not answer.",
        unit="s",
        span=(0, 30 * 86_400),
    )


@dataclass(frozen=True, slots=True)
class AgentsSettings:
    orchestrator: str = key(
        "",
        "Where agents reach the memory service; empty: network.port on this host.",
        noun="empty, or an endpoint such as tcp://10.0.0.2:7140",
        check=_endpoint,
    )
    call_s: float = key(
        5.0, "Longest time that an agent waits for one answer of the memory service.", unit="s", span=(0.1, 3600)
    )
    look_s: float = key(
        2.0, "Interval at which an agent looks whether the memory service answers.", unit="s", span=(0.05, 3600)
    )
    failure_threshold: int = key(
        3,
        "Looks in a row without an answer after which an agent's callers get unavailable at once; where there is no "
        "connection, one is enough.",
        unit="looks",
        span=(1, 1000),
    )
    reset_timeout_s: float = key(
        1.0, "How long the memory service is then left alone before one look tries again.", unit="s", span=(0.05, 3600)
    )
    tokenizer: str = key(
        "model",
        "How the tokens of a text are counted: by the embedding model's own tokenizer, by that of a tokenizer.json, or "
        "as a quarter of the characters.",
        noun="model, characters, or the path of a tokenizer.json",
        check=_not_empty,
    )
    utterances: UtteranceSettings = field(default_factory=UtteranceSettings)
    knowledge_base: KnowledgeBaseSettings = field(default_factory=KnowledgeBaseSettings)
    session_memory: SessionMemorySettings = field(default_factory=SessionMemorySettings)
    context_manager: ContextManagerSettings = field(default_factory=ContextManagerSettings)
