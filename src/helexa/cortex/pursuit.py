"""What the director keeps of one request while it lasts, and how long the request may wait."""

from __future__ import annotations

from math import inf

import msgspec

from helexa.core.errors import BadRequest, HelexaError
from helexa.core.relay.contract import Exchange, Route
from helexa.core.relay.wire import value_of
from helexa.cortex.metrics import Series
from helexa.cortex.nodes import Node, Replica
from helexa.cortex.routing import Routed
from helexa.cortex.targets import Target
from helexa.cortex.translated import Translated
from helexa.cortex.work import Ticket


class NodeRoute(Route, kw_only=True, eq=False):
    """A Route that remembers what `released` has to give back."""

    replica: Replica
    series: Series
    ticket: Ticket | None = None  # where there was a choice


class Pursuit(msgspec.Struct, eq=False):
    """What one request has been through; `Exchange.state`. A Struct for the same reason as Exchange."""

    model: Target
    others: tuple[Target, ...] = ()  # what the alias lists beside it, not tried yet
    reasons: tuple[str, ...] = ()  # why those that the alias lists and that were tried could not serve it
    translated: Translated | None = None  # the request, where nodes do not speak its dialect
    counts: bool = False  # its tokens are counted, and nothing is loaded for that
    routed: Routed | None = None  # where the model has several replicas
    headers_back: bytes = b""  # for the client, once a node is asked: which model answers was open before
    series: Series | None = None  # of the latest attempt, as is
    node: Node | None = None
    broken: list[str] = []  # nodes that failed it, as against those that asked to wait
    last_error: HelexaError | None = None
    passed_on: HelexaError | None = None  # a node's refusal that the client got as it was


def deadline_of(exchange: Exchange, wait_s: float) -> float:
    """Until when it may wait for its model: `wait_s`, or less where the request says so."""
    told = value_of(exchange.head, exchange.head.lower(), b"x-helexa-wait:")
    if told is None:
        return exchange.t_start + wait_s
    try:
        own_s = float(told)
    except ValueError:
        own_s = -1.0
    if not 0 <= own_s < inf:
        raise BadRequest("x-helexa-wait must be the seconds that the request may wait for its model, like 10")
    return exchange.t_start + min(own_s, wait_s)


def tell_all(error: HelexaError, pursuit: Pursuit) -> None:
    """Beside what became of the model tried last, why those before it could not serve."""
    if pursuit.reasons and pursuit.reasons[-1] != error.message:
        error.message = "; before that: ".join(m.rstrip(".") for m in (error.message, *reversed(pursuit.reasons)))
