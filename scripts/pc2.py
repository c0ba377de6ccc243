"""Starts, stops and shows the programs of host PC2: `pc2.py start | stop | status | logs`.

The programs run under supervisord with config/supervisord.conf. Run-time files live in data/run (MEMORY_RUN_DIR names
another folder). Exit status: 0 done, 1 failed, 2 the configuration is refused, 3 (status only) not running.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from supervision import (
    POLL_S,
    PROJECT,
    SUPERVISOR_CONFIG,
    Deployment,
    Failure,
    RunDir,
    ask_health,
    check_port,
    is_healthy,
    last_words,
    shut_down,
)

from memory_system.errors import ConfigError
from memory_system.settings import CONFIG_VARIABLE, config_file, load_settings

START_S: Final = 60.0
GIVEN_UP: Final = frozenset({"EXITED", "FATAL", "STOPPED", "UNKNOWN"})
NOT_RUNNING: Final = 3
HEADINGS: Final = ("PROGRAM", "ADDRESS", "STATE", "PID", "UPTIME", "NOTE")


def launch(run: RunDir, deployment: Deployment) -> None:
    """Start supervisord in the background; it starts the programs."""
    try:
        Path(deployment.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"log.dir {deployment.log_dir} cannot be used: {error.strerror}; set it to a writable folder"
        ) from None
    deployment.store(run.deployment)
    environ = dict(os.environ)
    environ.update(
        MEMORY_RUN_DIR=str(run.path),
        MEMORY_LOG_DIR=deployment.log_dir,
        MEMORY_SOCKET=str(run.socket),
        MEMORY_PYTHON=sys.executable,
    )
    if environ.get(CONFIG_VARIABLE):
        environ[CONFIG_VARIABLE] = deployment.config
    # Without a named user supervisord complains to root on every start.
    user = ["-u", "root"] if os.getuid() == 0 else []
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(SUPERVISOR_CONFIG), *user]
    done = subprocess.run(command, env=environ, cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        told = [line for line in lines if line.startswith("Error:")] or lines[-1:]
        raise Failure(f"supervisord did not start: {told[0]}")


def revive(run: RunDir) -> None:
    """Start again what supervisord has given up on."""
    for name, info in run.processes().items():
        if is_given_up(info):
            # Its start may fail at once, or supervisord may have been faster: the wait for health tells.
            with contextlib.suppress(xmlrpc.client.Fault):
                run.call("startProcess", name, False)


def wait_healthy(
    run: RunDir, deployment: Deployment, deadline: float, seen_bytes: Mapping[str, int], *, restarts: bool
) -> None:
    """Return when every program answers; raise Failure at the deadline, or as soon as one is given up.

    Without `restarts` the first exit of a program counts, otherwise only supervisord's last word on it.
    `seen_bytes` is the size of each console log before the start: what follows is quoted.
    """
    waiting, first_pids = dict(deployment.addresses), dict[str, int]()
    while True:
        if run.supervisor_pid() is None:
            raise Failure(f"supervisord ended; see {deployment.log_dir}")
        for name, info in run.processes().items():
            if name not in waiting:
                continue
            if is_given_up(info) if restarts else has_exited(info, first_pids):
                raise Failure(f"{name} did not start: {last_words(deployment.console_log(name), seen_bytes[name])}")
            if is_healthy(ask_health(waiting[name], timeout_ms=300), info["pid"]):
                del waiting[name]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise Failure(f"{', '.join(waiting)}: not healthy in time; see {deployment.log_dir}")
        time.sleep(POLL_S)


def is_given_up(info: Mapping[str, Any]) -> bool:
    """Whether supervisord will not start this program again by itself."""
    return info["statename"] in GIVEN_UP


def has_exited(info: Mapping[str, Any], first_pids: dict[str, int]) -> bool:
    """Whether the program ended since the first look; supervisord may have started it again meanwhile."""
    if info["pid"]:
        first_pids.setdefault(info["name"], info["pid"])
    return is_given_up(info) or info["statename"] == "BACKOFF" or info["pid"] != first_pids.get(info["name"], 0)


def rows(run: RunDir, deployment: Deployment) -> Iterator[tuple[str, ...]]:
    processes = run.processes()
    for name, address in deployment.addresses.items():
        info = processes.get(name, {})
        reply = ask_health(address)
        if reply is not None and is_healthy(reply, info.get("pid", 0)):
            note = ", ".join(f"{part} {state}" for part, state in dict(reply.get("readiness") or {}).items())
            yield name, address.shown, reply["state"], str(info["pid"]), uptime(reply.get("uptime_s", 0)), note
        else:
            state = str(info.get("statename", "unknown")).lower()
            state = "no answer" if state == "running" else state
            yield name, address.shown, state, str(info.get("pid") or "-"), "-", info.get("spawnerr", "")


def uptime(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s" if minutes else f"{whole} s"


def print_table(run: RunDir, deployment: Deployment) -> bool:
    """Print one row for each program; returns whether all are healthy."""
    table = [HEADINGS, *rows(run, deployment)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADINGS))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return all(row[4] != "-" for row in table[1:])


def start(timeout_s: float) -> int:
    run = RunDir(os.environ)
    deadline = time.monotonic() + timeout_s
    with run.lock():
        running = run.supervisor_pid()
        if running is not None:
            deployment = Deployment.stored(run.deployment)
            seen_bytes = deployment.console_sizes()
            revive(run)
            wait_healthy(run, deployment, deadline, seen_bytes, restarts=True)
        else:
            deployment = first_start(run, deadline)
    if running is not None and os.environ.get(CONFIG_VARIABLE):
        wanted = str(config_file(None, os.environ))
        if wanted != deployment.config:
            print(f"already running with {deployment.config}: stop it first to use {wanted}", file=sys.stderr)
    wait_loaded(deployment, deadline)
    print_table(run, deployment)
    return 0


def wait_loaded(deployment: Deployment, deadline: float) -> None:
    """Give what is still loading, the embedding model above all, time to become ready; the table says what is not."""
    told = False
    for name, address in deployment.addresses.items():
        while (ask_health(address) or {}).get("state") == "starting" and time.monotonic() < deadline:
            if not told:
                print(f"{name} answers; waiting for the embedding model ...", file=sys.stderr)
                told = True
            time.sleep(POLL_S)


def first_start(run: RunDir, deadline: float) -> Deployment:
    """Check what can be checked, start everything, wait; leaves nothing behind when that fails."""
    deployment = Deployment.planned(load_settings(), config_file(None, os.environ))
    for address in deployment.addresses.values():
        check_port(address)
    seen_bytes = deployment.console_sizes()
    print(f"starting {', '.join(deployment.addresses)} ...", file=sys.stderr)
    try:
        launch(run, deployment)
        wait_healthy(run, deployment, deadline, seen_bytes, restarts=False)
    except (Failure, KeyboardInterrupt):
        pid = run.supervisor_pid()
        if pid is not None:
            shut_down(run, pid)
        raise
    return deployment


def tell_not_running() -> bool:
    """Say so; and whether a program answers all the same, as one does whose supervisord was killed."""
    planned = Deployment.planned(load_settings(), config_file(None, os.environ))
    left = [(name, address, ask_health(address)) for name, address in planned.addresses.items()]
    for name, address, reply in left:
        if reply is not None:
            print(f"not under supervisord, but {name} answers at {address.shown}: pid {reply.get('pid', '?')}; kill it")
    orphaned = any(reply is not None for _, _, reply in left)
    if not orphaned:
        print("not running")
    return orphaned


def stop() -> int:
    run = RunDir(os.environ)
    with run.lock():
        pid = run.supervisor_pid()
        if pid is None:
            return 1 if tell_not_running() else 0
        shut_down(run, pid)
    print("stopped")
    return 0


def status() -> int:
    run = RunDir(os.environ)
    if run.supervisor_pid() is None:
        tell_not_running()
        return NOT_RUNNING
    return 0 if print_table(run, Deployment.stored(run.deployment)) else 1


def logs() -> int:
    """Follow the log files; replaces this process."""
    run = RunDir(os.environ)
    running = run.supervisor_pid() is not None
    folder = Deployment.stored(run.deployment).log_dir if running else load_settings().log.dir
    files = sorted(str(path) for path in Path(folder).glob("*.log"))
    if not files:
        raise Failure(f"no logs yet in {folder}")
    os.execvp("tail", ["tail", "-n", "20", "-F", *files])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start, stop and show the programs of host PC2.")
    parser.add_argument("command", choices=("start", "stop", "status", "logs"))
    parser.add_argument("--timeout", type=float, default=START_S, metavar="S", help="start: longest wait, in seconds")
    options = parser.parse_args(arguments)
    commands = {"start": lambda: start(options.timeout), "stop": stop, "status": status, "logs": logs}
    try:
        return commands[options.command]()
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except (Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
