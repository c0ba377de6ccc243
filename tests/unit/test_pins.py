"""The check of pinned requirements finds what is not pinned, not as pinned, missing, or brought along."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import check_pins
import pytest

PROJECT = Path(__file__).resolve().parents[2]
MSGPACK = metadata.version("msgpack")


def problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return check_pins.check([path])[1]


def test_every_requirement_of_the_project_is_pinned() -> None:
    """Whether it is installed so is for `make lint`: tests may run elsewhere."""
    found: list[str] = []
    pinned = check_pins.pins(check_pins.requirements(PROJECT / "requirements-dev.txt"), found)
    assert found == []
    assert {"pyzmq", "torch", "pytest"} <= set(pinned)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"msgpack=={MSGPACK}", None),
        (f"# a comment\n\nmsgpack=={MSGPACK}  # as it is", None),
        ("msgpack", "expected one version"),
        ("msgpack>=1.0", "expected one version"),
        ("msgpack==1.*", "expected one version"),
        ("msgpack==1.0,<2", "expected one version"),
        ("msgpack @ https://example.invalid/msgpack.whl", "expected one version"),
        ("--index-url https://example.invalid", "requirements.txt:1"),
        (f"msgpack=={MSGPACK}\nMsgPack=={MSGPACK}", "pinned twice"),
        ("msgpack==0.0.1", f"{MSGPACK} is installed, 0.0.1 is pinned"),
        ("no-such-package-here==1.0", "not installed"),
        ("no-such-package-here==1.0; sys_platform == 'plan9'", None),
        (f"structlog=={metadata.version('structlog')}\nredis==0.1", "redis"),
        (f"pytest=={metadata.version('pytest')}", "pytest needs pluggy, which is not pinned"),
    ],
)
def test_what_is_found(tmp_path: Path, text: str, expected: str | None) -> None:
    found = problems(tmp_path, text)
    assert any(expected in problem for problem in found) if expected is not None else not found, found


def test_files_that_are_included_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("msgpack>=1\n", encoding="utf-8")
    assert problems(tmp_path, "-r other.txt") == ["other.txt:1: msgpack>=1: expected one version, as in msgpack==1.2.3"]


def test_the_exit_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(f"msgpack=={MSGPACK}\n", encoding="utf-8")
    assert check_pins.main([str(path)]) == 0
    assert "All 1 requirements" in capsys.readouterr().out
    path.write_text("msgpack\n", encoding="utf-8")
    assert check_pins.main([str(path)]) == 1
    assert "requirements.txt:1" in capsys.readouterr().out
