"""Brings the programs back after a reboot, by a unit of systemd: `boot.py install | uninstall`.

Run by root it writes a system unit, which runs as the owner of the data; otherwise a unit of this user. The MEMORY_*
variables that hold now are kept in a file beside it. Exit status: 0 done, 1 failed, 2 the configuration is refused.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from boot_unit import MARK, UNIT, VARIABLES, Plan, environment_text, unit_text
from output import put
from supervision import PROJECT, Failure, ports, run_folder, socket_fits

from memory_system.deployment import program_addresses
from memory_system.errors import ConfigError
from memory_system.settings import CONFIG_VARIABLE, Settings, config_file, load_settings

SYSTEM_UNITS: Final = Path("/etc/systemd/system")
KEPT: Final = ("MEMORY_", "HF_")
# pc2.py sets these anew at every start.
NOT_KEPT: Final = frozenset({"MEMORY_LOG_DIR", "MEMORY_SOCKET", "MEMORY_PYTHON", "MEMORY_KEY_FILE"})
LINGERING: Final = Path("/var/lib/systemd/linger")


def plan(settings: Settings, environ: Mapping[str, str], *, system: bool, folder: Path) -> Plan:
    """Everything that the unit says, from the configuration; looks at the machine, changes nothing."""
    chosen = {name: value for name, value in environ.items() if name.startswith(KEPT) and name not in NOT_KEPT}
    if environ.get(CONFIG_VARIABLE):
        chosen[CONFIG_VARIABLE] = str(config_file(None, environ))
    run = run_folder(environ)
    if environ.get("MEMORY_RUN_DIR"):
        chosen["MEMORY_RUN_DIR"] = str(run)
    store = Path(settings.storage.path).parent
    writable = {run, store, Path(settings.log.dir), Path(settings.error_bus.history_path).parent}
    temporary = None if socket_fits(run) else Path(tempfile.gettempdir())
    if temporary is not None:
        chosen["TMPDIR"] = str(temporary)
    owner = _account((store if store.exists() else PROJECT).stat().st_uid if system else os.getuid())
    if _downloads_model(settings):
        writable.add(Path(chosen.get("HF_HOME") or Path(owner.pw_dir, ".cache", "huggingface")))
    return Plan(
        project=PROJECT,
        python=Path(sys.executable).absolute(),
        folder=folder,
        environ=chosen,
        writable=_outermost(writable),
        temporary=temporary,
        user=owner.pw_name if system else None,
        bind=settings.network.bind,
        ports=tuple(port.number for port in ports(settings, program_addresses(settings))),
    )


def _account(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise Failure(f"user id {uid} has no account on this machine, which a unit needs to run") from None


def _downloads_model(settings: Settings) -> bool:
    """Whether the model may have to come from a hub, whose library writes to a cache of its own."""
    model = settings.embedding.model
    is_default = model == Settings().embedding.model
    return settings.embedding.provider == "sentence-transformers" and not is_default and not Path(model).is_dir()


def _outermost(folders: set[Path]) -> tuple[Path, ...]:
    """Those that lie in none of the others, sorted."""
    absolute = {Path(os.path.abspath(folder)) for folder in folders}
    return tuple(sorted(folder for folder in absolute if not absolute.intersection(folder.parents)))


def create_folders(wanted: Plan) -> None:
    """The unit's file system is read-only but for these, so they have to be there before it starts."""
    for folder in wanted.writable:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if wanted.user is not None:
            owner = pwd.getpwnam(wanted.user)
            for path in missing:
                os.chown(path, owner.pw_uid, owner.pw_gid)


def check_writable(path: Path) -> None:
    """Raise Failure when the file is there and not ours to overwrite or remove."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        first = ""
    if not first.startswith(MARK):
        raise Failure(f"{path} was not written by this program: remove it first")
    if first != f"{MARK} {PROJECT}":
        raise Failure(f"{path} belongs to {first.removeprefix(MARK).strip()}: run 'make uninstall-boot' there first")


def write(path: Path, text: str, mode: int) -> bool:
    """Replace the file as a whole; returns whether that changed it."""
    data = text.encode()
    if path.exists() and path.read_bytes() == data and path.stat().st_mode & 0o777 == mode:
        return False
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return True


def verify(text: str, *, system: bool) -> None:
    """Have systemd read the unit, where it is installed; prints its warnings, raises Failure for its errors."""
    if shutil.which("systemd-analyze") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, UNIT)
        file.write_text(text, encoding="utf-8")
        scope = "--system" if system else "--user"
        command = ["systemd-analyze", scope, "--man=no", "verify", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    # It also speaks of other units of this machine.
    lines = [line.replace(f"{folder}/", "") for line in done.stderr.splitlines() if UNIT in line]
    if lines and done.returncode != 0:
        raise Failure(f"systemd does not take the unit: {lines[0]}")
    for line in lines:
        print(f"systemd-analyze: {line}", file=sys.stderr)


def is_booted() -> bool:
    """Whether systemd runs this machine, as sd_booted(3) tells."""
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def systemctl(*arguments: str, system: bool) -> None:
    command = ["systemctl", *([] if system else ["--user"]), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Failure(f"'{' '.join(command)}' failed: {reason}")


def user_units() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base, "systemd", "user").absolute()


def install(folder: Path, *, system: bool, enable: bool) -> int:
    if enable and not is_booted():
        raise Failure(
            "systemd does not run this machine: have what runs it start "
            f"'{sys.executable} {PROJECT}/scripts/pc2.py run', or write the unit elsewhere with --dir"
        )
    wanted = plan(load_settings(), os.environ, system=system, folder=folder)
    text = unit_text(wanted)
    for name in (UNIT, VARIABLES):
        check_writable(folder / name)
    verify(text, system=system)
    create_folders(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    # The values may be secret, and what a unit says anybody may read.
    changed = write(folder / VARIABLES, environment_text(wanted), 0o600)
    changed = write(folder / UNIT, text, 0o644) or changed
    put(f"{'wrote' if changed else 'unchanged:'} {folder / UNIT}")
    if enable:
        systemctl("daemon-reload", system=system)
        systemctl("enable", UNIT, system=system)
        tell_next(system=system)
    return 0


def tell_next(*, system: bool) -> None:
    control = "systemctl" if system else "systemctl --user"
    put(f"starts at the next boot; to hand over now: make stop-pc2 && {control} restart {UNIT}")
    if not system:
        name = _account(os.getuid()).pw_name
        if not (LINGERING / name).exists():
            put(f"it starts only when {name} logs in, unless: sudo loginctl enable-linger {name}")


def uninstall(folder: Path, *, system: bool, enable: bool) -> int:
    files = [folder / UNIT, folder / VARIABLES]
    found = [path for path in files if path.exists()]
    for path in found:
        check_writable(path)
    if not found:
        put(f"not installed in {folder}")
        return 0
    if enable and is_booted():
        systemctl("disable", UNIT, system=system)
    for path in found:
        path.unlink()
    if enable and is_booted():
        systemctl("daemon-reload", system=system)
    put(f"removed {folder / UNIT}; what runs goes on until 'make stop-pc2'")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bring the programs back after a reboot, by a unit of systemd.")
    parser.add_argument("command", choices=("install", "uninstall"))
    parser.add_argument("--scope", choices=("system", "user"), help="default: system when run by root, else user")
    parser.add_argument("--dir", type=Path, help="folder of the unit; only writes it there, enables nothing")
    options = parser.parse_args(arguments)
    system = options.scope == "system" if options.scope else os.getuid() == 0
    folder = options.dir.absolute() if options.dir else SYSTEM_UNITS if system else user_units()
    act = {"install": install, "uninstall": uninstall}[options.command]
    try:
        return act(folder, system=system, enable=options.dir is None)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except (Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
