"""supervisord as the watch sees it: the list of its processes, and the signal that ends one that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import xmlrpc.client
from collections.abc import Mapping
from typing import Any, Final
from xml.parsers.expat import ExpatError

from memory_system.health.life import Process

CALL_S: Final = 2.0
_MAX_REPLY_BYTES: Final = 1024 * 1024
_URL_VARIABLE: Final = "SUPERVISOR_SERVER_URL"
_SOCKET_VARIABLE: Final = "MEMORY_SOCKET"


class SupervisorUnavailable(Exception):
    """supervisord did not answer, or refused; `is_gone` when there is nobody at its socket."""

    def __init__(self, reason: str, *, is_gone: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_gone = is_gone


class Supervisor:
    """Calls to supervisord over its unix socket, one connection each. All raise SupervisorUnavailable."""

    def __init__(self, path: str, timeout_s: float = CALL_S) -> None:
        self.path = path
        self._timeout_s = timeout_s

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str] = os.environ) -> Supervisor | None:
        """The supervisord that this program runs under, or None when it runs under none.

        supervisord names its socket to its children; scripts/pc2.py names it to everything it starts.
        """
        url = environ.get(_URL_VARIABLE, "")
        path = url.removeprefix("unix://") if url.startswith("unix://") else environ.get(_SOCKET_VARIABLE, "")
        return cls(path) if path else None

    def __repr__(self) -> str:
        return f"Supervisor({self.path!r})"

    async def processes(self) -> dict[str, Process]:
        """Every program by its name."""
        try:
            return {each["name"]: _process(each) for each in await self._call("supervisor.getAllProcessInfo")}
        except (KeyError, TypeError, ValueError):
            raise SupervisorUnavailable("its list of processes is not readable") from None

    async def kill(self, name: str, pid: int) -> bool:
        """SIGKILL the program if it still is that process; whether it was."""
        info = await self._call("supervisor.getProcessInfo", name)
        if not isinstance(info, dict) or info.get("pid") != pid:
            return False
        # The signal and nothing else: a process that is stopped ignores every other, and supervisor starts it again.
        await self._call("supervisor.signalProcess", f"{info['group']}:{info['name']}", "KILL")
        return True

    async def _call(self, method: str, *arguments: Any) -> Any:
        body = xmlrpc.client.dumps(arguments, method).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._post(body)
            values, _ = xmlrpc.client.loads(reply.partition(b"\r\n\r\n")[2])
        except TimeoutError:
            raise SupervisorUnavailable(f"no answer within {self._timeout_s:g} s") from None
        except OSError as error:
            gone = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            raise SupervisorUnavailable(error.strerror or type(error).__name__, is_gone=gone) from None
        except xmlrpc.client.Fault as fault:
            raise SupervisorUnavailable(fault.faultString) from None
        except (ExpatError, ValueError, xmlrpc.client.Error) as error:
            raise SupervisorUnavailable(f"not an answer of supervisord: {type(error).__name__}") from None
        return values[0]

    async def _post(self, body: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self.path, limit=_MAX_REPLY_BYTES)
        try:
            writer.write(b"POST /RPC2 HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
            return await _read_all(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side closes. Raises ValueError above the limit."""
    parts: list[bytes] = []
    size = 0
    while part := await reader.read(65_536):
        parts.append(part)
        size += len(part)
        if size > _MAX_REPLY_BYTES:
            raise ValueError("the reply is too long")
    return b"".join(parts)


def _process(info: Mapping[str, Any]) -> Process:
    return Process(
        statename=str(info["statename"]),
        pid=int(info["pid"]),
        start=int(info["start"]),
        exitstatus=int(info["exitstatus"]),
        spawnerr=str(info["spawnerr"]),
        age_s=max(0.0, float(info["now"]) - float(info["start"])),
    )
