"""Orders to nodes: load, unload, estimate, a fresh look. What an order did is written into the fleet's view at once.

An order to a node that dies over it ends with the polls that find it dead, not with its own deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from helexa.core import logs
from helexa.core.errors import Conflict, NoNode, UpstreamError
from helexa.core.lifecycle import Estimate, ModelStatus, UnloadRequest
from helexa.core.relay.upstream import Answer
from helexa.cortex import load_failures
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node
from helexa.cortex.poller import MissError, ask
from helexa.cortex.standing import UNDER_WAY
from helexa.cortex.survey import Survey
from helexa.cortex.swapper import Failure, Kind

log = logs.get("cortex.orders")

# A node answers a load once it knows the file and the memory; that may include asking the Hub about a repository.
ANSWER_S: Final = 60.0
DEFRAG_S: Final = 1800.0  # every loaded model of the node is loaded anew
ESTIMATE_S: Final = 5.0  # a header is read in milliseconds; without an estimate the plan goes by what else is known
LOOK_S: Final = 5.0

HELD: Final = UNDER_WAY | {ModelStatus.LOADED, ModelStatus.UNLOADING}


class Orders:
    def __init__(self, fleet: Fleet, survey: Survey) -> None:
        self._fleet = fleet
        self._survey = survey
        self._followers: dict[str, set[asyncio.Event]] = {}
        fleet.on_change.append(self._changed)

    def close(self) -> None:
        if self._changed in self._fleet.on_change:
            self._fleet.on_change.remove(self._changed)

    async def load(self, model_id: str, node: Node) -> Failure | None:
        """POST /models/load. None: it is loaded or under way."""
        request = self._survey.load_request(model_id, node)
        asked = time.monotonic()
        try:
            answer = await self._post(model_id, node, "/models/load", request, ANSWER_S)
        except (OSError, TimeoutError, ValueError) as err:
            self._fleet.request_failed(node, words(err))
            return Failure(node.name, Kind.GONE, f"did not answer ({words(err)})")
        if answer is None:
            return gone(node)
        if answer.status in (200, 202):
            status = ModelStatus.LOADED if answer.status == 200 else ModelStatus.LOADING
            self._fleet.mark(node, request.model_id, status, asked=asked)
            self._fleet.doubt(node)
            return None
        failure = load_failures.read_refusal(node.name, answer.status, answer.body)
        if failure.kind is Kind.DIFFERENT:
            self._fleet.mark(node, request.model_id, ModelStatus.LOADED, asked=asked)
            self._fleet.doubt(node)
        return failure

    async def follow(self, model_id: str, node: Node) -> Failure | None:
        """Until the fleet's view says that it is loaded, or will not be."""
        with self._watching(model_id) as changed:
            while True:
                info, status = node.models.get(model_id), status_on(node, model_id)
                if status is ModelStatus.LOADED:
                    return None
                if node.state == "down":
                    return gone(node)
                if node.is_set_aside:
                    return Failure(node.name, Kind.GONE, "was drained by the operator before the load ended")
                if status is ModelStatus.FAILED:
                    reason = info.error if info is not None and info.error else "the load failed, without a reason"
                    starved = info is not None and info.error_code == "out_of_memory"
                    return Failure(node.name, Kind.OUT_OF_MEMORY if starved else Kind.FAILED, reason)
                if info is None or status is ModelStatus.UNLOADED:
                    why = (info.error if info is not None else None) or "it was unloaded, or the node restarted"
                    return Failure(node.name, Kind.FAILED, f"gave up the load: {why}")
                changed.clear()
                await changed.wait()

    async def unload(self, model_id: str, node: Node, *, force: bool = False, drain_s: float = 0.0) -> None:
        """Nothing to unload is success. Raises Conflict (model_in_use), NoNode, UpstreamError; the view is then as it
        was before."""
        listed = node.models.get(model_id)
        if listed is None or listed.parsed_status not in HELD:
            return
        before = ModelStatus(listed.status)
        self._fleet.mark(node, listed.id, ModelStatus.UNLOADING)  # nothing new goes there from now on
        asked = time.monotonic()
        request = UnloadRequest(model_id=listed.id, drain_s=drain_s, force=force)
        try:
            answer = await self._post(model_id, node, "/models/unload", request, drain_s + ANSWER_S)
        except (OSError, TimeoutError, ValueError) as err:
            self._fleet.mark(node, listed.id, before, asked=asked)
            self._fleet.request_failed(node, words(err))
            raise NoNode(f"{node.name} did not answer the unload of {model_id} ({words(err)})") from err
        if answer is None:
            self._fleet.mark(node, listed.id, before, asked=asked)
            raise NoNode(f"{node.name} died during the unload of {model_id} ({node.last_error})")
        if answer.status in (200, 202, 404):
            self._fleet.mark(node, listed.id, ModelStatus.UNLOADED, asked=asked)
            self._fleet.doubt(node)
            return
        details = load_failures.active_requests(answer.body) if answer.status == 409 else {}
        active = details.get("active_requests")
        self._fleet.mark(node, listed.id, before, asked=asked, active=active if isinstance(active, int) else None)
        self._fleet.doubt(node)
        said = f"{model_id} on {node.name}: {load_failures.refusal_message(answer.body)}"
        if answer.status == 409:
            raise Conflict(said, code="model_in_use", details=details)
        raise UpstreamError(said)

    async def estimate(self, model_id: str, node: Node) -> Estimate | Failure:
        """What a load would take there. Failure of kind GONE: nothing is known, whatever the reason."""
        request = self._survey.load_request(model_id, node)
        try:
            answer = await self._post(model_id, node, "/models/estimate", request, ESTIMATE_S)
        except (OSError, TimeoutError, ValueError) as err:
            return Failure(node.name, Kind.GONE, f"did not answer ({words(err)})")
        if answer is None:
            return gone(node)
        if answer.status == 200:
            try:
                return msgspec.json.decode(answer.body, type=Estimate)
            except (msgspec.MsgspecError, ValueError, RecursionError) as err:
                return Failure(node.name, Kind.GONE, f"its estimate makes no sense ({err})")
        failure = load_failures.read_refusal(node.name, answer.status, answer.body)
        # 404: the file is not there; where it can be fetched, a load may still succeed
        is_absent = answer.status == 404 and not (request.source or "").startswith("/")
        return (
            failure if failure.kind is Kind.NEVER and not is_absent else Failure(node.name, Kind.GONE, failure.reason)
        )

    async def defrag(self, node: Node) -> dict[str, Any] | Failure:
        """POST /defrag: its memory before and after, and which models' hosts were recycled; or why not."""
        try:
            answer = await node.upstream.fetch("POST", "/defrag", b"{}", timeout_s=DEFRAG_S)
            if answer.status == 200:
                return {key: answer.json().get(key) for key in ("before", "after", "recycled")}
        except (OSError, TimeoutError, ValueError, AttributeError) as err:
            return Failure(node.name, Kind.GONE, words(err))
        return Failure(node.name, Kind.BUSY, load_failures.refusal_message(answer.body))

    async def look(self, node: Node) -> None:
        """Its models and memory as they are now, into the view. A node that does not answer is left to the polls."""
        started = time.monotonic()
        try:
            models, health = await ask(node, LOOK_S)
        except MissError:
            self._fleet.doubt(node)
            return
        self._fleet.saw_poll(node, models=models, health=health, started=started)

    async def _post(self, model_id: str, node: Node, path: str, body: msgspec.Struct, within_s: float) -> Answer | None:
        """None: the node died over it."""
        return await self._while_alive(
            model_id, node, node.upstream.fetch("POST", path, msgspec.json.encode(body), timeout_s=within_s)
        )

    async def _while_alive(self, model_id: str, node: Node, work: Coroutine[Any, Any, Answer]) -> Answer | None:
        order = asyncio.create_task(work)
        try:
            with self._watching(model_id) as changed:
                order.add_done_callback(lambda _: changed.set())
                while not order.done() and node.state != "down":
                    changed.clear()
                    await changed.wait()
            return order.result() if order.done() else None
        finally:
            order.cancel()

    @contextmanager
    def _watching(self, model_id: str) -> Iterator[asyncio.Event]:
        """An event that is set with each change of the model or of a node."""
        changed = asyncio.Event()
        followers = self._followers.setdefault(model_id, set())
        followers.add(changed)
        try:
            yield changed
        finally:
            followers.discard(changed)
            if not followers:
                self._followers.pop(model_id, None)

    def _changed(self, model_id: str | None) -> None:
        if model_id is None:
            events = [event for events in self._followers.values() for event in events]
        else:
            events = list(self._followers.get(model_id, ()))
        for event in events:
            event.set()


def status_on(node: Node, model_id: str) -> ModelStatus | None:
    info = node.models.get(model_id)
    return info.parsed_status if info is not None else None


def gone(node: Node) -> Failure:
    return Failure(node.name, Kind.GONE, f"died during the load ({node.last_error})")


def words(err: BaseException) -> str:
    return str(err) or ("no answer in time" if isinstance(err, TimeoutError) else type(err).__name__)
