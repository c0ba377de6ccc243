"""When a program says that it lives."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import Any

from memory_system.error_bus import ErrorReporter
from memory_system.heartbeat import Heartbeat


class Recorder(ErrorReporter):
    """Keeps the heartbeats that it is given."""

    def __init__(self) -> None:
        super().__init__("", "tester")
        self.beats: list[dict[str, Any]] = []

    def heartbeat(self, fields: Any) -> None:
        self.beats.append(dict(fields))


async def beaten(recorder: Recorder, count: int) -> None:
    async with asyncio.timeout(45.0):
        while len(recorder.beats) < count:  # noqa: ASYNC110 - the recorder is called by a timer and has no event
            await asyncio.sleep(0.005)


def test_the_first_comes_at_once_with_all_that_is_known() -> None:
    async def main() -> None:
        recorder = Recorder()
        heartbeat = Heartbeat(recorder, "scheduler", lambda: {"state": "starting", "queue_depth": 3})
        heartbeat.start()
        (beat,) = recorder.beats
        assert abs(beat.pop("timestamp") - time.time()) < 30.0
        assert beat == {
            "component": "scheduler",
            "pid": os.getpid(),
            "state": "starting",
            "queue_depth": 3,
            "interval_s": 5.0,
        }
        assert "beating" in repr(heartbeat)
        heartbeat.close()
        assert "stopped" in repr(heartbeat)

    asyncio.run(main())


def test_it_beats_in_its_interval() -> None:
    async def main() -> None:
        recorder = Recorder()
        heartbeat = Heartbeat(recorder, "scheduler", lambda: {"state": "healthy"}, interval_s=0.1)
        heartbeat.start()
        await beaten(recorder, 4)
        heartbeat.close()
        heartbeat.close()
        count = len(recorder.beats)
        await asyncio.sleep(0.25)
        assert len(recorder.beats) == count
        assert [beat["state"] for beat in recorder.beats[-2:]] == ["healthy", "stopped"], "it signs off"
        times = [beat["timestamp"] for beat in recorder.beats[:-1]]
        assert all(later - sooner >= 0.04 for sooner, later in itertools.pairwise(times))

    asyncio.run(main())


def test_a_change_of_state_is_told_within_a_second_or_so_and_at_the_end() -> None:
    async def main() -> None:
        recorder = Recorder()
        state = "starting"
        heartbeat = Heartbeat(recorder, "scheduler", lambda: {"state": state}, interval_s=3600.0)
        heartbeat.start()
        state = "healthy"
        await beaten(recorder, 2)
        state = "stopping"
        heartbeat.close()
        assert [beat["state"] for beat in recorder.beats] == ["starting", "healthy", "stopped"]

    asyncio.run(main())


def test_a_loop_that_hangs_does_not_beat() -> None:
    async def main() -> None:
        recorder = Recorder()
        heartbeat = Heartbeat(recorder, "scheduler", lambda: {"state": "healthy"}, interval_s=0.05)
        heartbeat.start()
        await beaten(recorder, 2)
        count = len(recorder.beats)
        time.sleep(0.3)  # noqa: ASYNC251 - what is tested
        assert len(recorder.beats) == count
        await beaten(recorder, count + 1)
        heartbeat.close()

    asyncio.run(main())


def test_a_defect_in_the_figures_does_not_stop_it() -> None:
    def figures() -> dict[str, Any]:
        raise KeyError("gone")

    async def main() -> None:
        recorder = Recorder()
        heartbeat = Heartbeat(recorder, "scheduler", figures, interval_s=0.05)
        heartbeat.start()
        await beaten(recorder, 3)
        heartbeat.close()
        assert (recorder.beats[0]["state"], recorder.beats[0]["figures_error"]) == ("unknown", "KeyError")

    asyncio.run(main())
