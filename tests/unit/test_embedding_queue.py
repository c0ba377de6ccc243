"""The embedding queue over an embedder that records its batches and waits to be let through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memory_system.digest import content_digest
from memory_system.embedding import EmbedderState, EmbeddingQueue, Vectors
from memory_system.embedding.interface import StateCallback
from memory_system.errors import StorageFull, VectorsUnavailable
from memory_system.settings import EmbeddingSettings

SETTINGS = EmbeddingSettings(batch_texts=2, batch_ms=1000.0)


class RecordingEmbedder:
    """Encodes a text as (its length, 1) unnormalized; fails at texts with "poison" as a worker that dies."""

    def __init__(self) -> None:
        self.state: EmbedderState = "ready"
        self.reason: str | None = None
        self.model_id: str | None = "recording"
        self.dimension: int | None = 2
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._callbacks: list[StateCallback] = []

    def on_state(self, callback: StateCallback) -> None:
        self._callbacks.append(callback)

    def become(self, state: EmbedderState) -> None:
        self.state = state
        for callback in self._callbacks:
            callback(state)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def encode(self, texts: Sequence[str]) -> Vectors:
        self.batches.append(list(texts))
        await self.gate.wait()
        if any("poison" in text for text in texts):
            self.become("down")
            asyncio.get_running_loop().call_soon(self.become, "ready")
            raise VectorsUnavailable("the embedding worker died")
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


class World:
    """A queue with its store, cache and embedder."""

    def __init__(self, settings: EmbeddingSettings = SETTINGS) -> None:
        self.embedder = RecordingEmbedder()
        self.texts: dict[int, str] = {}
        self.stored: dict[int, tuple[bytes, Vectors]] = {}
        self.store_errors: list[Exception] = []
        self.cached: dict[tuple[str, bytes], Vectors] = {}
        self.queue = EmbeddingQueue(self.embedder, settings, load_texts=self.load_texts, store=self.store, vectors=self)

    def write(self, *row_ids: int) -> list[int]:
        self.texts |= {row_id: f"row {row_id}" for row_id in row_ids}
        return list(row_ids)

    async def load_texts(self, row_ids: Sequence[int]) -> dict[int, tuple[str, bytes]]:
        return {row: (self.texts[row], content_digest(self.texts[row])) for row in row_ids if row in self.texts}

    async def store(self, model_id: str, items: list[tuple[int, bytes, Vectors]]) -> None:
        assert model_id == "recording"
        if self.store_errors:
            raise self.store_errors.pop()
        self.stored |= {row_id: (digest, vector) for row_id, digest, vector in items}

    async def get_many(self, model_id: str, digests: Sequence[bytes]) -> dict[bytes, Vectors]:
        return {digest: self.cached[model_id, digest] for digest in digests if (model_id, digest) in self.cached}

    async def put_many(self, model_id: str, vectors: Mapping[bytes, Vectors]) -> None:
        self.cached |= {(model_id, digest): vector for digest, vector in vectors.items()}

    def encoded(self) -> list[str]:
        return [text for batch in self.embedder.batches for text in batch]


async def until(condition: Callable[[], object], within_s: float = 45.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


def run(scenario: Callable[[World], Coroutine[Any, Any, None]], settings: EmbeddingSettings = SETTINGS) -> None:
    async def main() -> None:
        world = World(settings)
        try:
            await scenario(world)
        finally:
            await world.queue.close()

    asyncio.run(main())


async def behind_a_first_batch(world: World, fill: Callable[[], object], done: Iterable[int]) -> list[list[str]]:
    """Fill the queue while a first row is being encoded; returns the batches after it."""
    world.embedder.gate.clear()
    world.queue.add(world.write(1))
    world.queue.start()
    await until(lambda: world.embedder.batches)
    fill()
    await asyncio.sleep(0)
    world.embedder.gate.set()
    await until(lambda: set(done) <= world.stored.keys())
    return world.embedder.batches[1:]


def test_queries_go_before_rows_and_the_newest_rows_before_the_older_ones() -> None:
    async def scenario(world: World) -> None:
        asked: list[asyncio.Task[Vectors]] = []

        def fill() -> None:
            world.queue.backfill(world.write(2, 3))
            world.queue.add(world.write(10, 12, 11, 13))
            asked.append(asyncio.create_task(world.queue.embed_query("a question")))

        batches = await behind_a_first_batch(world, fill, [2, 3, 10, 11, 12, 13])
        assert batches == [["a question"], ["row 13", "row 12"], ["row 11", "row 10"], ["row 2", "row 3"]]
        assert (await asked[0])[0] == len("a question")

    run(scenario, replace(SETTINGS, backfill_share=0.1))


@pytest.mark.parametrize(("share", "every"), [(0.25, 4), (0.5, 2)])
def test_backfill_gets_its_share_while_newer_rows_wait(share: float, every: int) -> None:
    async def scenario(world: World) -> None:
        def fill() -> None:
            world.queue.backfill(world.write(*range(100, 108)))
            world.queue.add(world.write(*range(200, 240)))

        batches = await behind_a_first_batch(world, fill, [*range(100, 108), *range(200, 240)])
        turns = [index for index, batch in enumerate(batches, 1) if batch[0].startswith("row 1")]
        assert turns[:3] == [every, 2 * every, 3 * every]
        assert [text for batch in batches for text in batch if text < "row 2"] == [f"row {n}" for n in range(100, 108)]

    run(scenario, replace(SETTINGS, backfill_share=share))


def test_queries_without_end_do_not_stop_the_rows() -> None:
    async def scenario(world: World) -> None:
        world.queue.add(world.write(1))
        world.queue.start()

        async def ask() -> None:
            number = 0
            while 1 not in world.stored:
                number += 1
                await asyncio.gather(*(world.queue.embed_query(f"{number} {part}") for part in range(4)))

        async with asyncio.timeout(10):
            await ask()

    run(scenario)


def test_a_row_that_waits_twice_and_a_text_that_two_rows_share_are_encoded_once() -> None:
    async def scenario(world: World) -> None:
        def fill() -> None:
            world.queue.backfill(world.write(5, 6))
            world.queue.add([5, 6, 5])
            world.queue.backfill([5, 6])
            world.texts[6] = world.texts[5]
            assert world.queue.depth == (2, 0)

        assert await behind_a_first_batch(world, fill, [5, 6]) == [["row 5"]]
        assert world.queue.depth == (0, 0)

    run(scenario)


def test_identical_queries_are_encoded_once_and_then_come_from_the_cache() -> None:
    async def scenario(world: World) -> None:
        world.queue.start()
        together = await asyncio.gather(*(world.queue.embed_query("same") for _ in range(5)))
        assert all(vector is together[0] for vector in together)
        assert not together[0].flags.writeable
        await until(lambda: world.cached)
        await world.queue.embed_query("same")
        many = await world.queue.embed_queries(["same", "other one", "same", "third"])
        assert [vector[0] for vector in many] == [4, 9, 4, 5]
        assert sorted(world.encoded()) == ["other one", "same", "third"]

    run(scenario)


def test_a_cached_vector_serves_a_query_while_the_embedder_is_down() -> None:
    async def scenario(world: World) -> None:
        world.queue.start()
        await world.queue.embed_query("known")
        await until(lambda: world.cached)
        world.embedder.become("down")
        assert (await world.queue.embed_query("known"))[0] == 5
        with pytest.raises(VectorsUnavailable):
            await world.queue.embed_query("unknown")

    run(scenario)


def test_a_caller_that_gives_up_takes_its_query_out_but_not_that_of_others() -> None:
    async def scenario(world: World) -> None:
        world.embedder.gate.clear()
        world.queue.start()
        first = asyncio.create_task(world.queue.embed_query("running"))
        await until(lambda: world.embedder.batches)
        shared = asyncio.create_task(world.queue.embed_query("shared"))
        for text in ("given up", "shared", "running"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.queue.embed_query(text), 0.02)
        world.embedder.gate.set()
        assert (await first)[0] == 7 and (await shared)[0] == 6
        await world.queue.embed_query("end")
        assert world.encoded() == ["running", "shared", "end"]

    run(scenario)


def test_rows_wait_while_the_embedder_is_down_and_go_on_when_it_is_back() -> None:
    async def scenario(world: World) -> None:
        world.embedder.state = "starting"
        world.queue.start()
        world.queue.add(world.write(1, 2))
        world.queue.backfill(world.write(3))
        await asyncio.sleep(0.05)
        assert world.embedder.batches == [] and world.queue.depth == (2, 1)
        world.embedder.become("ready")
        await until(lambda: world.stored.keys() == {1, 2, 3})

    run(scenario)


def test_waiting_queries_fail_as_soon_as_the_embedder_goes_down() -> None:
    async def scenario(world: World) -> None:
        world.embedder.gate.clear()
        world.queue.start()
        world.queue.add(world.write(1))
        await until(lambda: world.embedder.batches)
        waiting = asyncio.create_task(world.queue.embed_query("waiting"))
        await asyncio.sleep(0.01)
        world.embedder.become("down")
        with pytest.raises(VectorsUnavailable):
            await waiting

    run(scenario)


def test_a_store_that_fails_is_tried_again_without_encoding_again() -> None:
    async def scenario(world: World) -> None:
        world.store_errors = [StorageFull("the disk is full"), RuntimeError("a defect")]
        world.queue.start()
        world.queue.add(world.write(1, 2))
        assert (await world.queue.embed_query("meanwhile"))[0] == 9
        await until(lambda: world.stored.keys() == {1, 2})
        assert world.encoded().count("row 1") == 1

    run(scenario)


def test_rows_that_are_gone_or_discarded_are_dropped() -> None:
    async def scenario(world: World) -> None:
        def fill() -> None:
            world.queue.add([*world.write(2, 3), 99])
            world.queue.discard([1, 2])

        await behind_a_first_batch(world, fill, [3])
        await until(lambda: world.queue.depth == (0, 0))
        assert world.stored.keys() == {3}
        assert ("recording", content_digest("row 1")) not in world.cached

    run(scenario)


def test_a_row_that_changes_while_it_is_encoded_is_encoded_again() -> None:
    async def scenario(world: World) -> None:
        def fill() -> None:
            world.texts[1] = "changed"
            world.queue.add([1])

        await behind_a_first_batch(world, fill, [1])
        await until(lambda: world.stored[1][0] == content_digest("changed"))

    run(scenario)


def test_a_text_that_kills_the_worker_is_found_and_set_aside() -> None:
    async def scenario(world: World) -> None:
        rows = world.write(*range(1, 17))
        world.texts[7] = "poison"
        world.queue.add(rows)
        world.queue.start()
        await until(lambda: world.queue.poisoned == 1 and len(world.stored) == 15)
        assert 7 not in world.stored
        await until(lambda: world.queue.depth == (0, 0))
        assert world.embedder.batches.count(["poison"]) == 3
        world.texts[7] = "harmless"
        world.queue.add([7])
        await until(lambda: 7 in world.stored)

    run(scenario, replace(SETTINGS, batch_texts=16))


def test_a_query_that_kills_the_worker_is_refused_in_the_end() -> None:
    async def scenario(world: World) -> None:
        world.queue.start()
        for _ in range(6):
            await until(lambda: world.embedder.state == "ready")
            with pytest.raises(VectorsUnavailable):
                await world.queue.embed_query("poison")
        assert len(world.embedder.batches) == 3
        assert (await world.queue.embed_query("fine"))[0] == 4

    run(scenario)


def test_closing_fails_the_queries_that_wait_or_run() -> None:
    async def scenario(world: World) -> None:
        world.embedder.gate.clear()
        world.queue.start()
        running = asyncio.create_task(world.queue.embed_query("running"))
        await until(lambda: world.embedder.batches)
        waiting = asyncio.create_task(world.queue.embed_query("waiting"))
        await asyncio.sleep(0.01)
        await world.queue.close()
        for query in (running, waiting):
            with pytest.raises(VectorsUnavailable):
                await query
        with pytest.raises(VectorsUnavailable):
            await world.queue.embed_query("later")

    run(scenario)
