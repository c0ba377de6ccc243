"""A context manager whose cache is not proved current: it takes for granted that nothing was changed."""

from __future__ import annotations

from typing import Any

from agents.context_cache import ContextCache, Kept
from agents.context_manager_agent import ContextManagerAgent


class TrustingCache(ContextCache[Any]):
    def current(self, key: Any, commit_seq: int, now_s: float) -> Kept[Any] | None:
        kept = self._kept.get(key)
        return super().current(key, commit_seq if kept is None else kept.commit_seq, now_s)


class TrustingAgent(ContextManagerAgent):
    """Builds contexts, and trusts those it has built."""

    async def start(self) -> None:
        await super().start()
        self.cache.__class__ = TrustingCache


if __name__ == "__main__":
    TrustingAgent.main()
