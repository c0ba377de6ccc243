"""The operations: one short method each, grouped by what they do to the store.

A method takes the call and its typed data, and returns the reply or an awaitable of it. It raises errors of
memory_system.errors and nothing else.
"""

from collections.abc import Awaitable
from typing import Any

Reply = dict[str, Any]
Result = Reply | Awaitable[Reply]
