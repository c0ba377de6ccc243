"""The benchmark beside other systems, with one that keeps everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.process import PROJECT


class Quick:
    """A system as `peers_process.System`: it has no time to run out of."""

    name = "quick"

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        answers = given.get("items") or given.get("questions") or []
        waits = {"elapsed_s": 1.0, "settled_s": 1.0, "waits_ms": [1.0] * len(answers), "items": len(answers)}
        return {**waits, "facts": {}, "given": [["a/1"]] * len(answers), "bytes": 1}


@pytest.mark.parametrize("turns", [2, 3, 62, 3000])
def test_there_is_something_to_add_for_any_number_of_clients(
    turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "bench"))
    import peers  # type: ignore[import-not-found]
    from rich.progress import Progress

    items = tuple({"key": f"a/{number}"} for number in range(turns))
    options = peers.arguments(["--adds", "1000"])
    bench = peers.Bench(peers.Task(items, (("q", "a", ("a/1",)),) * 2), options, tmp_path, "", Progress())
    bench._task = bench.progress.add_task("", total=None)
    found = bench._measure(Quick(), 0)
    assert [found[f"add {clients}"]["items"] for clients in peers.CLIENTS] == [min(1000, turns // 2)] * 2
    assert found["recall"] == 1.0
