"""What a process says of itself is compared with what the system says of it elsewhere."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import threading
from pathlib import Path

import pytest

from memory_system import process_figures as figures_module
from memory_system.process_figures import disk_free_bytes, process_figures

linux = pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+)", text, flags=re.MULTILINE)[0])


@linux
def test_memory_and_threads_are_those_of_the_system() -> None:
    ended = threading.Event()
    before = process_figures()
    block = bytearray(64 * 1024 * 1024)
    block[::4096] = b"x" * len(block[::4096])
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        now = process_figures()
        assert now["memory_bytes"] == pytest.approx(status("VmRSS") * 1024, rel=0.1)
        assert now["memory_bytes"] - before["memory_bytes"] > 48 * 1024 * 1024
        assert now["threads"] == status("Threads")
    finally:
        ended.set()
        thread.join()
    assert now["pid"] == os.getpid()


@pytest.mark.parametrize("size_counts", [True, False])
def test_an_open_file_counts(size_counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if size_counts and not figures_module._SIZE_COUNTS:
        pytest.skip("this kernel does not count open files in a folder's size")
    monkeypatch.setattr(figures_module, "_SIZE_COUNTS", size_counts)
    before = process_figures()["open_files"]
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        assert process_figures()["open_files"] == before + 5
        assert process_figures()["open_files_limit"] in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], -1)
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_cpu_time_grows_with_work() -> None:
    before_s = process_figures()["cpu_s"]
    sum(number * number for number in range(1_000_000))
    assert before_s < process_figures()["cpu_s"] <= before_s + 30.0


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    expected = shutil.disk_usage(tmp_path).free
    for place in (tmp_path, tmp_path / "memory.db", tmp_path / "not" / "there" / "yet"):
        free = disk_free_bytes(place)
        assert free is not None
        assert abs(free - expected) < 1024**3  # others write to this disk meanwhile


def test_a_disk_that_cannot_be_asked_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: object) -> os.statvfs_result:
        raise PermissionError

    monkeypatch.setattr(os, "statvfs", refuse)
    assert disk_free_bytes(tmp_path) is None
