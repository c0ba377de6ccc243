#!/usr/bin/env python3
"""Check, without a network, that what is installed is what requirements.txt and requirements-dev.txt pin.

    python scripts/check_pins.py [FILE ...]

It fails for a requirement that is not pinned to one version, for an installed package of another version than its pin,
for a pinned one that is missing, and for one that a pinned package needs and that no file pins. Whether a pinned
version has known flaws needs a list of them, which is online: docs/security.md says how to ask.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement

PROJECT: Final = Path(__file__).resolve().parent.parent
FILES: Final = ("requirements-dev.txt",)  # which includes requirements.txt
# Brought by PyTorch's builds for GPUs alone, and by no other: of the CPU build they are no part.
_OF_GPU_BUILDS: Final = re.compile(r"(nvidia|cuda)[-_.]|triton$")


def requirements(path: Path) -> Iterator[tuple[str, str]]:
    """Each requirement of a file and of those it includes, with where it stands."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split(" #")[0].strip()
        if text.startswith("-r "):
            yield from requirements(path.parent / text.removeprefix("-r ").strip())
        elif text and not text.startswith("#"):
            yield text, f"{path.name}:{number}"


def pins(found: Iterable[tuple[str, str]], problems: list[str]) -> dict[str, str]:
    """name -> version of the requirements of this platform; what is not pinned goes to `problems`."""
    pinned: dict[str, str] = {}
    for text, where in found:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            problems.append(f"{where}: {text}: {str(error).splitlines()[0]}")
            continue
        versions = list(requirement.specifier)
        if len(versions) != 1 or versions[0].operator not in ("==", "===") or versions[0].version.endswith("*"):
            problems.append(f"{where}: {text}: expected one version, as in {requirement.name}==1.2.3")
        elif (name := normal(requirement.name)) in pinned:
            problems.append(f"{where}: {text}: pinned twice")
        elif requirement.marker is None or requirement.marker.evaluate():
            pinned[name] = versions[0].version
    return pinned


def installed_problems(pinned: dict[str, str]) -> Iterator[str]:
    """What is installed and differs from its pin, or is missing, or comes along unpinned."""
    for name, version in sorted(pinned.items()):
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            yield f"{name}=={version} is pinned and not installed"
            continue
        if package.version.split("+")[0] != version:  # a build of torch names its device after a plus
            yield f"{name}: {package.version} is installed, {version} is pinned"
        for needed in sorted(needs(package)):
            if needed not in pinned and not _OF_GPU_BUILDS.match(needed):
                yield f"{name} needs {needed}, which is not pinned"


def needs(package: metadata.Distribution) -> set[str]:
    """The packages that an installed one needs on this platform, without its extras."""
    environment: dict[str, str | Set[str]] = {**default_environment(), "extra": ""}  # type: ignore[dict-item]
    found = (Requirement(text) for text in package.requires or ())
    return {normal(each.name) for each in found if each.marker is None or each.marker.evaluate(environment)}


def normal(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check(files: Sequence[Path]) -> tuple[int, list[str]]:
    """How many pins there are, and what is wrong."""
    problems: list[str] = []
    pinned = pins((each for path in files for each in requirements(path)), problems)
    return len(pinned), [*problems, *installed_problems(pinned)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is as pinned; 1: something is not, one line each."""
    named = sys.argv[1:] if arguments is None else arguments
    count, problems = check([Path(name) for name in named] or [PROJECT / name for name in FILES])
    for problem in problems:
        print(problem)
    if not problems:
        print(f"All {count} requirements are pinned and installed as pinned.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
