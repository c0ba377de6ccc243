"""Whether a request may be done: the one place that every request of a key passes."""

from __future__ import annotations

from memory_system.grants import READ, WRITE, Identity, permission_for


def authorise(identity: Identity, action: str, namespace: str) -> None:
    """Raise AccessDenied unless the identity may do this in this namespace.

    What is for operators and administrators is about the whole store, whatever namespace it names. The message has
    nothing but what the caller sent and what its key is called: it is the same whether the namespace exists or not.
    """
    needed = permission_for(action)
    identity.check_permission(needed, action)
    if action == "get_request_status" or needed in (READ, WRITE):
        identity.check_namespace(namespace)
