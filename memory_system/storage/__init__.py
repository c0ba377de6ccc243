"""The only SQL of the project: one writer with group commit, query-only readers."""
