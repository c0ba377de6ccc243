"""kill -9 and power cuts, for long."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from unittest import mock

from tests.acceptance import test_crash, test_trust_points, test_trust_powercut
from tests.support.crash import Findings
from tests.torture import Run, torture

KILLS, CUTS, POINTS, LIVES = 25, 5, 24, 40


@torture("crash", "kill -9 at random", share=4.0)
def kill_at_random(run: Run) -> str:
    """Store after store, each killed time and again under eight clients, with replies lost on the way."""
    ready_s: list[float] = []
    outcomes: Counter[str] = Counter()
    lost_replies = 0
    # How long a start takes is judged in the end, with all of them.
    with mock.patch.object(test_crash, "READY_S", 60.0):
        for number in itertools.count():
            if not run.goes_on(len(ready_s), least=200):
                break
            folder = run.folder / str(number)
            folder.mkdir()
            seed = run.chance.randrange(2**32)
            life = test_crash.run_under_fire(folder, kills=KILLS, cuts=CUTS, idempotency=True, seed=seed)
            assert life.findings == Findings(), (seed, life.findings)
            assert set(test_crash.vectors(life.database)) == {(True, "stub-64", 256)}, seed
            ready_s += life.ready_s
            lost_replies += CUTS
            outcomes.update(entry.outcome for entry in life.entries)
            run.say(f"{len(ready_s)} kills, {outcomes['ok']} acknowledged")
    told = (
        f"{len(ready_s)} kills, {lost_replies} times replies lost; {outcomes['ok']} acknowledged, "
        f"{outcomes['unknown']} unknown: 0 missing, 0 twice, sound; ready after {statistics.median(ready_s):.2f} s "
        f"(at most {max(ready_s):.2f} s)"
    )
    assert max(ready_s) < test_crash.READY_S, told
    return told


@torture("crash", "without idempotency (must fail)", share=0.3)
def without_idempotency(run: Run) -> str:
    life = test_crash.run_under_fire(run.folder, kills=3, cuts=12, idempotency=False, seed=run.seed)
    assert life.findings.twice
    return f"found out: {len(life.findings.twice)} writes done twice"


@torture("crash", "kill -9 at named points", share=2.0)
def kill_at_points(run: Run) -> str:
    """Each point, at calls that the seed draws."""
    killed: Counter[str] = Counter()
    for number in itertools.count():
        if not run.goes_on(killed.total(), least=POINTS):
            break
        folder = run.folder / str(number)
        folder.mkdir()
        points = {name: _drawn(run, fault) for name, fault in test_trust_points.UNDER_LOAD.items()}
        findings = test_trust_points.run_through(folder, points, run.chance.randrange(2**32))
        assert findings == Findings(), findings
        killed.update(list(points))
        run.say(f"{killed.total()} kills")
    others = 0
    for name in test_trust_points.OF_A_BACKUP:
        test_trust_points.test_killed_in_the_midst_of_a_backup(_folder(run, f"backup {name}"), name)
        others += 1
    test_trust_points.test_killed_at_any_point_of_a_migration(_folder(run, "migration"))
    test_trust_points.test_killed_in_the_midst_of_a_merge(_folder(run, "merge"))
    others += len(test_trust_points.OF_A_MIGRATION) + len(test_trust_points.OF_A_MERGE)
    return (
        f"{killed.total()} kills at {len(killed)} points of writes and snapshots, {others} in backup, migration, merge"
    )


def _drawn(run: Run, fault: str) -> str:
    """The same fault at another call."""
    place, _, count = fault.rpartition(":")
    return f"{place}:{run.chance.randrange(1, 4 * int(count))}"


def _folder(run: Run, name: str) -> Path:
    folder = run.folder / name.replace(" ", "-")
    folder.mkdir()
    return folder


@torture("power cut", "what was not synced is dropped", share=2.0)
def power_cuts(run: Run) -> str:
    with test_trust_powercut.powered(run.folder, run.seed) as trial:
        while run.goes_on(trial.cuts, least=5 * LIVES):
            trial.live(2.0, cuts=LIVES)
            assert trial.wrong == [], trial.wrong
            run.say(f"{trial.cuts} cuts")
        trial.start_after()
        acknowledged = sum(entry.outcome == "ok" for entries in trial.journals for entry in entries)
        return f"{trial.cuts} cuts in {trial.lives} lives, {acknowledged} acknowledged: 0 missing, 0 twice, sound"


@torture("power cut", "with synchronous=NORMAL (must fail)", share=0.3)
def power_cuts_without_syncs(run: Run) -> str:
    with test_trust_powercut.powered(run.folder, run.seed, "normal") as trial:
        trial.live(2.0, cuts=LIVES)
        assert len(trial.wrong) > LIVES // 4
        return f"found out: {len(trial.wrong)} of {trial.cuts} cuts lost acknowledged writes"


@torture("power cut", "replies before the commit (must fail)", share=0.3)
def early_replies(run: Run) -> str:
    test_trust_points.test_replies_that_leave_before_the_commit_are_found_out(run.folder)
    return "found out"
