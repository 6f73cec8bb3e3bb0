"""The seats of one loaded model: as many requests as its engine has slots, the rest queued here in fairness.

One `Seats` lives as long as one host process does. Who waits is served by turns of its client, so that one caller
with a hundred requests does not stand before everybody else's one. All calls come from the daemon's loop. Deadlines
are the relay's: it cancels the wait, and a wait that is cancelled has taken nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from helexa.core.errors import HelexaError, Overloaded
from helexa.core.relay.contract import Exchange
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness.base import Session

QUEUE: Final = 256  # waiting requests a model, as many as a gateway lets wait for a load


class Seat:
    """One request's place at a model. Given back once, however often `release` is called."""

    __slots__ = ("_seats", "_taken", "model_id", "session", "upstream")

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._taken = True
        self.model_id = seats.model_id
        self.session = seats.session
        self.upstream = seats.upstream

    def release(self) -> None:
        if self._taken:
            self._taken = False
            self._seats.left()

    def host_progress(self) -> float:
        """Monotonic time at which the host was last known to be at work."""
        return self._seats.alive_at()


class Seats:
    """alive_at: monotonic time of the last sign of life of the host."""

    def __init__(
        self,
        model_id: str,
        slots: int,
        session: Session,
        upstream: Upstream,
        alive_at: Callable[[], float],
        *,
        queue: int = QUEUE,
    ) -> None:
        self.model_id = model_id
        self.slots = slots
        self.session = session
        self.upstream = upstream
        self.alive_at = alive_at
        self.active = 0
        self.queued = 0
        self.last_used = 0.0  # monotonic, of the last admission or release; 0.0: never
        self._queue = queue
        self._refusal: Callable[[], HelexaError] | None = None
        self._turns: deque[str] = deque()  # clients with waiting requests, whose turn it is first
        self._waiting: dict[str, deque[asyncio.Future[Seat]]] = {}
        self._idle: list[asyncio.Future[None]] = []

    def enter(self, exchange: Exchange) -> Seat | Awaitable[Seat]:
        """HOT, once per request: with a slot free, two comparisons and a Seat. Raises what `close` was told."""
        if self._refusal is not None:
            raise self._refusal()
        if self.active < self.slots:
            self.last_used = exchange.t_start
            self.active += 1
            return Seat(self)
        if self.queued >= self._queue:
            raise Overloaded(
                f"{self.model_id}: all {self.slots} slots are busy and {self.queued} requests wait already. "
                "Try again in a few seconds, or load the model with more slots."
            )
        return self._wait(exchange.header("x-helexa-client") or exchange.client)

    async def _wait(self, client: str) -> Seat:
        if self._refusal is not None:
            raise self._refusal()
        if self.active < self.slots:  # freed since `enter`
            self.active += 1
            return Seat(self)
        granted: asyncio.Future[Seat] = asyncio.get_running_loop().create_future()
        self._enqueue(client, granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.cancelled() or not granted.done():
                self._forget(client, granted)
            elif granted.exception() is None:  # granted and cancelled within one turn of the loop
                granted.result().release()
            raise

    def left(self) -> None:
        """A seat came back: it goes to whose turn it is."""
        self.last_used = time.monotonic()
        while self.queued:
            granted = self._next()
            if not granted.done():
                granted.set_result(Seat(self))
                return
        self.active -= 1
        if not self.active:
            self._wake_idle()

    def close(self, refusal: Callable[[], HelexaError]) -> None:
        """From now on everybody is refused, those who wait included; running requests go on."""
        self._refusal = refusal
        while self.queued:
            granted = self._next()
            if not granted.done():
                granted.set_exception(refusal())

    def reopen(self) -> None:
        self._refusal = None

    async def idle(self) -> None:
        """Returns when no request runs."""
        while self.active:
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(woken)
            await woken

    def _wake_idle(self) -> None:
        for woken in self._idle:
            if not woken.done():
                woken.set_result(None)
        self._idle.clear()

    def _enqueue(self, client: str, granted: asyncio.Future[Seat]) -> None:
        line = self._waiting.get(client)
        if line is None:
            line = self._waiting[client] = deque()
            self._turns.append(client)
        line.append(granted)
        self.queued += 1

    def _next(self) -> asyncio.Future[Seat]:
        client = self._turns.popleft()
        line = self._waiting[client]
        granted = line.popleft()
        self.queued -= 1
        if line:
            self._turns.append(client)
        else:
            del self._waiting[client]
        return granted

    def _forget(self, client: str, granted: asyncio.Future[Seat]) -> None:
        line = self._waiting.get(client)
        if line is None or granted not in line:
            return  # `left` has passed over it already
        line.remove(granted)
        self.queued -= 1
        if not line:
            del self._waiting[client]
            self._turns.remove(client)
