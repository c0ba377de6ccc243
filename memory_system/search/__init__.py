"""The search side: indexes that follow the database, and the queries that read them. Nothing here writes to it."""
