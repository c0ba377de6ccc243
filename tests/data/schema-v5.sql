-- The whole current schema. The store executes this file for a new database; an older database is brought
-- here by memory_system/storage/migrations.py, and a test holds the two equal.
--
-- Times are REAL seconds since 1970-01-01 UTC. JSON is TEXT. Every query of a tenant names its namespace.

PRAGMA application_id = 0x4d454d31;

-- store_epoch: random, written anew by a restore; what was derived under another epoch is dropped.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- commit_seq rises by one with each committed request of a writing action in the namespace.
CREATE TABLE namespaces (
    namespace  TEXT PRIMARY KEY,
    commit_seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- AUTOINCREMENT, because row_id is also the label in the indexes: the id of a deleted row must never come back.
CREATE TABLE memories (
    row_id           INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace        TEXT    NOT NULL,
    memory_id        TEXT    NOT NULL,
    content          TEXT    NOT NULL,
    content_digest   BLOB    NOT NULL,              -- blake2b-128 of the UTF-8 content
    memory_type      TEXT    NOT NULL,
    memory_tier      TEXT    NOT NULL CHECK (memory_tier IN ('short', 'medium', 'long')),
    importance       REAL    NOT NULL CHECK (importance BETWEEN 0 AND 1),   -- as of importance_at
    importance_at    REAL    NOT NULL,
    access_count     INTEGER NOT NULL DEFAULT 0,
    last_accessed_at REAL,
    created_at       REAL    NOT NULL,
    updated_at       REAL    NOT NULL,
    occurred_at      REAL,
    expires_at       REAL,
    tier_since       REAL    NOT NULL,
    due_at           REAL,                          -- next instant at which the lifecycle has to decide
    metadata         TEXT    NOT NULL DEFAULT '{}',
    tags             TEXT    NOT NULL DEFAULT '[]',
    parent_id        TEXT,
    session_id       TEXT,
    user_id          TEXT,
    created_by       TEXT    NOT NULL,
    version          INTEGER NOT NULL DEFAULT 1,
    state            TEXT    NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'archived')),
    archived_at      REAL,                          -- since when it is archived
    tier_accesses    INTEGER NOT NULL DEFAULT 0,    -- accesses since tier_since
    promote_at       REAL,                          -- when it earned its promotion before its time
    UNIQUE (namespace, memory_id),
    FOREIGN KEY (namespace, parent_id) REFERENCES memories (namespace, memory_id)
) STRICT;

CREATE INDEX memories_by_creation ON memories (namespace, created_at);
CREATE INDEX memories_by_parent ON memories (namespace, parent_id, created_at) WHERE parent_id IS NOT NULL;
CREATE INDEX memories_by_session ON memories (namespace, session_id, created_at) WHERE session_id IS NOT NULL;
CREATE INDEX memories_by_user ON memories (namespace, user_id) WHERE user_id IS NOT NULL;
CREATE INDEX memories_by_due ON memories (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX sessions_by_creation ON memories (namespace, created_at) WHERE memory_type = 'session';

-- What a memory of type 'session' has beyond a memory. One that nobody ended has ended by itself when idle_timeout_s
-- have passed since its newest memory, or since resumed_at: that is computed, never written.
CREATE TABLE sessions (
    row_id         INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    session_type   TEXT NOT NULL,
    ended_at       REAL,
    summary        TEXT,
    idle_timeout_s REAL,
    resumed_at     REAL
) STRICT;

-- The versions that an update replaced.
CREATE TABLE memory_history (
    row_id      INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    version     INTEGER NOT NULL,
    record      TEXT    NOT NULL,
    replaced_at REAL    NOT NULL,
    replaced_by TEXT    NOT NULL,
    PRIMARY KEY (row_id, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE relationships (
    source_row_id     INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    target_row_id     INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    relationship_type TEXT    NOT NULL,
    strength          REAL    NOT NULL CHECK (strength BETWEEN 0 AND 1),
    created_at        REAL    NOT NULL,
    PRIMARY KEY (source_row_id, target_row_id, relationship_type)
) STRICT, WITHOUT ROWID;

CREATE INDEX relationships_by_target ON relationships (target_row_id);

CREATE TABLE context_groups (
    group_id    INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace   TEXT NOT NULL,
    name        TEXT NOT NULL,
    description TEXT,
    created_at  REAL NOT NULL,
    UNIQUE (namespace, name)
) STRICT;

CREATE TABLE group_members (
    group_id INTEGER NOT NULL REFERENCES context_groups (group_id) ON DELETE CASCADE,
    row_id   INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    added_at REAL    NOT NULL,
    PRIMARY KEY (group_id, row_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX group_members_by_row ON group_members (row_id);

-- The runs of maintenance: what each was asked for, and what it did. `result` is JSON.
CREATE TABLE maintenance_runs (
    run_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    job         TEXT    NOT NULL,
    request_id  TEXT    UNIQUE,
    asked       TEXT    NOT NULL,                   -- the fields of the request, as JSON
    asked_by    TEXT    NOT NULL,                   -- the caller
    as_of       REAL    NOT NULL,
    dry_run     INTEGER NOT NULL CHECK (dry_run IN (0, 1)),
    started_at  REAL    NOT NULL,
    finished_at REAL,
    state       TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
    result      TEXT,
    error       TEXT
) STRICT;

CREATE INDEX maintenance_runs_by_job ON maintenance_runs (job, run_id);

-- One row for each memory that consolidation made. `pieces`: JSON [[member_row_id, text], ...], the parts of its content
-- in order, with the memory each was taken from; NULL when the summariser could not say (then a deleted member undoes it).
CREATE TABLE consolidations (
    row_id     INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    kind       TEXT NOT NULL CHECK (kind IN ('summary', 'duplicates')),
    summariser TEXT NOT NULL,
    pieces     TEXT,
    created_at REAL NOT NULL
) STRICT;

-- The originals of a consolidated memory. `before`: JSON of the fields that archiving changed, for undo.
CREATE TABLE consolidation_members (
    row_id        INTEGER NOT NULL REFERENCES consolidations (row_id) ON DELETE CASCADE,
    member_row_id INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    before        TEXT    NOT NULL,
    PRIMARY KEY (row_id, member_row_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX consolidation_members_by_member ON consolidation_members (member_row_id);

-- Originals that an undo brought back: they are not consolidated again.
CREATE TABLE consolidations_undone (
    row_id    INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    undone_at REAL NOT NULL
) STRICT;

-- One row for each write that carried a request_id, in the transaction of the write itself. The reply holds ids and
-- versions, never content. Rows stand in the order of time, so that old ones are pruned from the low end.
CREATE TABLE idempotency (
    entry       INTEGER PRIMARY KEY,
    namespace   TEXT NOT NULL,
    caller      TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    reply       TEXT NOT NULL,
    created_at  REAL NOT NULL,
    UNIQUE (namespace, caller, request_id)
) STRICT;

-- Every change of content, state, existence or vector, for the indexes that are derived from this database.
CREATE TABLE index_log (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,
    row_id INTEGER NOT NULL,
    op     TEXT NOT NULL CHECK (op IN ('put', 'delete', 'vector'))
) STRICT;

-- The vector of a memory's content, float32 little-endian, unit length. Valid only while digest and model agree.
CREATE TABLE embeddings (
    row_id   INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    model_id TEXT NOT NULL,
    digest   BLOB NOT NULL,
    vector   BLOB NOT NULL
) STRICT;

PRAGMA user_version = 5;
