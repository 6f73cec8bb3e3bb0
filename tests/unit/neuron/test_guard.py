"""Who may use a node: the token, the names it answers to, and web pages."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from helexa.core.errors import InvalidApiKey, PermissionDenied
from helexa.neuron.guard import Guard, own_names

OURS = [
    None,
    "localhost",
    "localhost:13131",
    "127.0.0.1:13131",
    "[::1]:13131",
    "10.0.0.7",
    "beast",
    "beast.internal:13131",
    "beast.local",
    "LOCALHOST:13131",
    "node.example.com",
    "Node.Example.COM.:13131",
    socket.gethostname(),
]
FOREIGN = [
    "evil.example",
    "evil.example:13131",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "node.example.com.evil.org",
]


@pytest.mark.parametrize("host", OURS)
def test_our_own_names_are_answered(host: str | None) -> None:
    Guard(None, ["node.example.com"]).check_host(host)


@pytest.mark.parametrize("host", FOREIGN)
def test_a_public_name_that_nobody_configured_is_refused(host: str) -> None:
    with pytest.raises(PermissionDenied, match="allowed_hosts"):
        Guard(None, ["node.example.com"]).check_host(host)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000"])
def test_a_web_page_is_told_that_it_may_not(origin: str) -> None:
    with pytest.raises(PermissionDenied, match="web page"):
        Guard(None, []).check_origin(origin)
    Guard(None, []).check_origin(None)


@pytest.mark.parametrize("sent", ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret"])
def test_the_token_lets_in(sent: str) -> None:
    Guard("s3cret", []).check_token(sent)


@pytest.mark.parametrize(
    "sent", [None, "", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer s3crets", "Bearer é"]
)
def test_anything_but_the_token_is_refused(sent: str | None) -> None:
    with pytest.raises(InvalidApiKey):
        Guard("s3cret", []).check_token(sent)


def test_without_a_token_nobody_needs_one() -> None:
    Guard(None, []).check_token(None)
    Guard(None, []).check_token("Bearer whatever")


def test_the_hostname_is_ours_in_the_domains_that_are_searched(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# comment\nsearch eng.acme.example lab.acme.example\nnameserver 10.0.0.1\noptions ndots:1\n")
    host = socket.gethostname()
    assert own_names(resolv) == [host, f"{host}.eng.acme.example", f"{host}.lab.acme.example"]
    assert own_names(tmp_path / "absent") == [host]
