"""A real scheduler process, and an orchestrator for it that keeps runs as the real one does, in memory.

with KeepingOrchestrator() as keeper, running_scheduler(tmp_path, keeper.port, decay="every 2s") as scheduler:
    scheduler.ask("list_jobs")
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq

from memory_system.protocol import error_reply
from memory_system.scheduler_settings import JobsSettings
from tests.contract.fake_orchestrator import FakeOrchestrator, Request, pack
from tests.support.process import PROJECT, Peer, free_port, wait_until
from tests.support.wire import Reply, encode, envelope, environment

JOBS = [name for name, _ in JobsSettings().items()]
Answers = list[tuple[float, bytes]]


class KeepingOrchestrator(FakeOrchestrator):
    """Does runs that take `takes_s`: one for a request_id, joined while it runs, replayed afterwards.

    `begun` counts how often each request_id was begun. `refusals`: error replies for the next runs asked for.
    """

    def __init__(self, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self.begun: Counter[str] = Counter()
        self.asked: list[Request] = []
        self.rows: list[dict[str, Any]] = []  # oldest first
        self.refusals: list[dict[str, Any]] = []
        super().__init__()
        self.default = self._answer

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    def note(self, job: str, request_id: str, state: str = "done", **fields: Any) -> None:
        """A run that is on record."""
        row = {"run_id": len(self.rows) + 1, "job": job, "request_id": request_id, "state": state, "dry_run": False}
        self.rows.append({**row, "started_at": time.time(), "finished_at": time.time(), "counts": {}, **fields})

    def fires(self, job: str) -> list[str]:
        """Request_ids of the scheduled runs of a job that were begun, one for each time."""
        start = f"scheduled-{job}-"
        return sorted(each for each in self.begun.elements() if each.startswith(start))

    def _answer(self, request: Request) -> Answers:
        if request["action"] == "list_runs":
            return [(0.0, self._list(request))]
        self.asked.append(request)
        if self.refusals:
            refusal = self.refusals.pop(0)
            code, retryable = refusal.pop("code"), refusal.pop("retryable", False)
            return [(0.0, pack(error_reply(code, code, retryable, refusal, request["request_id"])))]
        return [self._run(request)]

    def _list(self, request: Request) -> bytes:
        job = request["data"].get("job")
        now = time.time()
        rows = [self._seen(row, now) for row in reversed(self.rows) if job in (None, row["job"])]
        found = rows[: request["data"].get("limit", 20)]
        reply = {"status": "success", "request_id": request["request_id"], "results": found, "count": len(found)}
        return pack({**reply, "commit_seq": 0})

    def _seen(self, row: dict[str, Any], now: float) -> dict[str, Any]:
        return {**row, "state": "running", "finished_at": None} if row["finished_at"] > now else row

    def _run(self, request: Request) -> tuple[float, bytes]:
        request_id = request["request_id"]
        row = next((each for each in self.rows if each["request_id"] == request_id), None)
        known = row is not None
        if row is None:
            self.begun[request_id] += 1
            job, now = request["action"].removeprefix("run_"), time.time()
            self.note(job, request_id, started_at=now, finished_at=now + self.takes_s, counts={"promote": 2})
            row = self.rows[-1]
            row["dry_run"] = bool(request["data"].get("dry_run"))
            row["as_of"] = request["data"].get("as_of", now)
        fields = {name: row[name] for name in ("run_id", "job", "as_of", "dry_run", "counts") if name in row}
        times = {"started_at": row["started_at"], "finished_at": row["finished_at"]}
        reply = {"status": "success", "request_id": request_id, "commit_seq": 0, "changes": 2, **fields, **times}
        if known:
            reply["replayed"] = True
        return max(0.0, row["finished_at"] - time.time()), pack(reply)


class SchedulerProcess:
    """`memory_scheduler.py` on a free port. `code`: Python that runs before its main, to make it do wrong."""

    def __init__(self, folder: Path, environ: dict[str, str], port: int, code: str) -> None:
        self.environ = environ
        self.address = f"tcp://127.0.0.1:{port}"
        self._folder = folder
        self._code = code
        self._context: zmq.Context[Any] = zmq.Context()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self._folder / "logs" / "memory_scheduler.log").read_text()

    def start(self, *, wait: bool = True) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        main = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{self._code}\nimport memory_scheduler as m\n"
        command = (
            [sys.executable, "-c", main + "sys.exit(m.main([]))"]
            if self._code
            else [
                sys.executable,
                str(PROJECT / "memory_scheduler.py"),
            ]
        )
        with (self._folder / "scheduler.output").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**kept, "MEMORY_CONFIG": os.devnull, **self.environ},
                cwd=self._folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if wait:
            wait_until(self.answers, "the scheduler answers")

    def answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "scheduler.output").read_text()
        with contextlib.suppress(TimeoutError):
            return bool(self.ask("health_check", timeout_s=0.5)["pid"] == self.pid)
        return False

    def ask(self, action: str, *, timeout_s: float = 30.0, around: dict[str, Any] | None = None, **data: Any) -> Reply:
        with Peer(self._context, self.address) as peer:
            peer.send(encode(envelope(action, data, **(around or {})), "msgpack"))
            reply: Reply = msgpack.unpackb(peer.receive(timeout_s))
        return reply

    def ok(self, action: str, **data: Any) -> Reply:
        reply = self.ask(action, **data)
        assert reply["status"] == "success", reply
        return reply

    def job(self, name: str) -> dict[str, Any]:
        """What list_jobs says of one job."""
        found: dict[str, Any] = next(each for each in self.ok("list_jobs")["results"] if each["name"] == name)
        return found

    def state(self) -> str:
        return str(self.ok("health_check")["state"])

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def terminate(self) -> tuple[int, float]:
        """Send SIGTERM; the exit status, and how long it took."""
        assert self._process is not None
        began_s = time.monotonic()
        self._process.terminate()
        return self._process.wait(30), time.monotonic() - began_s

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)
        self._context.destroy(linger=0)


@contextlib.contextmanager
def running_scheduler(
    tmp_path: Path,
    orchestrator_port: int,
    *,
    start: bool = True,
    code: str = "",
    settings: dict[str, Any] | None = None,
    **triggers: str,
) -> Iterator[SchedulerProcess]:
    """A scheduler whose jobs are those of `triggers` alone: decay="every 2s", backup="cron 0 3 * * *"; no jitter."""
    port = free_port()
    chosen: dict[str, Any] = {f"scheduler__jobs__{name}__enabled": name in triggers for name in JOBS}
    for name, trigger in triggers.items():
        kind, _, text = trigger.partition(" ")
        chosen |= {f"scheduler__jobs__{name}__{kind}": text, f"scheduler__jobs__{name}__jitter_s": 0}
    ports = {"network__port": orchestrator_port, "scheduler__port": port}
    environ = environment(tmp_path, {**chosen, "scheduler__reset_timeout_s": 0.5, **ports, **(settings or {})})
    scheduler = SchedulerProcess(tmp_path, environ, port, code)
    try:
        if start:
            scheduler.start()
        yield scheduler
    finally:
        scheduler.close()
