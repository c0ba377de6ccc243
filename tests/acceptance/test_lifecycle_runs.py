"""Runs of maintenance over the wire: what a dry run says is what a run does, once, while requests go on."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from memory_system.admin_models import ADMIN_PARAMS
from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, asking
from tests.support.process import Orchestrator, Peer, running_orchestrator, wait_until
from tests.support.wire import Reply, decode, request_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

JOBS = ("run_decay", "run_consolidation", "run_cleanup")
SETTINGS = {"lifecycle__short__promote_importance": 0.4, "lifecycle__delete_enabled": "true"}
SLOW = {"maintenance__slice_rows": 1, "maintenance__share": 0.02}
Change = tuple[str, str, str, str]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path, **SETTINGS) as running:
        yield running


def populate(service: Ageing, namespace: str) -> None:
    """Memories of which, eight days on, some are to be promoted, archived, merged, deleted, or left alone."""
    around = {"namespace": namespace}
    soon_s = service.clock.time() + DAY_S
    parent_id = service.add(f"what was said in {namespace}", around, importance=1.0, memory_tier="long")
    texts = [
        "the harbour bridge is painted red",
        "the harbour bridge was painted red again",
        "they paint the red bridge",
    ]
    memories: list[dict[str, Any]] = [
        *({"content": f"promoted {number}", "importance": 1.0} for number in range(7)),
        *({"content": f"archived {number}", "importance": 0.15} for number in range(5)),
        *({"content": f"expired {number}", "expires_at": soon_s} for number in range(4)),
        *({"content": text, "importance": 0.5, "parent_id": parent_id} for text in texts),
        *({"content": "the very same words", "importance": 0.5, "parent_id": parent_id} for _ in range(3)),
        *({"content": f"{word} alone", "importance": 0.4} for word in ("quietly", "suddenly", "sadly")),
        *({"content": f"lasting {number}", "importance": 0.9, "memory_tier": "long"} for number in range(6)),
    ]
    service.ok("batch_add_memories", around, memories=memories)


def of_reply(reply: Reply) -> set[Change]:
    return {(change["namespace"], change["memory_id"], change["from"], change["to"]) for change in reply["results"]}


@dataclass
class Seen:
    """What a reader sees of each memory: namespace, tier, state; by memory_id."""

    memories: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)

    @classmethod
    def now(cls, service: Ageing) -> Seen:
        rows = service.query("SELECT memory_id, namespace, memory_tier, state, memory_type FROM memories")
        return cls({memory_id: (namespace, tier, state, kind) for memory_id, namespace, tier, state, kind in rows})

    def changes_to(self, after: Seen) -> set[Change]:
        """What became of each, in the words of a run; memories that consolidation made are not its changes."""
        found: set[Change] = set()
        for memory_id, (namespace, tier, state, _) in self.memories.items():
            if memory_id not in after.memories:
                found.add((namespace, memory_id, state, "deleted"))
                continue
            _, new_tier, new_state, _ = after.memories[memory_id]
            if new_state != state:
                found.add((namespace, memory_id, state, new_state))
            elif new_tier != tier:
                found.add((namespace, memory_id, tier, new_tier))
        return found

    def made_in(self, after: Seen) -> Counter[str]:
        """Types of the memories that are new."""
        return Counter(after.memories[memory_id][3] for memory_id in after.memories.keys() - self.memories.keys())


def ended(service: Ageing, request: str, state: str = "done") -> dict[str, Any]:
    """The run of this request, when it has come to this state."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [run for run in service.ok("list_runs")["results"] if run["request_id"] == request]
        return bool(found) and found[0]["state"] == state

    wait_until(is_there, f"the run is {state}", 60.0)
    return found[0]


# -- dry runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespaces", [1, 12])
def test_a_run_does_exactly_what_the_dry_run_said(service: Ageing, namespaces: int) -> None:
    for number in range(namespaces):
        populate(service, f"n{number}")
        service.vectors_ready({"namespace": f"n{number}"})
    service.clock.advance(8 * DAY_S)
    expected = {"run_decay": 12, "run_consolidation": 6, "run_cleanup": 4}
    for action in JOBS:
        before, stored = Seen.now(service), service.everything()
        said = service.ok(action, dry_run=True, limit=1000)
        assert said["dry_run"] is True
        assert said["changes"] == len(of_reply(said)) == expected[action] * namespaces
        assert service.everything() == stored  # and so nothing was written

        done = service.ok(action, as_of=said["as_of"], limit=1000)
        after = Seen.now(service)
        assert of_reply(done) == of_reply(said) == before.changes_to(after)
        assert {name: done[name] for name in ("as_of", "counts", "changes", "digest")} == {
            name: said[name] for name in ("as_of", "counts", "changes", "digest")
        }
        assert before.made_in(after).keys() <= {"consolidated"}
        assert {reason["reason"] for reason in done["results"]} == {reason["reason"] for reason in said["results"]}


def scatter(service: Ageing, namespace: str, chance: random.Random) -> None:
    """Some hundred memories below a few parents, of a few topics, some of them related or the same."""
    around = {"namespace": namespace}
    topics = [[f"w{topic}x{number}word" for number in range(8)] for topic in range(8)]
    parents = [service.add(f"parent {number}", around, importance=1.0, memory_tier="long") for number in range(4)]
    ids: list[str] = []
    for _ in range(12):
        memories = [
            {
                "content": " ".join(chance.sample(chance.choice(topics), chance.randint(3, 8))),
                "importance": chance.choice([0.15, 0.45, 0.5, 0.55, 0.6, 1.0]),
                "parent_id": chance.choice([None, None, *parents]),
                "memory_type": chance.choice(["general"] * 6 + ["note"]),
            }
            for _ in range(30)
        ]
        memories += [{"content": "said again and again", "importance": 0.5}] * 6
        ids += service.ok("batch_add_memories", around, memories=memories)["memory_ids"]
        service.clock.advance(chance.uniform(0.0, 7200.0))
    for _ in range(30):
        one, other = chance.sample(ids, 2)
        service.ok("add_relationship", around, source_id=one, target_id=other, relationship_type="x")
    service.vectors_ready(around)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_of_many_slices_does_exactly_what_the_dry_run_said(service: Ageing, seed: int) -> None:
    chance = random.Random(seed)
    for namespace in ("one", "two"):
        scatter(service, namespace, chance)
    service.clock.advance(8 * DAY_S)
    for action in chance.sample(JOBS, 3):
        before = Seen.now(service)
        said = service.ok(action, dry_run=True, limit=1000)
        assert said["changes"] > 50 or action == "run_cleanup"
        assert service.ok(action, dry_run=True, as_of=said["as_of"], limit=10)["digest"] == said["digest"]
        done = service.ok(action, as_of=said["as_of"], limit=1000)
        assert of_reply(done) == of_reply(said) == before.changes_to(Seen.now(service))
        assert (done["digest"], done["counts"]) == (said["digest"], said["counts"])


def test_a_run_as_of_a_dry_run_leaves_what_came_due_since(service: Ageing) -> None:
    populate(service, "default")
    service.vectors_ready()
    service.clock.advance(7.5 * DAY_S)
    for action in JOBS:
        said = service.ok(action, dry_run=True, limit=1000)
        fresh = service.add(f"due in an hour, {action}", importance=0.1001, expires_at=service.clock.time() + 7000)
        service.clock.advance(2 * 3600.0)
        before = Seen.now(service)
        done = service.ok(action, as_of=said["as_of"], limit=1000)
        assert of_reply(done) == of_reply(said) == before.changes_to(Seen.now(service))
        assert done["digest"] == said["digest"]
        assert service.query("SELECT state FROM memories WHERE memory_id = ?", fresh) == [("active",)]


def test_a_dry_run_may_look_ahead_and_a_run_may_not(service: Ageing) -> None:
    populate(service, "default")
    service.vectors_ready()
    in_eight_days = service.clock.time() + 8 * DAY_S
    stored = service.everything()
    said = service.ok("run_decay", dry_run=True, as_of=in_eight_days, limit=1000)
    assert said["changes"] == 12
    assert service.fails("invalid_field", "run_decay", as_of=in_eight_days)["details"]["field"] == "as_of"
    assert service.everything() == stored
    service.clock.advance(8 * DAY_S + 5.0)
    assert service.ok("run_decay", as_of=in_eight_days, limit=1000)["digest"] == said["digest"]


def test_running_twice_changes_nothing(service: Ageing) -> None:
    for namespace in ("one", "two"):
        populate(service, namespace)
    service.vectors_ready({"namespace": "one"})
    service.vectors_ready({"namespace": "two"})
    service.clock.advance(8 * DAY_S)
    first = {action: service.ok(action) for action in JOBS}
    assert all(reply["changes"] for reply in first.values())
    for restart in (False, True):
        if restart:
            service.restart()
        stored = service.everything()
        for action in JOBS:
            assert service.ok(action, as_of=first[action]["as_of"])["changes"] == 0
            assert service.ok(action)["changes"] == 0
        assert service.everything() == stored


def test_limit_bounds_what_is_shown_and_nothing_else(service: Ageing) -> None:
    populate(service, "default")
    service.clock.advance(8 * DAY_S)
    whole = service.ok("run_decay", dry_run=True, limit=1000)
    few = service.ok("run_decay", dry_run=True, limit=2, as_of=whole["as_of"])
    assert (few["count"], few["changes"], few["digest"]) == (2, whole["changes"], whole["digest"])
    assert of_reply(few) < of_reply(whole)
    done = service.ok("run_decay", limit=1, as_of=whole["as_of"])
    assert (done["count"], done["changes"], done["digest"]) == (1, whole["changes"], whole["digest"])


def test_a_run_of_some_namespaces_leaves_the_others_alone(service: Ageing) -> None:
    names = [f"n{number}" for number in range(4)]
    for name in names:
        populate(service, name)
        service.vectors_ready({"namespace": name})
    service.clock.advance(8 * DAY_S)
    sequences = {name: service.ok("get_commit_seq", {"namespace": name})["commit_seq"] for name in names}
    for action in JOBS:
        before = Seen.now(service)
        said = service.ok(action, dry_run=True, namespaces=["n1", "n3"], limit=1000)
        done = service.ok(action, namespaces=["n1", "n3"], limit=1000, as_of=said["as_of"])
        assert of_reply(done) == of_reply(said) == before.changes_to(Seen.now(service))
        assert {namespace for namespace, *_ in of_reply(done)} == {"n1", "n3"}
    risen = {
        name for name in names if service.ok("get_commit_seq", {"namespace": name})["commit_seq"] > sequences[name]
    }
    assert risen == {"n1", "n3"}


def test_what_a_run_changes_is_seen_by_searches_that_were_asked_before(service: Ageing) -> None:
    """Results and records are cached: a run makes them old."""
    populate(service, "default")
    service.vectors_ready()
    service.clock.advance(8 * DAY_S)
    query = {"query": "archived promoted", "touch": False}

    def asked() -> list[Any]:
        semantic = service.ok("semantic_search", k=20, **query)["results"]
        words = service.ok("search_memory", limit=20, **query)["results"]
        short = service.ok("semantic_search", k=20, filters={"memory_tier": "short"}, mode="dense", **query)["results"]
        return [{memory["content"] for memory in results} for results in (semantic, words, short)]

    before = asked()
    assert all({"archived 1", "promoted 1"} <= contents for contents in before)
    assert asked() == before
    service.ok("run_decay")
    semantic, words, short = asked()
    assert not {content for content in semantic | words | short if content.startswith("archived")}
    assert "promoted 1" in semantic & words
    assert "promoted 1" not in short
    assert {m["memory_tier"] for m in service.ok("search_memory", **query)["results"]} == {"medium"}


def test_a_dry_run_of_an_import_says_what_the_import_does(service: Ageing) -> None:
    populate(service, "default")
    lines = service.ok("export_memories", limit=1000)["results"]
    elsewhere = {"namespace": "elsewhere"}
    for line in lines:
        line.pop("namespace", None)
    counts = ("added", "unchanged", "overwritten", "conflicts")
    for expected in ("added", "unchanged"):
        service.vectors_ready()
        service.vectors_ready(elsewhere)
        stored = service.everything()
        said = service.ok("import_memories", elsewhere, records=lines, dry_run=True)
        assert service.everything() == stored
        done = service.ok("import_memories", elsewhere, records=lines)
        assert {name: done[name] for name in counts} == {name: said[name] for name in counts}
        assert sum(done[expected].values()) == len(lines)
    assert len(service.listed(elsewhere)) == len(service.listed())


def test_a_dry_run_of_a_backup_writes_nothing(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, backup__dir=tmp_path / "backups") as service:
        populate(service, "default")
        assert service.ok("backup", dry_run=True)["dry_run"] is True
        assert not list((tmp_path / "backups").glob("*.db*"))
        assert Path(service.ok("backup")["path"]).stat().st_size > 0


# -- runs and those who ask for them -----------------------------------------------------------------------------


def due(service: Ageing, count: int, namespace: str = "default") -> None:
    """Store memories that are to be archived, and let it be time."""
    for start in range(0, count, 1000):
        memories = [
            {"content": f"number {number}", "importance": 0.15} for number in range(start, min(count, start + 1000))
        ]
        service.ok("batch_add_memories", {"namespace": namespace}, memories=memories)
    service.clock.advance(6 * DAY_S)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Ageing]:
    """A service whose runs take a while."""
    with ageing_orchestrator(tmp_path, **SLOW, embedding__provider="off") as running:
        yield running


def under_way(service: Ageing) -> dict[str, Any]:
    """The run that is under way, once it has changed something."""
    archived = "SELECT count(*) FROM memories WHERE state = 'archived'"
    wait_until(lambda: service.query(archived)[0][0] > 5, "the run is under way")
    [run] = service.ok("list_runs", run_state="running")["results"]
    return run


def test_callers_with_one_request_id_share_one_run(slow: Ageing) -> None:
    due(slow, 60)
    key = request_id()
    with asking(slow, "run_decay", {"request_id": key}) as first:
        run = under_way(slow)
        assert (run["job"], run["request_id"], run["dry_run"]) == ("decay", key, False)
        with asking(slow, "run_decay", {"request_id": key}) as second:
            assert slow.fails("busy", "run_decay")["retryable"] is True
            slow.fails("idempotency_mismatch", "run_decay", {"request_id": key}, namespaces=["other"])
            replies = [decode(peer.receive(60), "msgpack") for peer in (first, second)]
    assert [reply["status"] for reply in replies] == ["success"] * 2
    assert [reply.get("joined") for reply in replies] == [None, True]
    assert {reply["run_id"] for reply in replies} == {run["run_id"]}
    assert {reply["changes"] for reply in replies} == {60}
    again = slow.ok("run_decay", {"request_id": key})
    assert (again["replayed"], again["run_id"], again["changes"], again["digest"]) == (
        *(True, run["run_id"], 60, replies[0]["digest"]),
    )
    slow.restart()
    assert slow.ok("run_decay", {"request_id": key})["digest"] == replies[0]["digest"]
    assert slow.ok("list_runs", job="decay")["count"] == 1


def test_a_run_goes_on_when_its_caller_is_gone(slow: Ageing) -> None:
    due(slow, 40)
    key = request_id()
    with asking(slow, "run_decay", {"request_id": key}):
        under_way(slow)
    assert ended(slow, key)["changes"] == 40
    assert slow.query("SELECT count(*) FROM memories WHERE state = 'archived'") == [(40,)]


def test_a_run_shows_how_far_it_is(slow: Ageing) -> None:
    due(slow, 60)
    key = request_id()
    with asking(slow, "run_decay", {"request_id": key}):
        run = under_way(slow)
        assert run["progress"]["total"] == 60
        first = run["progress"]["done"]

        def further() -> bool:
            running = slow.ok("list_runs", run_state="running")["results"]
            return not running or running[0]["progress"]["done"] > first

        wait_until(further, "progress")
    whole = ended(slow, key)
    assert "progress" not in whole
    assert whole["started_at"] <= whole["finished_at"]


def test_runs_are_listed_by_job_and_state_with_what_they_did(service: Ageing) -> None:
    populate(service, "default")
    service.vectors_ready()
    service.clock.advance(8 * DAY_S)
    replies = [service.ok(action, {"agent_id": "night"}) for action in JOBS]
    for action in ("run_checkpoint", "run_snapshot", "run_integrity_check", "reindex"):
        replies.append(service.ok(action, {"agent_id": "night"}))
    listed = service.ok("list_runs")["results"]
    assert [run["run_id"] for run in listed] == sorted((run["run_id"] for run in replies), reverse=True)
    assert {run["asked_by"] for run in listed} == {"night"}
    assert {run["state"] for run in listed} == {"done"}
    for reply in replies:
        [run] = service.ok("list_runs", run_id=reply["run_id"])["results"]
        same = run.keys() & reply.keys() - {"status", "request_id", "commit_seq", "plans"}
        assert {name: run[name] for name in same} == {name: reply[name] for name in same}
    assert service.ok("list_runs", job="decay")["count"] == 1
    assert service.ok("list_runs", run_state="failed")["count"] == 0
    service.restart()
    assert [run["run_id"] for run in service.ok("list_runs")["results"]] == [run["run_id"] for run in listed]


def test_what_a_run_stores_of_itself_has_no_content(service: Ageing) -> None:
    populate(service, "default")
    service.vectors_ready()
    service.clock.advance(8 * DAY_S)
    for action in JOBS:
        service.ok(action, dry_run=True)
        service.ok(action)
    stored = str(service.query("SELECT * FROM maintenance_runs"))
    assert [word for word in ("harbour", "painted", "very same", "lasting") if word in stored] == []


# -- beside requests --------------------------------------------------------------------------------------------


def test_reads_and_writes_go_on_during_a_run(tmp_path: Path) -> None:
    """Each is answered soon, and nothing that was acknowledged is lost."""
    with ageing_orchestrator(tmp_path, embedding__provider="off", maintenance__slice_rows=100) as service:
        due(service, 6000)
        stop, failures, added = threading.Event(), list[str](), list[str]()
        longest = Counter[str]()

        def work(number: int) -> None:
            with MemoryClient(service.orchestrator.address, raise_on_error=True) as client:
                while not stop.is_set():
                    try:
                        began_s = time.monotonic()
                        memory_id = client.add_memory(f"during the run {number}", importance=0.9)["memory_id"]
                        added_s = time.monotonic()
                        assert client.get_memory(memory_id)["memory"]["importance"] > 0.8
                        longest["add"] = max(longest["add"], added_s - began_s)  # type: ignore[call-overload]
                        longest["get"] = max(longest["get"], time.monotonic() - added_s)  # type: ignore[call-overload]
                        added.append(memory_id)
                    except Exception as error:  # noqa: BLE001  whatever it is, the test is to show it
                        failures.append(repr(error))
                        return

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            reply = service.ok("run_decay", timeout_s=90.0)
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert failures == []
        assert reply["changes"] == 6000
        assert len(added) > 20
        assert max(longest.values()) < 2.0
        active = service.query("SELECT memory_id FROM memories WHERE state = 'active'")
        assert {memory_id for (memory_id,) in active} == set(added)


def test_what_is_used_while_a_run_is_under_way_is_decided_anew(slow: Ageing) -> None:
    due(slow, 60)
    last = slow.query("SELECT memory_id FROM memories ORDER BY due_at DESC, row_id DESC LIMIT 1")[0][0]
    key = request_id()
    with asking(slow, "run_decay", {"request_id": key}):
        under_way(slow)
        slow.ok("reinforce_memory", memory_id=last, reinforcement_factor=10)
    assert ended(slow, key)["changes"] == 59
    assert slow.record(last)["state"] == "active"


# -- who may ------------------------------------------------------------------------------------------------------


def other_address() -> str | None:
    """An address of this machine that is not loopback; None where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))  # sends nothing
        address: str = sock.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


ADMIN_DATA: dict[str, dict[str, Any]] = {
    "undo_consolidation": {"memory_id": "mem-none"},
    "import_memories": {"records": [{"kind": "group", "name": "x", "created_at": 1.0}]},
}


def test_admin_actions_are_for_peers_of_this_machine_only(tmp_path: Path) -> None:
    address = other_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    open_to = {"network__bind": "0.0.0.0", "security__allow_insecure": "true"}
    peers = f"[{address}/32]"
    with running_orchestrator(tmp_path, **open_to, security__insecure_peers=peers) as orchestrator:
        stored = orchestrator.ask("add_memory", content="there")["memory_id"]
        with Peer(orchestrator.context, f"tcp://{address}:{orchestrator.port}") as peer:
            assert peer.ask("get_memory", memory_id=stored)["status"] == "success"
            assert peer.ask("add_memory", content="a writer all the same")["status"] == "success"
            for action in ADMIN_PARAMS:
                for dry_run in ({}, {"dry_run": True}):
                    reply = peer.ask(action, **ADMIN_DATA.get(action, {}), **dry_run)
                    assert (action, reply.get("error_code")) == (action, "access_denied")
        assert orchestrator.ask("list_runs")["count"] == 0
        assert_admin(orchestrator)


def assert_admin(orchestrator: Orchestrator) -> None:
    for action in ("run_decay", "run_cleanup", "run_checkpoint", "list_runs", "export_memories"):
        assert orchestrator.ask(action)["status"] == "success"
