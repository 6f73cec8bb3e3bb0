"""The seats of one loaded model: as many requests as its engine has slots, the rest queued here in fairness.

One `Seats` lives as long as one host process does. Who waits is served by turns of its client, and no client may fill
the queue. All calls come from the daemon's loop. Deadlines are the relay's: it cancels the wait, and a wait that is
cancelled has taken nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from helexa.core.errors import HelexaError, Overloaded
from helexa.core.fair_queue import FairQueue, has_share, retry_after_s
from helexa.core.relay.contract import Exchange
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness.base import Session

QUEUE: Final = 256  # waiting requests a model, as many as a gateway lets wait for a load
PACE_OVER: Final = 16  # ends of requests, by which it is told how long those who wait will take


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
        self.last_used = 0.0  # monotonic, of the last admission or release; 0.0: never
        self._queue = queue
        self._refusal: Callable[[], HelexaError] | None = None
        self._waiting: FairQueue[asyncio.Future[Seat]] = FairQueue()
        self._ends: deque[float] = deque(maxlen=PACE_OVER)  # of the last requests since it was idle
        self._idle: list[asyncio.Future[None]] = []

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def enter(self, exchange: Exchange) -> Seat | Awaitable[Seat]:
        """HOT, once per request: with a slot free, two comparisons and a Seat. Raises what `close` was told."""
        if self._refusal is not None:
            raise self._refusal()
        if self.active < self.slots:
            self.last_used = exchange.t_start
            self.active += 1
            return Seat(self)
        client = exchange.header("x-helexa-client") or exchange.client
        own = self._waiting.own(client)
        if self.queued >= self._queue:
            raise self._full(f"all {self.slots} slots are busy and {self.queued} requests wait already")
        if not has_share(self._queue, self.queued, own):
            raise self._full(f"{own} of {self.queued} waiting requests are of {client}, and the last places are kept")
        return self._wait(client)

    def _full(self, why: str) -> Overloaded:
        """With the time in which those who wait will have been served, as fast as it goes now."""
        ends = self._ends
        per_s = len(ends) / max(time.monotonic() - ends[0], 0.001) if len(ends) > 1 else None
        again_s = retry_after_s(self.queued, per_s)
        return Overloaded(
            f"{self.model_id}: {why}. Try again in {again_s} s, or load the model with more slots.",
            retry_after_s=again_s,
        )

    async def _wait(self, client: str) -> Seat:
        if self._refusal is not None:
            raise self._refusal()
        if self.active < self.slots:  # freed since `enter`
            self.active += 1
            return Seat(self)
        granted: asyncio.Future[Seat] = asyncio.get_running_loop().create_future()
        self._waiting.add(client, granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.cancelled() or not granted.done():
                self._waiting.remove(client, granted)
            elif granted.exception() is None:  # granted and cancelled within one turn of the loop
                granted.result().release()
            raise

    def left(self) -> None:
        """A seat came back: it goes to whose turn it is."""
        self.last_used = now = time.monotonic()
        self._ends.append(now)
        while self._waiting:
            granted = self._waiting.pop()
            if not granted.done():
                granted.set_result(Seat(self))
                return
        self.active -= 1
        if not self.active:
            self._ends.clear()
            self._wake_idle()

    def close(self, refusal: Callable[[], HelexaError]) -> None:
        """From now on everybody is refused, those who wait included; running requests go on."""
        self._refusal = refusal
        while self._waiting:
            granted = self._waiting.pop()
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
