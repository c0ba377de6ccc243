"""Who may talk to the programs: by address where there are no keys, else by key."""

from memory_system.security.authorise import authorise
from memory_system.security.gate import Gate
from memory_system.security.peers import PeerPolicy, check_bind, is_admin, is_loopback, policy_for

__all__ = ["Gate", "PeerPolicy", "authorise", "check_bind", "is_admin", "is_loopback", "policy_for"]
