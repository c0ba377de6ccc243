"""The systems of the benchmark of peers: their environments, and their processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

PROJECT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = PROJECT / "bench" / "peers"
OURS: Final = "this service"
# System -> module in bench/peers/.
MODULES: Final = {
    OURS: "memory_service",
    "mem0": "mem0_store",
    "chroma": "chroma_store",
    "lancedb": "lancedb_store",
}
PEERS: Final = tuple(name for name in MODULES if name != OURS)
STOP_S: Final = 20.0


class PeerFailure(Exception):
    """A system could not be installed, or failed at a command."""


def environment(name: str, say: Callable[[str], None]) -> Path:
    """The Python of a system's virtual environment, which is made when its requirements have changed."""
    requirements = FOLDER / f"requirements-{name}.txt"
    folder = PROJECT / "data" / "peers" / name
    stamp, wanted = folder / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    python = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {requirements.name} into {folder} (torch is large)")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*install, *shlex.split(os.environ.get("PIP_ARGS", "")), "-r", str(requirements)],
    ):
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise PeerFailure(f"{name}: {shlex.join(command)} failed")
    stamp.write_text(wanted)
    return python


class System:
    """A process that holds one system. Use as a context manager: it ends with the block."""

    def __init__(self, name: str, python: Path, model: str, folder: Path, threads: int | None = None) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        environ = {key: value for key, value in os.environ.items() if not key.startswith("MEMORY")}
        # The weights are here, and nothing else is looked for anywhere.
        environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if threads is not None and name != OURS:
            environ["OMP_NUM_THREADS"] = str(threads)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), str(FOLDER / "host.py"), MODULES[name], model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
                cwd=folder,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something and wait for the answer. Raises PeerFailure."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text("utf-8", "replace").strip().splitlines()[-1:] or ["it printed nothing"]
            raise PeerFailure(f"{self.name} ended at {do}: {words[0]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailure(f"{self.name} failed at {do}: {answer['error']}")
        return answer
