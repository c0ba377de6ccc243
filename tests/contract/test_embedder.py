"""What every embedder does, checked on the stub and on the worker with the real model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest

from memory_system.embedding import Embedder, make_embedder
from memory_system.errors import ConfigError, VectorsUnavailable
from memory_system.settings import EmbeddingSettings

TEXTS = [
    "Melanie signed up for a pottery class.",
    "",
    "\x00",
    "ünïcödé 🙂 текст",
    "word " * 3000,
    "a",
    "Melanie signed up for a pottery class.",
]


async def ready(embedder: Embedder, within_s: float = 110.0) -> None:
    deadline = time.monotonic() + within_s
    while embedder.state != "ready":
        assert time.monotonic() < deadline, embedder.reason
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module", params=["stub", "sentence-transformers"])
def loop_and_embedder(request: pytest.FixtureRequest) -> Iterator[tuple[asyncio.Runner, Embedder]]:
    with asyncio.Runner() as runner:
        embedder = make_embedder(EmbeddingSettings(provider=request.param))
        runner.run(embedder.start())
        runner.run(ready(embedder))
        yield runner, embedder
        runner.run(embedder.close())


@pytest.mark.timeout(150)
class TestReadyEmbedder:
    def test_names_its_model_and_dimension(self, loop_and_embedder: tuple[asyncio.Runner, Embedder]) -> None:
        _, embedder = loop_and_embedder
        assert embedder.model_id in ("stub-64", "all-MiniLM-L6-v2:53aa5117")
        assert embedder.dimension == (64 if embedder.model_id == "stub-64" else 384)
        assert embedder.reason is None

    def test_gives_unit_rows_in_the_order_of_the_texts(
        self, loop_and_embedder: tuple[asyncio.Runner, Embedder]
    ) -> None:
        runner, embedder = loop_and_embedder
        vectors = runner.run(embedder.encode(TEXTS))
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(TEXTS), embedder.dimension)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
        alone = np.vstack([runner.run(embedder.encode([text])) for text in TEXTS])
        # Padding in a batch moves the last digits only.
        assert np.allclose((vectors * alone).sum(axis=1), 1.0, atol=1e-4)
        assert np.allclose(vectors[0], vectors[-1], atol=1e-4)

    def test_takes_no_texts_for_no_rows(self, loop_and_embedder: tuple[asyncio.Runner, Embedder]) -> None:
        runner, embedder = loop_and_embedder
        assert runner.run(embedder.encode([])).shape == (0, embedder.dimension)

    def test_puts_kin_nearer_than_strangers(self, loop_and_embedder: tuple[asyncio.Runner, Embedder]) -> None:
        runner, embedder = loop_and_embedder
        hike, hiking, tax = runner.run(
            embedder.encode(
                ["We hiked in the mountains", "Hiking mountains on Sunday", "The invoice includes a 20 % tax"]
            )
        )
        assert hike @ hiking > 0.4 > hike @ tax

    def test_serves_many_callers_at_once(self, loop_and_embedder: tuple[asyncio.Runner, Embedder]) -> None:
        runner, embedder = loop_and_embedder

        async def crowd() -> bool:
            texts = [f"text number {number}" for number in range(12)]
            together = await asyncio.gather(*(embedder.encode([text]) for text in texts))
            return np.allclose(np.vstack(together), await embedder.encode(texts), atol=1e-3)

        assert runner.run(crowd())

    def test_survives_a_call_that_is_given_up(self, loop_and_embedder: tuple[asyncio.Runner, Embedder]) -> None:
        runner, embedder = loop_and_embedder

        async def give_up() -> None:
            waiting = asyncio.create_task(embedder.encode(["word " * 300] * 4))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            (after,) = await embedder.encode(["a cat"])
            (again,) = await embedder.encode(["a cat"])
            assert np.allclose(after, again)

        runner.run(give_up())


@pytest.mark.parametrize("provider", ["stub", "sentence-transformers"])
def test_an_embedder_that_is_not_started_or_closed_has_no_vectors(provider: str) -> None:
    async def scenario() -> None:
        embedder = make_embedder(EmbeddingSettings(provider=provider))
        assert embedder.state == "starting"
        with pytest.raises(VectorsUnavailable):
            await embedder.encode(["text"])
        seen: list[str] = []
        embedder.on_state(seen.append)
        await embedder.start()
        await embedder.close()
        await embedder.close()
        assert embedder.state == "down" and embedder.reason
        assert seen[-1] == "down"
        with pytest.raises(VectorsUnavailable):
            await embedder.encode(["text"])

    asyncio.run(scenario())


def test_off_never_has_vectors() -> None:
    async def scenario() -> None:
        embedder = make_embedder(EmbeddingSettings(provider="off"))
        await embedder.start()
        assert embedder.state == "off" and embedder.model_id is None and embedder.dimension is None
        with pytest.raises(VectorsUnavailable):
            await embedder.encode(["text"])
        await embedder.close()

    asyncio.run(scenario())


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embedding\.provider"):
        make_embedder(EmbeddingSettings(provider="cloud"))
