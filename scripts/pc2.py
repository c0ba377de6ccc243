"""Starts, stops and shows the programs of host PC2: `pc2.py start | stop | status | logs | run | wait`.

The programs run under supervisord with config/supervisord.conf; `run` is supervisord in the foreground, and `wait`
waits for what it starts. Run-time files live in data/run (MEMORY_RUN_DIR names another folder). Exit status: 0 done,
1 failed, 2 the configuration is refused, 3 (status only) not running.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import orphans
from output import put
from status_table import ask_manager, rows, shown
from supervision import (
    POLL_S,
    PROJECT,
    Deployment,
    Failure,
    RunDir,
    ask_health,
    check_ports,
    did_not_start,
    is_alive,
    is_healthy,
    ports,
    shut_down,
)

from memory_system.deployment import SUPERVISOR_CONFIG
from memory_system.errors import ConfigError, MemorySystemError
from memory_system.keys import KEY_FILE_VARIABLE
from memory_system.security import check_bind
from memory_system.settings import CONFIG_VARIABLE, Settings, config_file, load_settings
from memory_system.storage.database import lock_store

START_S: Final = 60.0
GIVEN_UP: Final = frozenset({"EXITED", "FATAL", "STOPPED", "UNKNOWN"})
NOT_RUNNING: Final = 3
INTERRUPTED: Final = 130


def environment(run: RunDir, deployment: Deployment) -> dict[str, str]:
    """Make ready what supervisord needs; returns its environment."""
    try:
        Path(deployment.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"log.dir {deployment.log_dir} cannot be used: {error.strerror}; set it to a writable folder"
        ) from None
    deployment.store(run.deployment)
    # Each program has a key of its own; the one named there is the operator's.
    environ = {name: value for name, value in os.environ.items() if name != KEY_FILE_VARIABLE}
    environ.update(
        MEMORY_RUN_DIR=str(run.path),
        MEMORY_LOG_DIR=deployment.log_dir,
        MEMORY_SOCKET=str(run.socket),
        MEMORY_PYTHON=sys.executable.replace("\\", "\\\\").replace('"', '\\"'),  # it stands in quotes there
    )
    if environ.get(CONFIG_VARIABLE):
        environ[CONFIG_VARIABLE] = deployment.config
    return environ


def supervisord(*options: str) -> list[str]:
    # Without a named user supervisord complains to root on every start.
    user = ["-u", "root"] if os.getuid() == 0 else []
    return [sys.executable, "-m", "supervisor.supervisord", "-c", str(SUPERVISOR_CONFIG), *user, *options]


def launch(run: RunDir, deployment: Deployment) -> None:
    """Start supervisord in the background; it starts the programs."""
    done = subprocess.run(
        supervisord(),
        env=environment(run, deployment),
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
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
    waiting, first_pids, key = dict(deployment.addresses), dict[str, int](), deployment.key()
    while True:
        if run.supervisor_pid() is None:
            raise Failure(f"supervisord ended; see {deployment.log_dir}")
        for name in tuple(waiting):
            # Of all, each time: the answers of those that start slowly would hold up the word of one that ended.
            processes = {each: info for each, info in run.processes().items() if each in waiting}
            for each, info in processes.items():
                if is_given_up(info) if restarts else has_exited(info, first_pids):
                    raise did_not_start(deployment, info, seen_bytes[each])
            if name in processes and is_healthy(ask_health(waiting[name], 300, key), processes[name]["pid"]):
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


def print_table(run: RunDir, deployment: Deployment) -> bool:
    """Print one row for each program and component; returns whether all programs of this host are well."""
    told = ask_manager(deployment)
    if told is None:
        print("the health manager does not answer: each program was asked by itself", file=sys.stderr)
    found = list(rows(run, deployment, told or {}))
    put(shown(found))
    return all(row.is_well for row in found if row.program in deployment.addresses)


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
            stop_orphans(run)
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
    key = deployment.key()
    for name, address in deployment.addresses.items():
        told = False
        while (reply := ask_health(address, key=key) or {}).get("state") == "starting" and time.monotonic() < deadline:
            if not told:
                loading = [part for part, state in dict(reply.get("readiness") or {}).items() if state == "loading"]
                print(f"{name} answers; waiting for {', '.join(loading) or 'it to become ready'} ...", file=sys.stderr)
                told = True
            time.sleep(POLL_S)


def planned(settings: Settings) -> Deployment:
    """What the configuration asks for."""
    return Deployment.planned(settings, config_file(None, os.environ))


def checked(settings: Settings) -> Deployment:
    """The same, when every program could listen where it is to. Raises Failure or ConfigError."""
    deployment = planned(settings)
    check_ports(ports(settings, deployment.addresses), deployment.key())
    check_bind(settings.network, settings.security)
    return deployment


def first_start(run: RunDir, deadline: float) -> Deployment:
    """Check what can be checked, start everything, wait; leaves nothing behind when that fails."""
    settings = load_settings()
    deployment = checked(settings)
    try:
        lock_store(Path(settings.storage.path)).release()
    except MemorySystemError as error:
        raise Failure(error.message) from None
    seen_bytes = deployment.console_sizes()
    print(f"starting {', '.join(deployment.addresses)} ...", file=sys.stderr)
    try:
        launch(run, deployment)
        wait_healthy(run, deployment, deadline, seen_bytes, restarts=False)
    except (Failure, KeyboardInterrupt) as error:
        if isinstance(error, Failure):  # told before the others are stopped, which takes seconds
            print(f"error: {error}", file=sys.stderr, flush=True)
        pid = run.supervisor_pid()
        if pid is not None:
            shut_down(run, pid)
        raise SystemExit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None
    return deployment


def run_here() -> int:
    """Become supervisord, in the foreground: for systemd, or a container, that starts it again when it is killed."""
    run = RunDir(os.environ)
    with run.lock():
        pid = run.supervisor_pid()
        if pid is not None:
            raise Failure(f"already running under supervisord, pid {pid}: stop it first with 'make stop-pc2'")
        stop_orphans(run)
        deployment = checked(load_settings())
        environ = environment(run, deployment)
    command = supervisord("-n")
    # Of supervisord.conf, `directory` and `umask` count in the background only.
    os.chdir(PROJECT)
    os.umask(0o077)
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def wait(timeout_s: float) -> int:
    """Return when what `run` starts elsewhere is healthy. MAINPID, which systemd sets, is the pid of that `run`."""
    run = RunDir(os.environ)
    deadline = time.monotonic() + timeout_s
    main_pid = int(os.environ.get("MAINPID") or 0)
    while (pid := run.supervisor_pid()) is None or main_pid not in (0, pid):
        if main_pid and not is_alive(main_pid):
            raise Failure("supervisord did not start")
        if time.monotonic() > deadline:
            raise Failure("supervisord does not answer")
        time.sleep(POLL_S)
    deployment = Deployment.stored(run.deployment)
    wait_healthy(run, deployment, deadline, dict.fromkeys(deployment.addresses, 0), restarts=True)
    print_table(run, deployment)
    return 0


def stop_orphans(run: RunDir) -> bool:
    """Stop what a killed supervisord left running; whether there was any."""
    left = orphans.find(run)
    if left:
        names = ", ".join(f"{each.name} (pid {each.pid})" for each in left)
        print(f"stopping what outlived its supervisord: {names} ...", file=sys.stderr)
        orphans.end(left)
    return bool(left)


def tell_not_running() -> bool:
    """Say so; and whether a program answers all the same, as one does whose supervisord was killed."""
    deployment = planned(load_settings())
    key = deployment.key()
    left = [(name, address, ask_health(address, key=key)) for name, address in deployment.addresses.items()]
    for name, address, reply in left:
        if reply is not None:
            put(f"not under supervisord, but {name} answers at {address.shown}: pid {reply.get('pid', '?')}")
    if orphans.find(RunDir(os.environ)):
        put("'make stop-pc2' stops what was left, 'make start-pc2' starts anew")
    orphaned = any(reply is not None for _, _, reply in left)
    if not orphaned:
        put("not running")
    return orphaned


def stop() -> int:
    run = RunDir(os.environ)
    with run.lock():
        pid = run.supervisor_pid()
        if pid is None:
            if not stop_orphans(run):
                return 1 if tell_not_running() else 0
        else:
            shut_down(run, pid)
    put("stopped")
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python's way would outlive the exec, and tail complain
    os.execvp("tail", ["tail", "-n", "20", "-F", *files])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start, stop and show the programs of host PC2.")
    parser.add_argument("command", choices=("start", "stop", "status", "logs", "run", "wait"))
    parser.add_argument(
        "--timeout", type=float, default=START_S, metavar="S", help="start, wait: at most so long, in seconds"
    )
    options = parser.parse_args(arguments)
    commands: dict[str, Callable[[], int]] = {
        "start": lambda: start(options.timeout),
        "stop": stop,
        "status": status,
        "logs": logs,
        "run": run_here,
        "wait": lambda: wait(options.timeout),
    }
    try:
        return commands[options.command]()
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except (Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
