"""Who may talk to the service. Every port binds to loopback unless the configuration says who else may come in."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from memory_system import keys
from memory_system.errors import AccessDenied, ConfigError
from memory_system.settings import NetworkSettings, SecuritySettings

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_loopback(host: str) -> bool:
    """Whether a bind address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(network: NetworkSettings, security: SecuritySettings) -> None:
    """Raise ConfigError for an address that others can reach, unless callers need a key, or plaintext ones are allowed
    by name; and for keys that are missing, or would count for nothing."""
    if keys.curve_on(security):
        if security.allow_insecure:
            raise ConfigError(
                "security.allow_insecure lets plaintext callers in, and with keys there are none: set it to false, or "
                "security.curve to off"
            )
        return
    if is_loopback(network.bind):
        return
    if not security.allow_insecure:
        raise ConfigError(
            f"network.bind is {network.bind}, which other hosts can reach, and nothing says who may come in; make keys "
            "(make keys), or set it to 127.0.0.1, or, for callers in plaintext, set security.allow_insecure: true with "
            "security.insecure_peers: [CIDR, ...]"
        )
    if not security.insecure_peers:
        raise ConfigError(
            "security.allow_insecure needs security.insecure_peers, the networks that may come in unencrypted, "
            "such as [192.168.1.0/24]"
        )


def policy_for(network: NetworkSettings, security: SecuritySettings) -> PeerPolicy | None:
    """The policy of a socket that listens on `network.bind`; None on loopback, where every peer is of this machine."""
    return None if is_loopback(network.bind) else PeerPolicy(security, own=network.bind)


def is_admin(address: str, bind: str = "") -> bool:
    """Whether a plaintext peer of this IP address may do what only an administrator may: loopback, and nobody else.

    Empty: the socket listens on loopback, where every peer is of this machine. `bind` is the address that the socket
    listens on: where that is one address of the machine, its own programs call from that very address, and nobody else
    can complete a connection from it.
    """
    if not address:
        return True
    ip = _plain(address)
    return ip is not None and (ip.is_loopback or ip == _plain(bind))


class PeerPolicy:
    """Which addresses may send plaintext requests: this host, and the networks of `security.insecure_peers`.

    `own` is the address that is listened on: programs of this host come from there.
    """

    def __init__(self, security: SecuritySettings, own: str = "") -> None:
        allowed: Iterable[str] = security.insecure_peers if security.allow_insecure else ()
        self._own = _plain(own)
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(cidr) for cidr in allowed)
        self._known: dict[str, bool] = {}

    def check(self, address: str) -> None:
        """Raise AccessDenied for a peer that is neither loopback nor in an allowed network."""
        allowed = self._known.get(address)
        if allowed is None:
            if len(self._known) > 10_000:
                self._known.clear()
            allowed = self._known[address] = self._allows(address)
        if not allowed:
            raise AccessDenied(f"{address} is in none of the networks of security.insecure_peers")

    def _allows(self, address: str) -> bool:
        ip = _plain(address)
        if ip is None:
            return False
        return ip.is_loopback or ip == self._own or any(ip in network for network in self._networks)


def _plain(address: str) -> Ip | None:
    """The address, of IPv4 also where it came through a socket of IPv6; None for what is no address."""
    try:
        ip = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return None
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
