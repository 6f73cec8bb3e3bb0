"""Keeps the fleet's view fresh: asks every node at an interval, and listens to its events between.

Each node has tasks and deadlines of its own, so that one that hangs delays nobody. Polls decide whether a node is
alive; events bring changes at once, and an event stream that ends makes the next poll come at once. A node without
/events is simply polled. An answer that is late, refused or makes no sense is a miss with a reason, not an error here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from helexa.core import logs
from helexa.core.config import CortexSettings
from helexa.core.discovery import DeviceHealth, Discovery, NodeHealth
from helexa.core.lifecycle import ModelInfo
from helexa.core.sse import EventReader
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node

log = logs.get("cortex.poller")

T = TypeVar("T")

SILENCE_S: Final = 15.0  # a neuron sends a comment every 5 s
RECONNECT_S: Final = 0.1  # the first pause after an event stream ended; doubles up to the poll interval
NO_EVENTS_S: Final = 60.0  # until a node that has no /events is asked for them again: it may be a newer one by then


# What msgspec raises: its own, UnicodeDecodeError (a ValueError) for a string that is no UTF-8, and for deep nesting.
NOT_SENSE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class MissError(Exception):
    """An answer that is none, with the reason. is_silence: nothing came at all, and nothing was refused."""

    def __init__(self, reason: str, *, is_silence: bool = False) -> None:
        super().__init__(reason)
        self.is_silence = is_silence


class _EventHead(msgspec.Struct):
    type: str
    seq: int | None = None


class _Snapshot(msgspec.Struct):
    models: list[ModelInfo]
    devices: list[DeviceHealth] = []
    draining: bool = False


@dataclass(slots=True)
class _Watch:
    """One node, as the poller follows it."""

    node: Node
    poll_now: asyncio.Event = field(default_factory=asyncio.Event)
    was_polled: asyncio.Event = field(default_factory=asyncio.Event)
    uptime_s: float = 0.0
    seq: int | None = None
    is_known: bool = False  # /discovery and /version are of the process that runs now


class Poller:
    def __init__(self, fleet: Fleet, settings: CortexSettings) -> None:
        self._fleet = fleet
        self._interval_s = settings.poll.interval_s
        self._deadline_s = settings.poll.interval_s / 2
        self._watches: dict[str, _Watch] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    async def start(self) -> None:
        """Begins, and returns when each node has answered or missed its first poll: at most half an interval."""
        self._fleet.on_doubt.append(self._doubted)
        self.follow()
        await asyncio.gather(*(watch.was_polled.wait() for watch in self._watches.values()))

    async def stop(self) -> None:
        if self._doubted in self._fleet.on_doubt:
            self._fleet.on_doubt.remove(self._doubted)
        tasks = [task for of_node in self._tasks.values() for task in of_node]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def follow(self) -> None:
        """The nodes that the fleet has now, and no other."""
        for name, watch in list(self._watches.items()):
            if self._fleet.nodes.get(name) is not watch.node:
                del self._watches[name]
                for task in self._tasks.pop(name):
                    task.cancel()
        for name, node in self._fleet.nodes.items():
            if name not in self._watches:
                watch = self._watches[name] = _Watch(node)
                work = (self._poll_on(watch), self._listen_on(watch))
                self._tasks[name] = [asyncio.create_task(one) for one in work]

    def _doubted(self, node: Node) -> None:
        watch = self._watches.get(node.name)
        if watch is not None and watch.node is node:
            watch.poll_now.set()

    # polls

    async def _poll_on(self, watch: _Watch) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            watch.poll_now.clear()
            try:
                await self._poll(watch)
            except Exception as err:  # the view of one node must not stop being kept
                log.exception("a poll went wrong", node=watch.node.name)
                self._fleet.saw_miss(watch.node, f"{type(err).__name__}: {err}")
            watch.was_polled.set()
            # after a first miss twice as often, so that a node that is gone is out within two intervals
            every_s = self._deadline_s if watch.node.state == "suspect" else self._interval_s
            await self._pause(watch, began + every_s - loop.time())

    async def _pause(self, watch: _Watch, seconds: float) -> None:
        """Until the next poll is due, or asked for; at least a twentieth of the interval, whoever asks how often."""
        least_s = self._interval_s / 20
        await asyncio.sleep(least_s)
        try:
            async with asyncio.timeout(max(0.0, seconds - least_s)):
                await watch.poll_now.wait()
        except TimeoutError:
            pass

    async def _poll(self, watch: _Watch) -> None:
        node, started = watch.node, time.monotonic()
        try:
            models, health = await ask(node, self._deadline_s)
        except MissError as miss:
            self._fleet.saw_miss(node, str(miss), is_silence=miss.is_silence)
            return
        if health.uptime_secs < watch.uptime_s:
            watch.is_known = False
        watch.uptime_s = health.uptime_secs
        self._fleet.saw_poll(node, models=models, health=health, started=started)
        if not watch.is_known:
            await self._introduce(watch)

    async def _introduce(self, watch: _Watch) -> None:
        """/discovery and /version, asked again with each poll until they are known. Not answering them is no miss."""
        node = watch.node
        try:
            discovery, version = await _both(
                _get(node, "/discovery", Discovery, self._deadline_s),
                _get(node, "/version", dict[str, Any], self._deadline_s),
            )
        except MissError as miss:
            log.debug("node does not say what it is yet", node=node.name, reason=str(miss))
            return
        watch.is_known = True
        self._fleet.saw_discovery(node, discovery, version)

    # events

    async def _listen_on(self, watch: _Watch) -> None:
        pause_s = RECONNECT_S
        while True:
            try:
                heard = await self._listen(watch)
            except (OSError, TimeoutError, ValueError) as err:
                log.debug("event stream broke", node=watch.node.name, reason=str(err))
                heard = True
            except Exception:
                log.exception("listening to events went wrong", node=watch.node.name)
                heard = True
            if not heard:
                await asyncio.sleep(NO_EVENTS_S)
                continue
            if watch.seq is not None:  # it was a stream, and it ended: has the node, too?
                watch.seq, pause_s = None, RECONNECT_S
                watch.poll_now.set()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, self._interval_s)

    async def _listen(self, watch: _Watch) -> bool:
        """One event stream to its end. False: this node has none."""
        started, reader = time.monotonic(), EventReader()
        headers = {"accept": "text/event-stream"}
        async with watch.node.upstream.stream(
            "GET", "/events", headers=headers, head_timeout_s=self._interval_s, idle_s=SILENCE_S
        ) as stream:
            if stream.status in (404, 405, 501):
                return False
            if stream.status != 200:
                raise ValueError(f"GET /events: status {stream.status}")
            async for data in stream:
                for event in reader.feed(data):
                    if event.data and not event.comment:
                        self._take(watch, event.data, started)
        return True

    def _take(self, watch: _Watch, data: bytes, started: float) -> None:
        node = watch.node
        try:
            head = msgspec.json.decode(data, type=_EventHead)
            match head.type:
                case "snapshot":
                    snapshot = msgspec.json.decode(data, type=_Snapshot)
                    self._fleet.saw_snapshot(node, snapshot.models, started)
                    for device in snapshot.devices:
                        self._fleet.saw_device(node, device)
                    if snapshot.draining:
                        self._fleet.saw_draining(node)
                    if node.state != "up":
                        watch.poll_now.set()
                case "model":
                    self._fleet.saw_model(node, msgspec.json.decode(data, type=ModelInfo))
                case "device":
                    self._fleet.saw_device(node, msgspec.json.decode(data, type=DeviceHealth))
                case "draining":
                    self._fleet.saw_draining(node)
        except NOT_SENSE as err:
            raise ValueError(f"an event that makes no sense: {err}") from err
        if head.seq is not None:
            if watch.seq is not None and head.seq != watch.seq + 1:
                watch.poll_now.set()  # something was missed
            watch.seq = head.seq


async def ask(node: Node, within_s: float) -> tuple[list[ModelInfo], NodeHealth]:
    """What it has and how it is, now. Raises MissError."""
    models, health = await _both(
        _get(node, "/models", list[ModelInfo], within_s), _get(node, "/health", NodeHealth, within_s)
    )
    return models, health


async def _get(node: Node, path: str, kind: type[T], within_s: float) -> T:
    try:
        answer = await node.upstream.fetch("GET", path, timeout_s=within_s)
    except TimeoutError:
        raise MissError(f"GET {path}: no answer within {within_s:g} s", is_silence=True) from None
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
        raise MissError(f"GET {path}: {reason}") from err
    if answer.status in (401, 403):
        raise MissError(f"GET {path}: {answer.status}, it refuses our token; is `token` right in [[neurons]]?")
    if answer.status != 200:
        raise MissError(f"GET {path}: status {answer.status}")
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except NOT_SENSE as err:
        raise MissError(f"GET {path}: the answer makes no sense: {err}") from err


async def _both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, Any]) -> tuple[T, Any]:
    """Side by side; both are over, and the first failure is raised."""
    one, two = await asyncio.gather(first, second, return_exceptions=True)
    for outcome in (one, two):
        if isinstance(outcome, BaseException):
            raise outcome
    assert not isinstance(one, BaseException)
    return one, two
