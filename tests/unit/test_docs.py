"""The documentation says what the code does: an undocumented name, or a documented one that is gone, fails."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agents.base_agent import BaseAgent, Request
from agents.context_manager_agent import ContextManagerAgent
from agents.knowledge_base_agent import KnowledgeBaseAgent
from agents.session_memory_agent import SessionMemoryAgent
from memory_system import protocol
from memory_system.models import PARAMS, Envelope, UpdatePayload
from tests.support.service import running_orchestrator

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), PROJECT / "README.md", PROJECT / "CHANGELOG.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| `([\w-]+)`((?: `[\w-]+`)*) \|(.*)\|$", re.MULTILINE)


def sections(page: str, level: int) -> dict[str, str]:
    """Heading -> text below it, down to the next heading of the same or a higher level."""
    parts = re.split(rf"^(#{{1,{level}}}) (.+)$", page, flags=re.MULTILINE)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {title: text for marks, title, text in found if len(marks) == level}


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
ACTIONS = {title: text for title, text in sections(PROTOCOL, 3).items() if re.fullmatch(r"[a-z_]+", title)}


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a table's rows."""
    return {match[1]: [cell.strip() for cell in match[3].split(" | ")] for match in ROW.finditer(text)}


def test_the_actions_documented_are_those_that_exist() -> None:
    assert set(ACTIONS) == protocol.ACTIONS


@pytest.mark.parametrize("action", sorted(protocol.ACTIONS))
def test_every_field_of_an_action_is_documented_with_its_default(action: str) -> None:
    documented = rows(without_code(ACTIONS[action]))
    fields = {field.name: field for field in msgspec.structs.fields(PARAMS[action])}
    assert set(documented) == set(fields)
    for name, (_, default, meaning) in documented.items():
        assert meaning
        value = fields[name].default
        if fields[name].required:
            assert default == "required", name
        elif isinstance(value, bool | int | float | str):
            assert default == f"`{json.dumps(value)}`", name
        else:
            assert default == "-", name


@pytest.mark.parametrize("action", sorted(protocol.ACTIONS))
def test_every_action_shows_a_request_and_a_reply(action: str) -> None:
    example = re.search(r"^```json\n(.*?)^```", ACTIONS[action], flags=re.MULTILINE | re.DOTALL)
    assert example is not None
    request, size = json.JSONDecoder().raw_decode(example[1])
    assert request["action"] == action
    assert set(request["data"]) <= set(PARAMS[action].__struct_fields__)
    assert example[1][size:].lstrip().startswith("{")
    assert '"status": "success"' in example[1][size:]


AGENTS_PAGE = sections((DOCS / "agents.md").read_text(encoding="utf-8"), 2)
AGENTS: dict[str, type[BaseAgent]] = {
    "Knowledge base": KnowledgeBaseAgent,
    "Session memory": SessionMemoryAgent,
    "Context manager": ContextManagerAgent,
}
AGENT_ACTIONS = [
    (title, action)
    for title, agent in AGENTS.items()
    for action, _ in inspect.getmembers(agent, lambda member: hasattr(member, "_is_action"))
]


def sections_of_agent(title: str) -> dict[str, str]:
    found = sections(f"## {title}\n{AGENTS_PAGE[title]}", 3)
    return {heading: text for heading, text in found.items() if re.fullmatch(r"[a-z_]+", heading)}


@pytest.mark.parametrize("title", AGENTS)
def test_the_actions_documented_of_an_agent_are_those_it_has(title: str) -> None:
    assert set(sections_of_agent(title)) == {action for agent, action in AGENT_ACTIONS if agent == title}


@pytest.mark.parametrize(("title", "action"), AGENT_ACTIONS)
def test_every_field_of_an_agents_action_is_documented_with_its_default(title: str, action: str) -> None:
    documented = rows(without_code(sections_of_agent(title)[action]))
    hints = inspect.get_annotations(getattr(AGENTS[title], action), eval_str=True)
    parameters = inspect.signature(getattr(AGENTS[title], action)).parameters
    fields = {name: each for name, each in parameters.items() if name != "self" and hints[name] is not Request}
    assert set(documented) == set(fields)
    for name, (_, default, meaning) in documented.items():
        assert meaning
        value = fields[name].default
        if value is inspect.Parameter.empty:
            assert default == "required", name
        elif isinstance(value, bool | int | float | str):
            assert default == f"`{json.dumps(value)}`", name
        else:
            assert default == "-", name


@pytest.mark.parametrize(("title", "action"), AGENT_ACTIONS)
def test_every_action_of_an_agent_shows_a_request_and_a_reply(title: str, action: str) -> None:
    example = re.search(r"^```json\n(.*?)^```", sections_of_agent(title)[action], flags=re.MULTILINE | re.DOTALL)
    assert example is not None
    request, size = json.JSONDecoder().raw_decode(example[1])
    assert request["action"] == action
    assert set(request.get("data", {})) <= set(inspect.signature(getattr(AGENTS[title], action)).parameters)
    assert '"status": "success"' in example[1][size:]


def test_the_envelope_and_the_update_payload_are_documented() -> None:
    envelope = rows(sections(PROTOCOL, 2)["Envelope"])
    assert set(Envelope.__struct_fields__) == set(envelope)
    for name in UpdatePayload.__struct_fields__:
        assert f"`{name}`" in ACTIONS["update_memory"]
    for alias in protocol.ACTION_ALIASES:
        assert f"`{alias}`" in PROTOCOL


def test_every_field_and_operator_of_filters_is_documented() -> None:
    from memory_system.filters import CONNECTIVES, FIELDS, OPERATORS

    text = sections(PROTOCOL, 2)["Filters"]
    for name in (*FIELDS, *OPERATORS, *CONNECTIVES):
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), name


def test_the_error_codes_documented_are_those_that_exist() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    documented = rows(page)
    assert set(documented) == protocol.ERROR_CODES
    for code, (retryable, meaning, advice) in documented.items():
        assert retryable == ("yes" if protocol.BY_CODE[code].retryable else "no"), code
        assert meaning
        assert advice


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = ["", "memory_system", "agents", "bench", "examples", "scripts", "tests"]
    written_there = {"grants.yaml", "data/keys/grants.yaml", *re.findall(r"\bas `(\w+\.py)`", text)}  # by a tutorial
    for name in set(re.findall(r"`([\w/-]+\.(?:py|sql|yaml|conf))`", text)) - written_there:
        assert any((PROJECT / folder / name).exists() for folder in folders), f"{page.name}: {name}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_dependency_has_its_line() -> None:
    pinned = (PROJECT / "requirements.txt").read_text(encoding="utf-8").split("# What those need.")[0]
    names = {line.split("==")[0] for line in pinned.splitlines() if "==" in line}
    text = sections((DOCS / "decisions.md").read_text(encoding="utf-8"), 2)["Dependencies"]
    documented = set(re.findall(r"^\| ([\w-]+) \|", text, flags=re.MULTILINE)) - {"package", "---"}
    assert documented == names


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/search.md"])
def test_the_examples_run(page: str, tmp_path: Path) -> None:
    blocks = python_blocks(PROJECT / page)
    assert blocks
    if page == "docs/search.md":  # one program, told in parts
        blocks = ["\n".join(blocks)]
    with running_orchestrator(tmp_path) as orchestrator:
        for block in blocks:
            code = block.replace("tcp://127.0.0.1:7140", orchestrator.address)
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", code],
                env={**os.environ, "PYTHONPATH": str(PROJECT), "MEMORY_ORCHESTRATOR_ADDR": orchestrator.address},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=90,
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            assert done.stdout.strip(), block
            assert "error" not in done.stdout
    if page == "README.md":
        assert "green tea" in done.stdout.splitlines()[0]


def test_the_readmes_example_has_ten_lines() -> None:
    (block,) = python_blocks(PROJECT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
