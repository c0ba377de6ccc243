"""Imports point one way: each module imports only from its own layer and those before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = "memory_system"
AGENTS = "agents"

# Low to high. A name stands for a module or a package directly below memory_system, for a program, or for all agents.
LAYERS = (
    ("errors", "config_loader", "cron"),
    (
        "agent_settings",
        "backup_settings",
        "consolidation_settings",
        "health_settings",
        "lifecycle_settings",
        "limits_settings",
        "maintenance_settings",
        "ranking_settings",
        "scheduler_settings",
        "settings",
        "utterance_settings",
    ),
    ("carriers", "deployment", "log", "digest", "events", "keys", ""),
    ("allocator", "process_figures", "traffic", "turns", "protocol", "grants", "rates", "audit"),
    ("outbox", "bus_sender", "error_bus", "heartbeat", "bus_log", "bus_link", "bus_progress", "bus_reader"),
    (
        "breaker",
        "client_retry",
        "client_reports",
        "client_core",
        "client_link",
        "client_pipe",
        "client_search",
        "client_fixed",
        "client_api",
        "memory_client",
    ),
    (
        "connections",
        "connection_judge",
        "connection_guard",
        "security",
        "router",
        "request_server",
        "envelope",
        "fields",
        "handlers",
        "permits",
        "actions",
    ),
    ("program", "reporting", "metrics", "metrics_server", "metrics_start"),
    ("agents",),
    ("scheduling", "memory_scheduler"),
    (
        "params",
        "admin_models",
        "export_models",
        "search_models",
        "models",
        "filters",
        "decoding",
        "line_reader",
        "calls",
        "cursors",
    ),
    ("lifecycle", "consolidation", "storage", "cache", "embedding", "access", "clock_guard"),
    ("search",),
    ("service", "housekeeping", "health"),
    ("dispatch",),
    ("runtime", "orchestrator", "system_health_manager"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The parts that know nothing of each other.
SERVICE = {
    "params",
    "admin_models",
    "search_models",
    "models",
    "filters",
    "decoding",
    "calls",
    "cursors",
    "lifecycle",
    "cache",
    "embedding",
    "access",
    "search",
}
STRANGERS = {
    "cache": {"storage", "embedding", "access"},
    "embedding": {"storage", "access"},
    "storage": {"cache", "embedding", "access"},
    "consolidation": {"cache", "embedding", "storage", "access", "clock_guard"},
    "lifecycle": {"cache", "embedding", "storage", "access"},
    "health": {*SERVICE, "service", "housekeeping"},
    "service": {"health"},
    "housekeeping": {"health"},
    "dispatch": {"health"},
    "runtime": {"health"},
    "orchestrator": {"health"},
}
SERVER_ONLY = (
    "msgspec",
    "numpy",
    "torch",
    "aiosqlite",
    "redis",
    "hnswlib",
    "ctranslate2",
    "uvloop",
    "sqlite3",
    "prometheus_client",
)
# What the programs of agents are built of.
FOR_AGENTS = ("actions", "program", "reporting", "error_bus", "heartbeat", "bus_log", "bus_reader", "metrics")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of the package and the programs."""
    found = {path.stem: path for path in sorted(PROJECT.glob("*.py"))}
    for path in sorted([*(PROJECT / PACKAGE).rglob("*.py"), *(PROJECT / AGENTS).rglob("*.py")]):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """The name in LAYERS: `memory_system.storage.rows` -> storage."""
    names = module.split(".")
    if names[0] != PACKAGE:
        return names[0]
    return names[1] if len(names) > 1 else ""


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Our own modules that a file imports, anywhere in it."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not for_types:
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in below if name in MODULES)
            if node.module in MODULES and not all(name in MODULES for name in below):
                yield node.module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    assert part in RANK, f"{module} stands in no layer: add it to LAYERS and to docs/architecture.md"
    for imported in imports(MODULES[module]):
        other = part_of(imported)
        assert RANK[other] <= RANK[part], f"{module} imports {imported}, which stands above it"
        assert other not in STRANGERS.get(part, ()), f"{module} imports {imported}, which stands beside it"


def test_no_import_cycle() -> None:
    graph = {module: set(imports(path, for_types=False)) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"imports in a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_layers_name_only_what_exists() -> None:
    parts = {part_of(module) for module in MODULES}
    assert set(RANK) - parts == set()


def loaded_by(imports: str, names: tuple[str, ...]) -> str:
    """The modules of these names, and our own, that a fresh interpreter has loaded after these imports."""
    code = f"import sys\n{imports}\nprint(*(name for name in sys.modules if name in {names!r} or '{PACKAGE}.' in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_needs_nothing_of_the_service() -> None:
    loaded = loaded_by("import memory_client", (*SERVER_ONLY, "yaml", "tenacity", "structlog")).split()
    assert [name for name in loaded if not name.startswith(PACKAGE)] == []
    parts = {part_of(name) for name in loaded}
    assert {part for part in parts if RANK[part] > RANK["memory_client"]} == set()
    assert parts & {"config_loader", "settings", "health_settings", "deployment"} == set()


def test_agents_need_nothing_of_the_service() -> None:
    names = ["agents.base_agent", *(f"{PACKAGE}.{name}" for name in FOR_AGENTS)]
    loaded = loaded_by("\n".join(f"import {name}" for name in names), SERVER_ONLY).split()
    assert [name for name in loaded if not name.startswith(PACKAGE)] == []
    assert {part_of(name) for name in loaded if RANK[part_of(name)] >= RANK["models"]} == set()


def test_the_client_layer_imports_only_the_wire() -> None:
    for module, path in MODULES.items():
        if RANK[part_of(module)] == RANK["memory_client"]:
            allowed = {"protocol", "breaker", "errors", "log", "error_bus", "keys", ""}
            others = {part_of(name) for name in imports(path)} - allowed
            assert all(name.startswith("client_") for name in others), f"{module} imports {others}"
