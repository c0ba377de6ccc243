"""The worker process under faults: killed, hung, talkative, broken, orphaned. A scripted worker stands in where the
model itself does not matter."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from memory_system.embedding import WorkerEmbedder, child
from memory_system.errors import VectorsUnavailable
from memory_system.settings import EmbeddingSettings

ROOT = Path(__file__).resolve().parents[2]

SCRIPTED = """
import os, struct, sys, time
from array import array
from memory_system.embedding import frames

def receive():
    header = sys.stdin.buffer.read(4)
    if len(header) < 4:
        sys.exit(0)
    return frames.unpack(sys.stdin.buffer.read(frames.body_length(header)))

def send(message):
    sys.stdout.buffer.write(frames.pack(message))
    sys.stdout.buffer.flush()

model = receive()["model"]
if model == "broken":
    send({"error": "embedding.model: no such model"})
    sys.exit(1)
if model == "crash":
    os.abort()
if model == "mute":
    time.sleep(1000)
send({"model_id": "scripted", "dimension": 2, "max_tokens": 8, "threads": 1, "backend": "script", "device": "cpu"})
while True:
    request = receive()
    text = request["texts"][0]
    if text == "die":
        os._exit(3)
    if text == "hang":
        time.sleep(1000)
    if text == "garbage":
        sys.stdout.buffer.write(b"\\xff" * 64)
        sys.stdout.buffer.flush()
        time.sleep(1000)
    if text == "fail":
        send({"id": request["id"], "error": "ValueError while encoding"})
        continue
    if text == "shout":
        sys.stderr.write("x" * 5000 + "\\nlast words")
        sys.stderr.flush()
    lengths = [float(len(text)) for text in request["texts"]]
    send({"id": request["id"], "vectors": array("f", [v for n in lengths for v in (n, 0.0)]).tobytes()})
"""

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def with_loop(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
            runner.run(scenario)

    return with_loop


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., WorkerEmbedder]:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPTED)
    monkeypatch.setattr(child, "_command", lambda: [sys.executable, "-P", str(script)])

    def make(**settings: Any) -> WorkerEmbedder:
        return WorkerEmbedder(EmbeddingSettings(**settings))

    return make


async def until(condition: Callable[[], object], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to read its exit code does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def fails_then_recovers(embedder: WorkerEmbedder, text: str) -> None:
    states: list[str] = []
    embedder.on_state(states.append)
    await embedder.start()
    try:
        await until(lambda: embedder.state == "ready")
        first = embedder.pid
        with pytest.raises(VectorsUnavailable):
            await embedder.encode([text])
        await until(lambda: embedder.state == "ready" and embedder.pid != first)
        assert (await embedder.encode(["abc"]))[0][0] == 3.0
        assert states == ["ready", "down", "starting", "ready"]
        assert first is not None and not alive(first)
    finally:
        await embedder.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("text", ["die", "hang", "garbage"])
def test_a_lost_worker_fails_the_call_and_is_replaced(
    run: Run, scripted: Callable[..., WorkerEmbedder], text: str
) -> None:
    run(fails_then_recovers(scripted(encode_timeout_s=5.0), text))


@pytest.mark.timeout(180)
def test_a_text_that_fails_leaves_the_worker_alone(run: Run, scripted: Callable[..., WorkerEmbedder]) -> None:
    async def scenario() -> None:
        embedder = scripted()
        await embedder.start()
        await until(lambda: embedder.state == "ready")
        pid = embedder.pid
        with pytest.raises(VectorsUnavailable, match="ValueError"):
            await embedder.encode(["fail"])
        assert (await embedder.encode(["ab", "c"]))[:, 0].tolist() == [2.0, 1.0]
        assert embedder.pid == pid and embedder.state == "ready"
        await embedder.close()
        assert pid is not None and not alive(pid)

    run(scenario())


@pytest.mark.timeout(180)
def test_texts_are_cut_before_they_are_sent(run: Run, scripted: Callable[..., WorkerEmbedder]) -> None:
    async def scenario() -> None:
        embedder = scripted(max_chars=10)
        await embedder.start()
        await until(lambda: embedder.state == "ready")
        assert (await embedder.encode(["x" * 500]))[0][0] == 10.0
        await embedder.close()

    run(scenario())


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("model", "reason"), [("broken", "no such model"), ("crash", "ended while it loaded"), ("mute", "did not load")]
)
def test_a_model_that_cannot_be_loaded_is_named_and_tried_again(
    run: Run, scripted: Callable[..., WorkerEmbedder], model: str, reason: str
) -> None:
    async def scenario() -> None:
        embedder = scripted(model=model, start_timeout_s=1.0 if model == "mute" else 60.0)
        states: list[str] = []
        embedder.on_state(states.append)
        await embedder.start()
        await until(lambda: embedder.state == "down")
        assert reason in str(embedder.reason)
        with pytest.raises(VectorsUnavailable, match=reason):
            await embedder.encode(["text"])
        await until(lambda: "starting" in states)
        await embedder.close()

    run(scenario())


@pytest.mark.timeout(180)
def test_what_the_worker_writes_to_stderr_is_logged_whole_in_bounded_lines(
    run: Run, scripted: Callable[..., WorkerEmbedder], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        embedder = scripted()
        await embedder.start()
        await until(lambda: embedder.state == "ready")
        await embedder.encode(["shout"])
        await embedder.close()

    with caplog.at_level(logging.WARNING, logger="memory_system"):
        run(scenario())
    events = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    lines = [event["line"] for event in events if event["event"] == "embedding_worker_stderr"]
    assert sum(line.count("x") for line in lines) == 5000
    assert max(map(len, lines)) <= 2000
    assert lines[-1] == "last words"


@pytest.mark.timeout(180)
def test_closing_ends_a_worker_that_still_loads(run: Run) -> None:
    async def scenario() -> None:
        embedder = WorkerEmbedder(EmbeddingSettings())
        spawned: list[int] = []
        spawn = child.WorkerProcess.spawn

        async def recorded(settings: EmbeddingSettings) -> child.WorkerProcess:
            worker = await spawn(settings)
            spawned.append(worker.pid)
            return worker

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(child.WorkerProcess, "spawn", recorded)
            await embedder.start()
            await until(lambda: spawned)
            await embedder.close()
        assert not alive(spawned[0])

    run(scenario())


@pytest.mark.timeout(240)
def test_the_real_worker_comes_back_after_kill_9_in_mid_call() -> None:
    async def scenario() -> None:
        embedder = WorkerEmbedder(EmbeddingSettings())
        await embedder.start()
        try:
            await until(lambda: embedder.state == "ready", within_s=110)
            pid = embedder.pid
            assert pid is not None
            call = asyncio.create_task(embedder.encode(["word " * 400] * 64))
            await asyncio.sleep(0.2)
            assert not call.done()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(VectorsUnavailable):
                await call
            assert embedder.model_id == "all-MiniLM-L6-v2:53aa5117"
            await until(lambda: embedder.state == "ready" and embedder.pid != pid, within_s=110)
            assert (await embedder.encode(["text"])).shape == (1, 384)
        finally:
            await embedder.close()

    asyncio.run(scenario())


ORPHAN = """
import asyncio, sys
from memory_system.embedding import child
from memory_system.settings import EmbeddingSettings

async def main():
    worker = await child.WorkerProcess.spawn(EmbeddingSettings())
    print(worker.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_worker_ends_with_a_killed_parent_even_while_it_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # Long enough for the worker to ask for the signal; the model takes seconds more.
        time.sleep(1.5)
        assert alive(pid)
        parent.kill()
    asyncio.run(until(lambda: not alive(pid), within_s=10))


def worker_alone(tmp_path: Path, parent: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "memory_system.embedding.worker", "--parent", str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.timeout(180)
def test_the_worker_ends_quietly_at_the_end_of_its_pipe(tmp_path: Path) -> None:
    with worker_alone(tmp_path, os.getpid()) as worker:
        assert worker.communicate(timeout=90) == (b"", b"")
    assert worker.returncode == 0


@pytest.mark.timeout(180)
def test_the_worker_of_a_parent_that_is_gone_ends_at_once(tmp_path: Path) -> None:
    with worker_alone(tmp_path, parent=2**22 + 1) as worker:
        assert worker.wait(timeout=90) == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_print_no_traceback(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with worker_alone(tmp_path, os.getpid()) as worker:
        status = Path(f"/proc/{worker.pid}/status")
        # The worker is past its first statement once it ignores SIGINT (bit 1 of SigIgn).
        asyncio.run(until(lambda: int(status.read_text().split("SigIgn:")[1].split()[0], 16) & 2))
        worker.send_signal(number)
        assert worker.communicate(timeout=90) == (b"", b"")
    assert worker.returncode == code


@pytest.mark.timeout(180)
def test_a_directory_that_holds_no_model_is_a_clear_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        embedder = WorkerEmbedder(EmbeddingSettings(model=str(tmp_path)))
        await embedder.start()
        await until(lambda: embedder.state == "down", within_s=60)
        assert "no weights" in str(embedder.reason)
        await embedder.close()

    asyncio.run(scenario())
