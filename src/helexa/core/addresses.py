"""Which hosts and peers are ours: the checks that keep web pages away from a control plane.

A page in a browser on this machine or this network can send requests here. One that had its own name resolve to our
address ("DNS rebinding") still sends that name as `Host`, and such a name must be a public one: nobody can make a
browser load a page from `beast.internal` or `10.0.0.7` without being in the local network anyway. So addresses, names
without a dot and names of domains that nobody can register are ours; any other must be the host's own or configured.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Final

# RFC 6761, RFC 6762, RFC 8375, ICANN's reservation of .internal, and what home routers and companies use, none of
# which the root zone delegates.
PRIVATE_SUFFIXES: Final = (
    ".localhost",
    ".local",
    ".internal",
    ".home.arpa",
    ".lan",
    ".home",
    ".corp",
    ".intranet",
    ".private",
    ".localdomain",
)


def is_own_host(host: str, names: Collection[str]) -> bool:
    """host: a Host header as it came; names: further names by which we may be called, in lower case."""
    name = without_port(host).lower().rstrip(".")
    if "." not in name or name.endswith(PRIVATE_SUFFIXES) or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """A peer's address, as the socket gives it, or the host of a `listen` setting."""
    if address == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def without_port(host: str) -> str:
    """ "[::1]:80" -> "::1", "beast:80" -> "beast"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
