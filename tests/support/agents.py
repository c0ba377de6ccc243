"""A real agent process on a free port, and sockets that call it.

with running_orchestrator(tmp_path) as orchestrator, \\
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent:
    agent.succeed("add_fact", topic="trains", content="They run on rails.")
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from tests.support.process import PROJECT, Peer, free_port, wait_until
from tests.support.wire import Reply, decode_reply, encode, envelope, environment


class Agent:
    """The process of one program file. `ask` uses a connection of its own for each call."""

    def __init__(self, program: Path, port: int, environ: dict[str, str], folder: Path) -> None:
        self.program = program
        self.port = port
        self.environ = environ
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{port}"
        self.context: zmq.Context[Any] = zmq.Context()
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"Agent({self.program.name}, {self.address})"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def start(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        with (self.folder / f"{self.program.stem}.output").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(self.program)],
                env={**kept, "MEMORY_CONFIG": os.devnull, **self.environ},
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_state(self, state: str = "healthy", timeout_s: float = 60.0) -> None:
        """Return when this very process says that it is in this state."""

        def is_so() -> bool:
            assert self.process is not None and self.process.poll() is None, f"the agent ended: {self.output()}"
            with contextlib.suppress(TimeoutError):
                reply = self.ask("health_check", timeout_s=2.0)
                return bool(reply["pid"] == self.pid and reply["state"] == state)
            return False

        wait_until(is_so, f"{self} is {state}", timeout_s)

    def peer(self, *, dealer: bool = False, **options: int) -> Peer:
        return Peer(self.context, self.address, dealer=dealer, **options)

    def ask(
        self, action: str, around: dict[str, Any] | None = None, /, *, timeout_s: float = 30.0, **data: Any
    ) -> Reply:
        """A `v: 1` request with a new request_id; `around` overrides what stands beside the data."""
        return self.ask_raw(envelope(action, data, **(around or {})), timeout_s=timeout_s)

    def ask_raw(self, request: Any, encoding: str = "msgpack", *, timeout_s: float = 30.0) -> Reply:
        """A request as it is, and its reply in the same encoding."""
        with self.peer() as peer:
            peer.send(encode(request, encoding))
            return decode_reply(peer.receive(timeout_s), encoding)

    def succeed(self, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        reply = self.ask(action, around, **data)
        assert reply["status"] == "success", reply
        return reply

    def refused(self, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        """The error reply to a request that is expected to fail."""
        reply = self.ask(action, around, **data)
        assert reply["status"] == "error", reply
        return reply

    def output(self) -> str:
        """What the process wrote to stdout and stderr."""
        return (self.folder / f"{self.program.stem}.output").read_text(errors="replace")

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM and return the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def restart(self) -> None:
        """Kill it if it runs, and start it anew on the same port."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.start()
        self.wait_state()

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(30)
        self.context.destroy(linger=0)


@contextlib.contextmanager
def running_agent(
    tmp_path: Path, program: str | Path, orchestrator: str, *, port: int = 0, start: bool = True, **overrides: Any
) -> Iterator[Agent]:
    """An agent that uses the memory service at `orchestrator`, gone at the end; settings are given as section__key.

    `program`: one of agents/ ("knowledge_base"), on a free port; or a file, which listens on `port`.
    """
    if isinstance(program, str):
        port = free_port()
        overrides[f"agents__{program}__port"] = port
        program = PROJECT / "agents" / f"{program}_agent.py"
    environ = environment(tmp_path, {"agents__orchestrator": orchestrator, "agents__look_s": 0.2, **overrides})
    if not program.is_relative_to(PROJECT / "agents"):
        environ["PYTHONPATH"] = str(PROJECT)
    agent = Agent(program, port, environ, tmp_path)
    try:
        if start:
            agent.start()
            agent.wait_state()
        yield agent
    finally:
        agent.close()
