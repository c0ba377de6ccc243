"""Whether a request may be done: the one place that every request of a key passes."""

from __future__ import annotations

from typing import Final

from memory_system.grants import READ, WRITE, Identity, permission_for

_MAX_REMEMBERED: Final = 64  # for each of the identities that are remembered, at most 10,000


def authorise(identity: Identity, action: str, namespace: str) -> None:
    """Raise AccessDenied unless the identity may do this in this namespace.

    What is for operators and administrators is about the whole store, whatever namespace it names. The message has
    nothing but what the caller sent and what its key is called: it is the same whether the namespace exists or not.
    """
    asked = (action, namespace)
    if asked in identity.allowed:
        return
    needed = permission_for(action)
    identity.check_permission(needed, action)
    if action == "get_request_status" or needed in (READ, WRITE):
        identity.check_namespace(namespace)
    if len(identity.allowed) >= _MAX_REMEMBERED:
        identity.allowed.clear()
    identity.allowed.add(asked)
