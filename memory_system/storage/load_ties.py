"""Putting in what ties memories together: relationships, context groups and consolidations."""

from __future__ import annotations

from memory_system.errors import InvalidField
from memory_system.export_models import GroupLine, MemberLine, RelationshipLine
from memory_system.line_reader import ConsolidationItem
from memory_system.storage import rows
from memory_system.storage.loading import Loading


def put_relationship(loading: Loading, line: RelationshipLine) -> None:
    if line.source_id == line.target_id:
        raise InvalidField("target_id", "target_id: a memory cannot be related to itself")
    key = (
        loading.row_id(line.source_id, "source_id"),
        loading.row_id(line.target_id, "target_id"),
        line.relationship_type,
    )
    row = loading.db.execute(
        "SELECT strength FROM relationships WHERE source_row_id = ? AND target_row_id = ? AND relationship_type = ?",
        key,
    ).fetchone()
    if row is None:
        loading.add(
            "relationship",
            "INSERT INTO relationships (source_row_id, target_row_id, relationship_type, strength, created_at) "
            "VALUES (?, ?, ?, ?, ?)",
            (*key, line.strength, line.created_at),
        )
    elif row[0] == line.strength:
        loading.unchanged("relationship")
    elif loading.overwrites(
        "relationship",
        ["strength"],
        source_id=line.source_id,
        target_id=line.target_id,
        relationship_type=line.relationship_type,
    ):
        loading.db.execute(
            "UPDATE relationships SET strength = ? WHERE source_row_id = ? AND target_row_id = ? "
            "AND relationship_type = ?",
            (line.strength, *key),
        )


def put_group(loading: Loading, line: GroupLine) -> None:
    row = loading.db.execute(
        "SELECT group_id, description FROM context_groups WHERE namespace = ? AND name = ?",
        (loading.context.namespace, line.name),
    ).fetchone()
    if row is None:
        # Agents know a group by its number, which is kept unless another group has it.
        loading.add(
            "group",
            "INSERT INTO context_groups (group_id, namespace, name, description, created_at) "
            "SELECT CASE WHEN NOT EXISTS (SELECT 1 FROM context_groups WHERE group_id = ?1) THEN ?1 END, "
            "?2, ?3, ?4, ?5",
            (line.group_id, loading.context.namespace, line.name, line.description, line.created_at),
        )
    elif row[1] == line.description:
        loading.unchanged("group")
    elif loading.overwrites("group", ["description"], name=line.name):
        loading.db.execute("UPDATE context_groups SET description = ? WHERE group_id = ?", (line.description, row[0]))


def put_member(loading: Loading, line: MemberLine) -> None:
    row_id = loading.row_id(line.memory_id, "memory_id")
    group = loading.db.execute(
        "SELECT group_id FROM context_groups WHERE namespace = ? AND name = ?",
        (loading.context.namespace, line.group),
    ).fetchone()
    if group is None and not loading.order.dry_run:
        raise InvalidField("group", f"group: no context group {line.group!r} in this namespace")
    key = (None if group is None else group[0], row_id)
    if loading.db.execute("SELECT 1 FROM group_members WHERE group_id = ? AND row_id = ?", key).fetchone():
        loading.unchanged("member")
    else:
        loading.add(
            "member",
            "INSERT INTO group_members (group_id, row_id, added_at) VALUES (?, ?, ?)",
            (*key, line.added_at),
        )


def put_consolidation(loading: Loading, item: ConsolidationItem) -> None:
    row_id = loading.row_id(item.memory_id, "memory_id")
    rows_of = {name: loading.row_id(name, f"members[{place}].memory_id") for place, name in enumerate(item.members)}
    stored = loading.db.execute(
        "SELECT kind, summariser, pieces FROM consolidations WHERE row_id = ?", (row_id,)
    ).fetchone()
    pieces = None if item.pieces is None else rows.to_json([[rows_of[name], text] for name, text in item.pieces])
    if stored is None:
        loading.tally.added["consolidation"] += 1
    elif stored == (item.kind, item.summariser, pieces) and _members(loading, row_id) == set(rows_of.values()):
        loading.unchanged("consolidation")
        return
    elif not loading.overwrites("consolidation", ["members"], memory_id=item.memory_id):
        return
    if loading.order.dry_run:
        return
    for number in _members(loading, row_id) | set(rows_of.values()):
        if number is not None:
            loading.context.log_change(number, "put")
    loading.db.execute("DELETE FROM consolidations WHERE row_id = ?", (row_id,))
    loading.db.execute(
        "INSERT INTO consolidations (row_id, kind, summariser, pieces, created_at) VALUES (?, ?, ?, ?, ?)",
        (row_id, item.kind, item.summariser, pieces, item.created_at),
    )
    loading.db.executemany(
        "INSERT INTO consolidation_members (row_id, member_row_id, before) VALUES (?, ?, ?)",
        [(row_id, number, rows.to_json(item.members[name])) for name, number in rows_of.items()],
    )


def _members(loading: Loading, row_id: int | None) -> set[int | None]:
    found = loading.db.execute("SELECT member_row_id FROM consolidation_members WHERE row_id = ?", (row_id,))
    return {row[0] for row in found}
