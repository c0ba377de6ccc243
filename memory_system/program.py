"""What the main of every program shares: its command line, settings, log, event loop and exit status.

    if __name__ == "__main__":
        sys.exit(run_program("planner", "Plans journeys.", serve))

where `serve` is `async def serve(settings: Settings) -> int`.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from memory_system import log
from memory_system.allocator import use_few_arenas
from memory_system.connection_guard import guarding
from memory_system.errors import ConfigError, MemorySystemError
from memory_system.security import check_bind
from memory_system.settings import Settings, load_settings

Serve = Callable[[Settings], Awaitable[int]]

_WANTED_FILES: Final = 16_384
_FEW_FILES: Final = 4096
_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run_program(name: str, description: str, serve: Serve, arguments: Sequence[str] | None = None) -> int:
    """Load the settings, set up the log `<name>.log`, run `serve` on an event loop (uvloop where installed).

    Returns the exit status: what `serve` returned, 1 for what stands in the way of a start, 2 for a bad configuration;
    the reason is one line on stderr. What is no error of this project comes out as it is.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
        check_bind(settings.network, settings.security)
        log.configure(name, settings.log)
    except ConfigError as error:
        sys.stderr.write(f"{name}: {error.message}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{name}: log.dir {settings.log.dir} cannot be written: {error.strerror}\n")
        return 2
    use_few_arenas()
    _raise_file_limit(name)
    try:
        with guarding(settings.limits.connection_memory_mb):
            return _run(serve, settings)
    except MemorySystemError as error:
        log.get_logger(name).critical("cannot_start", reason=error.message)
        sys.stderr.write(f"{name}: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1


def ends(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; the program may set it as well."""
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    return end


def listen_address(bind: str, port: int) -> str:
    """The endpoint to bind: `tcp://127.0.0.1:7140`, `tcp://[::1]:7140`."""
    return f"tcp://{_host('127.0.0.1' if bind == 'localhost' else bind)}:{port}"


def connect_address(bind: str, port: int) -> str:
    """The endpoint at which a program of this host reaches what listens on `bind`."""
    plain = bind.strip("[]")
    return listen_address(_EVERY_ADDRESS.get(plain, plain), port)


def _host(bind: str) -> str:
    return f"[{bind}]" if ":" in bind and not bind.startswith("[") else bind


def _run(serve: Serve, settings: Settings) -> int:
    async def main() -> int:
        return await serve(settings)

    try:
        import uvloop
    except ImportError:  # not built for every platform; asyncio's own loop is slower, nothing else
        return asyncio.run(main())
    return uvloop.run(main())


def _raise_file_limit(name: str) -> None:
    """Each connection costs a file; take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _FEW_FILES:
        hint = "raise `ulimit -n`: each client connection needs a file"
        log.get_logger(name).warning("few_files", limit=wanted, hint=hint)
