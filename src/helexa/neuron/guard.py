"""Who may use this node: whoever has the token where there is one, and no web page (core.addresses tells why)."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from helexa.core.addresses import is_own_host
from helexa.core.errors import InvalidApiKey, PermissionDenied

SEEN: Final = 64


class Guard:
    """token: what every request must bear, None for nobody's; names: hosts by which this node may be addressed."""

    def __init__(self, token: str | None, names: Iterable[str]) -> None:
        self._bearer = None if token is None else f"bearer {token}".encode()
        self._names = {name.lower().rstrip(".") for name in (*names, *own_names()) if name}
        self._seen: set[str] = set()  # hosts that were ours: a gateway sends the same one each time

    @property
    def has_token(self) -> bool:
        return self._bearer is not None

    def check_token(self, authorization: str | None) -> None:
        if self._bearer is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = f"{scheme.lower()} {key.strip()}".encode()
        if not hmac.compare_digest(given, self._bearer):
            what = "This node's token was not sent" if authorization is None else "This is not the node's token"
            raise InvalidApiKey(
                f"{what}: send `Authorization: Bearer TOKEN` with the `token` of neuron.toml (in cortex.toml: the same "
                "`token` under [[neurons]])."
            )

    def check_host(self, host: str | None) -> None:
        """host: the header as it came. Browsers always send one, so its absence is nobody's trick. HOT where known."""
        if host is None or host in self._seen:
            return
        if not is_own_host(host, self._names):
            raise PermissionDenied(
                f"The Host {host!r} is not a name of this node. Use its address or its hostname, or add the name to "
                "`allowed_hosts` in neuron.toml."
            )
        if len(self._seen) < SEEN:
            self._seen.add(host)

    def check_origin(self, origin: str | None) -> None:
        if origin is not None:
            raise PermissionDenied(
                f"A web page ({origin}) may not manage this node. Programs: leave the Origin header out; people: use "
                "the gateway's dashboard."
            )


def own_names(resolv_conf: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The hostname, and with it the domains that names are looked up in here. Asks no name server: it may be down."""
    name = socket.gethostname()
    try:
        lines = resolv_conf.read_text().splitlines()
    except OSError:
        lines = []
    words = [line.split() for line in lines]
    domains = {domain for line in words if line and line[0] in ("search", "domain") for domain in line[1:]}
    return [name, *(f"{name}.{domain}" for domain in sorted(domains) if domain != ".")]
