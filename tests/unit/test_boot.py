"""The systemd units of `make install-boot`: what they say, and how they come and go."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import boot
import pytest
from boot_unit import Plan, environment_text, unit_text
from supervision import Failure

PLAN = Plan(
    project=Path("/srv/memory"),
    python=Path("/srv/memory/.venv/bin/python"),
    folder=Path("/etc/systemd/system"),
    environ={},
    writable=(Path("/srv/memory/data"),),
    temporary=None,
    user="ada",
    bind="127.0.0.1",
    ports=(7140, 7121),
)
ODD = Path('/srv/mem ory/100% it\'s "x" $HOME \\n')


def settings_of(text: str) -> dict[str, str]:
    """Key -> value of a unit, which names no key twice."""
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line and line[0] not in "#["]
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def words(value: str) -> list[str]:
    """As systemd reads a list: quotes and backslashes, then its specifiers."""
    return [word.replace("%%", "%") for word in shlex.split(value)]


def test_the_unit_supervises_supervisord_and_starts_at_boot() -> None:
    found = settings_of(unit_text(PLAN))
    pc2 = [":/srv/memory/.venv/bin/python", "/srv/memory/scripts/pc2.py"]
    assert words(found["ExecStart"]) == [*pc2, "run"]
    assert words(found["ExecStartPost"]) == ["-" + pc2[0], pc2[1], "wait"]
    assert words(found["ExecStop"]) == [*pc2, "stop"]
    assert (found["Type"], found["Restart"], found["RestartPreventExitStatus"]) == ("exec", "on-failure", "2")
    assert found["StartLimitIntervalSec"] == "0"
    assert (found["User"], found["WantedBy"]) == ("ada", "multi-user.target")
    assert found["EnvironmentFile"] == "/etc/systemd/system/memory-system.env"
    assert found["ConditionFileIsExecutable"] == "/srv/memory/.venv/bin/python"
    assert {"MemoryMax", "LimitNOFILE", "OOMPolicy", "UMask", "TimeoutStopSec"} <= set(found)


def test_the_system_unit_writes_to_the_data_alone() -> None:
    found = settings_of(unit_text(PLAN))
    assert (found["ProtectSystem"], found["ProtectHome"], found["PrivateTmp"]) == ("strict", "read-only", "yes")
    assert words(found["ReadWritePaths"]) == ["/srv/memory/data"]
    assert found["CapabilityBoundingSet"] == ""


def test_a_user_unit_asks_for_nothing_that_needs_privileges() -> None:
    found = settings_of(unit_text(replace(PLAN, user=None)))
    assert found["WantedBy"] == "default.target"
    refused = {"User", "ProtectSystem", "ReadWritePaths", "CapabilityBoundingSet", "OOMScoreAdjust", "After", "Wants"}
    assert refused & set(found) == set()
    assert found["NoNewPrivileges"] == "yes"


def test_odd_paths_reach_systemd_as_they_are() -> None:
    plan = replace(PLAN, project=ODD, python=ODD / "python", folder=ODD, writable=(ODD / "data", Path("/var/lib/m")))
    found = settings_of(unit_text(plan))
    assert words(found["ExecStart"]) == [":/usr/bin/env", f"{ODD}/python", f"{ODD}/scripts/pc2.py", "run"]
    assert words(found["ReadWritePaths"]) == [f"{ODD}/data", "/var/lib/m"]
    assert words(found["RequiresMountsFor"]) == [str(ODD), f"{ODD}/data", "/var/lib/m"]
    assert found["EnvironmentFile"].replace("%%", "%") == f"{ODD}/memory-system.env"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[m", "a\udcff"])
def test_what_systemd_cannot_read_is_refused(name: str) -> None:
    with pytest.raises(Failure, match="systemd does not take"):
        unit_text(replace(PLAN, project=Path("/srv", name)))
    with pytest.raises(Failure, match="systemd does not take"):
        environment_text(replace(PLAN, environ={"MEMORY_X": name}))


def test_values_reach_the_programs_as_they_are(tmp_path: Path) -> None:
    environ = {"MEMORY__REDIS__PREFIX": "we\"ird $HOME %n `x` 'y' \\ \\n #é ", "MEMORY_CONFIG": "/a b"}
    file = tmp_path / "environment"
    file.write_text(environment_text(replace(PLAN, environ=environ)), encoding="utf-8")
    # Quoted as in a shell, says systemd.exec(5).
    shell = ["sh", "-c", 'set -a; . "$1"; exec env -0', "-", str(file)]
    read = subprocess.run(shell, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True).stdout.decode()
    assert environ.items() <= dict(entry.split("=", 1) for entry in read.split("\0") if entry).items()


@pytest.mark.parametrize(
    ("bind", "waits"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", False), ("::", False), ("10.0.0.2", True)],
)
def test_only_an_address_of_the_network_waits_for_the_network(bind: str, waits: bool) -> None:
    found = settings_of(unit_text(replace(PLAN, bind=bind)))
    assert (found.get("Wants") == "network-online.target") is waits
    assert found["After"] == ("network-online.target" if waits else "network.target")


@pytest.mark.parametrize(
    "change",
    [
        {"project": Path("/tmp/memory")},
        {"python": Path("/var/tmp/venv/bin/python")},
        {"writable": (Path("/tmp/data"),)},
        {"temporary": Path("/tmp")},
    ],
)
def test_a_private_temporary_folder_would_hide_what_lies_in_the_shared_one(change: dict[str, object]) -> None:
    found = settings_of(unit_text(replace(PLAN, **change)))  # type: ignore[arg-type]
    assert found["PrivateTmp"] == "no"
    assert {"/tmp", "/var/tmp"} <= set(words(found["ReadWritePaths"]))


def test_capabilities_follow_the_user_and_the_ports() -> None:
    low = settings_of(unit_text(replace(PLAN, ports=(443, 7121))))
    assert low["CapabilityBoundingSet"] == low["AmbientCapabilities"] == "CAP_NET_BIND_SERVICE"
    root = settings_of(unit_text(replace(PLAN, user="root")))
    assert root["CapabilityBoundingSet"] == "CAP_DAC_OVERRIDE"
    assert "AmbientCapabilities" not in root


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for units; everything that the programs would write lies in `tmp_path` too."""
    for name in [name for name in os.environ if name.startswith(boot.KEPT)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MEMORY_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MEMORY__STORAGE__PATH", str(tmp_path / "100% data" / "memory.db"))
    monkeypatch.setenv("MEMORY__ERROR_BUS__HISTORY_PATH", str(tmp_path / "100% data" / "health.db"))
    monkeypatch.setenv("MEMORY__LOG__DIR", str(tmp_path / "100% data" / "logs"))
    return tmp_path / "u n%its"


def install(units: Path, scope: str = "system") -> int:
    return boot.main(["install", "--scope", scope, "--dir", str(units)])


def uninstall(units: Path) -> int:
    return boot.main(["uninstall", "--scope", "system", "--dir", str(units)])


@pytest.mark.parametrize("scope", ["system", "user"])
def test_install_writes_once_and_uninstall_removes(
    scope: str, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(units, scope) == 0
    unit, variables = units / "memory-system.service", units / "memory-system.env"
    assert sorted(units.iterdir()) == sorted([unit, variables])
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    assert f'MEMORY_RUN_DIR="{tmp_path}/run"' in variables.read_text().splitlines()
    before = unit.stat().st_ino
    assert install(units, scope) == 0
    assert unit.stat().st_ino == before
    assert capsys.readouterr().out.splitlines() == [f"wrote {unit}", f"unchanged: {unit}"]
    assert uninstall(units) == 0
    assert list(units.iterdir()) == []
    assert uninstall(units) == 0
    assert f"not installed in {units}" in capsys.readouterr().out


def test_install_makes_the_folders_that_the_unit_may_write_to(units: Path, tmp_path: Path) -> None:
    assert install(units) == 0
    listed = words(settings_of((units / "memory-system.service").read_text())["ReadWritePaths"])
    folders = [tmp_path / "100% data", tmp_path / "run"]
    assert set(map(str, folders)) <= set(listed)
    assert str(tmp_path / "100% data" / "logs") not in listed
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700]


def test_the_choices_of_now_are_kept(units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.yaml").write_text("log: {level: debug}\n")
    monkeypatch.chdir(tmp_path)
    for name, value in {"CONFIG": "my.yaml", "SOCKET": "/gone", "_LIMITS__RECEIVE_BATCH": "7"}.items():
        monkeypatch.setenv(f"MEMORY_{name}", value)
    monkeypatch.setenv("UNRELATED", "1")
    assert install(units) == 0
    lines = (units / "memory-system.env").read_text().splitlines()
    assert f'MEMORY_CONFIG="{tmp_path}/my.yaml"' in lines
    assert 'MEMORY__LIMITS__RECEIVE_BATCH="7"' in lines
    assert [line for line in lines if "UNRELATED" in line or "MEMORY_SOCKET" in line] == []


def test_a_refused_configuration_installs_nothing(
    units: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMORY__NETWORK__PORT", "x")
    assert install(units) == 2
    assert "MEMORY__NETWORK__PORT" in capsys.readouterr().err
    assert not units.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[Unit]\n", "was not written by this program"),
        ("# Written by 'make install-boot' of /srv/other\n[Unit]\n", "belongs to /srv/other"),
    ],
)
def test_a_unit_of_someone_else_is_left_alone(
    text: str, told: str, units: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units.mkdir()
    file = units / "memory-system.service"
    file.write_text(text)
    for act in (install, uninstall):
        assert act(units) == 1
        assert told in capsys.readouterr().err
    assert file.read_text() == text


def test_a_machine_without_systemd_is_told_what_to_start(
    units: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boot, "SYSTEM_UNITS", units)
    monkeypatch.setattr(boot, "is_booted", lambda: False)
    assert boot.main(["install", "--scope", "system"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: systemd does not run this machine")
    assert "scripts/pc2.py run" in line
    assert not units.exists()
    assert boot.main(["uninstall", "--scope", "system"]) == 0


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the arguments of each call of systemctl, which does nothing else."""
    programs, told = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    told.touch()
    (programs / "systemctl").write_text(f"#!/bin/sh\necho \"$@\" >> '{told}'\n")
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(boot, "is_booted", lambda: True)
    return told


def test_the_system_unit_is_enabled_and_disabled(units: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "SYSTEM_UNITS", units)
    assert boot.main(["install", "--scope", "system"]) == 0
    assert calls.read_text().splitlines() == ["daemon-reload", "enable memory-system.service"]
    calls.write_text("")
    assert boot.main(["uninstall", "--scope", "system"]) == 0
    assert calls.read_text().splitlines() == ["disable memory-system.service", "daemon-reload"]


def test_a_user_unit_needs_lingering_to_start_at_boot(
    tmp_path: Path, units: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(units))
    monkeypatch.setattr(boot, "LINGERING", tmp_path)
    assert boot.main(["install", "--scope", "user"]) == 0
    assert calls.read_text().splitlines() == ["--user daemon-reload", "--user enable memory-system.service"]
    assert (units / "systemd" / "user" / "memory-system.service").exists()
    assert "loginctl enable-linger" in capsys.readouterr().out
    (tmp_path / boot._account(os.getuid()).pw_name).touch()
    assert boot.main(["install", "--scope", "user"]) == 0
    assert "loginctl" not in capsys.readouterr().out


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_takes_the_unit_without_a_warning(
    scope: str, units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(units, scope) == 0
    assert capsys.readouterr().err == ""
    python = tmp_path / ODD.relative_to("/") / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/sh")
    plan = replace(PLAN, project=ODD, python=python, folder=ODD, writable=(ODD,), bind="10.0.0.2", ports=(443,))
    boot.verify(unit_text(plan if scope == "system" else replace(plan, user=None)), system=scope == "system")
    assert capsys.readouterr().err == ""


@needs_systemd
def test_a_unit_that_systemd_refuses_is_not_installed() -> None:
    with pytest.raises(Failure, match=r"systemd does not take the unit: .*is not executable"):
        boot.verify(unit_text(PLAN), system=True)
