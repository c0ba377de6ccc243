"""The pure parts of embedding: frames, batch sizes, turns, strikes, the stub's words, finding a model."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.digest import content_digest
from memory_system.embedding import StubEmbedder, encoders, frames, model
from memory_system.embedding.backlog import RowBacklog
from memory_system.embedding.pace import Pace, cost
from memory_system.embedding.strikes import STRIKES, Strikes
from memory_system.errors import ConfigError


@given(st.lists(st.text(max_size=50), max_size=10))
def test_frames_carry_any_text(texts: list[str]) -> None:
    frame = frames.pack({"texts": texts})
    header, body = frame[: frames.HEADER.size], frame[frames.HEADER.size :]
    assert frames.body_length(header) == len(body)
    assert frames.unpack(body) == {"texts": texts}


def test_frames_refuse_what_is_none() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        frames.body_length(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="not a map"):
        frames.unpack(b"\x93\x01\x02\x03")
    assert frames.unpack(frames.pack({"text": "\ud800"})[4:]) == {"text": "?"}


def test_a_digest_has_16_bytes_and_depends_on_every_character() -> None:
    assert len(content_digest("")) == 16
    assert content_digest("a") != content_digest("a ")


class TestPace:
    def test_sizes_batches_by_the_measured_speed(self) -> None:
        pace = Pace(batch_ms=100, batch_texts=32)
        texts = ["x" * 50] * 64
        for _ in range(50):
            pace.measured(texts[:10], duration_s=0.05)
        assert pace.fitting(texts) == pytest.approx(20, abs=1)
        for _ in range(50):
            pace.measured(texts[:10], duration_s=1.0)
        assert pace.fitting(texts) == 1

    def test_stays_within_one_and_batch_texts(self) -> None:
        pace = Pace(batch_ms=100, batch_texts=4)
        assert pace.fitting([]) == 0
        assert pace.fitting(["x" * 100_000]) == 1
        pace.measured(["x"], duration_s=0.0)
        assert pace.fitting([""] * 10) == 4

    def test_counts_only_what_a_model_reads_of_a_long_text(self) -> None:
        assert cost("x" * 5000) == cost("x" * 50_000)


class TestRowBacklog:
    def test_keeps_each_row_once_and_forgets_discarded_ones(self) -> None:
        backlog = RowBacklog(0.25)
        backlog.backfill([1, 2, 3])
        backlog.add([2, 9, 9])
        assert backlog.depth == (2, 2)
        backlog.discard([9, 3])
        backlog.add([9])
        taken = [backlog.take(10), backlog.take(10)]
        assert [batch.row_ids for batch in taken if batch] == [(9, 2), (1,)]
        assert backlog.take(10) is None

    def test_suspects_go_in_halves_and_never_with_others(self) -> None:
        backlog = RowBacklog(1.0)
        backlog.split([1, 2, 3])
        backlog.add([2, 7])
        backlog.backfill([3])
        batches = []
        while (batch := backlog.take(10)) is not None:
            batches.append((batch.row_ids, batch.origin))
        assert batches == [((1, 2), "suspect"), ((3,), "suspect"), ((7,), "fresh")]

    def test_what_is_put_back_keeps_its_kind(self) -> None:
        backlog = RowBacklog(0.25)
        for row, origin in ((1, "fresh"), (2, "backfill"), (3, "suspect")):
            backlog.put_back([row], origin)  # type: ignore[arg-type]
        assert backlog.depth == (1, 2)
        backlog.discard([3])
        assert backlog.depth == (1, 1)

    @given(
        st.lists(
            st.tuples(st.sampled_from(["add", "backfill", "discard", "split"]), st.lists(st.integers(1, 8), max_size=4))
        )
    )
    def test_never_gives_a_row_twice(self, steps: list[tuple[str, list[int]]]) -> None:
        backlog = RowBacklog(0.25)
        expected: set[int] = set()
        for name, rows in steps:
            if name == "split":
                rows = [row for row in set(rows) if row not in expected]
            getattr(backlog, name)(rows)
            expected = expected - set(rows) if name == "discard" else expected | set(rows)
        assert len(backlog) == len(expected)
        given_rows: list[int] = []
        while (batch := backlog.take(3)) is not None:
            given_rows.extend(batch.row_ids)
        assert sorted(given_rows) == sorted(expected)


class TestStrikes:
    def test_only_failures_on_its_own_strike_a_text_out(self) -> None:
        strikes = Strikes()
        for _ in range(10):
            strikes.failed([b"a", b"b"])
        assert strikes.suspected(b"a") and not strikes.out(b"a")
        for _ in range(STRIKES):
            strikes.failed([b"a"])
        assert strikes.out(b"a")
        strikes.passed([b"b"])
        assert not strikes.suspected(b"b")

    def test_remembers_a_bounded_number(self) -> None:
        strikes = Strikes()
        strikes.failed([number.to_bytes(4) for number in range(10_000)])
        assert not strikes.suspected((0).to_bytes(4)) and strikes.suspected((9_999).to_bytes(4))


def test_the_stub_is_the_same_in_every_process_and_of_any_dimension() -> None:
    async def encode(dimension: int) -> np.ndarray:
        stub = StubEmbedder(dimension)
        await stub.start()
        return await stub.encode(["The quick brown fox", "quick foxes", "slow turtles"])

    vectors = asyncio.run(encode(64))
    assert np.allclose(vectors[0][:4], [0.14356, 0.14554, -0.08619, -0.19433], atol=1e-4)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    assert asyncio.run(encode(700)).shape == (3, 700)


@pytest.mark.parametrize(("cpus", "torch", "ctranslate2"), [(1, 1, 1), (2, 1, 2), (4, 2, 4), (8, 4, 4), (64, 4, 4)])
def test_automatic_threads_by_processors(cpus: int, torch: int, ctranslate2: int) -> None:
    assert encoders.threads(0, cpus) == encoders.Threads(torch, ctranslate2)


def test_a_number_of_threads_that_is_given_holds() -> None:
    assert encoders.threads(3, 64) == encoders.Threads(3, 3)


class TestResolve:
    def test_a_directory_is_taken_first_and_named_by_its_weights(self, tmp_path: Path) -> None:
        directory = tmp_path / "my-model"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"weights")
        source = model.resolve(str(directory))
        assert source.directory == directory and source.name == "my-model"
        assert source.weights_sha256 == hashlib.sha256(b"weights").hexdigest()

    @pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
    def test_an_installed_package_carries_the_default_model(self, name: str) -> None:
        source = model.resolve(name)
        assert source.name == "all-MiniLM-L6-v2"
        assert source.directory is not None
        assert str(source.weights_sha256).startswith("53aa5117")

    def test_a_package_with_other_weights_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "forged_carrier"
        (package / "model").mkdir(parents=True)
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(model.CARRIERS, "forged", model.Carrier("forged_carrier", "model", "00" * 32))
        with pytest.raises(ConfigError, match=r"has no file model/model\.safetensors"):
            model.resolve("forged")
        (package / "model" / "model.safetensors").write_bytes(b"other")
        with pytest.raises(ConfigError, match="official weights"):
            model.resolve("forged")
        assert "forged_carrier" not in sys.modules

    def test_a_missing_package_leaves_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(model.CARRIERS, "absent", model.Carrier("no_such_package_here", "model", "00" * 32))
        assert model.resolve("absent") == model.Source("absent", None, None)
        assert model.resolve("owner/some-model").directory is None

    @pytest.mark.parametrize("name", ["/no/such/directory", "./models/mine", "..", "", "a b", "~/nowhere/at/all"])
    def test_what_is_neither_directory_nor_name_is_a_clear_error(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"embedding\.model"):
            model.resolve(name)
