"""What is kept of `/v1/responses`, for its owner: a response, its input, and to forget it. Of the control plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa.core.errors import BadRequest
from helexa.cortex.response_store import Record, ResponseStore, backwards, not_found, owner_of

_encode = msgspec.json.Encoder().encode
_decode_items = msgspec.json.Decoder(list[dict[str, Any]]).decode
_LIMIT: Final = 20  # OpenAI's, as is the bound
_MAX_LIMIT: Final = 100


class _Output(msgspec.Struct):
    output: list[dict[str, Any]] = []


_decode_output = msgspec.json.Decoder(_Output).decode


def routes(store: ResponseStore) -> list[Route]:
    kept = _Kept(store)
    return [
        Route("/v1/responses/{response_id}", kept.one, methods=["GET", "DELETE"]),
        Route("/v1/responses/{response_id}/input_items", kept.input_items),
        Route("/v1/responses/{response_id}/cancel", kept.cancel, methods=["POST"]),
    ]


class _Kept:
    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def _record(self, request: Request) -> Record:
        response_id = request.path_params["response_id"]
        record = self._store.get(_owner(request), response_id)
        if record is None:
            raise not_found("Response", response_id)
        return record

    async def one(self, request: Request) -> Response:
        record = self._record(request)
        if request.method == "DELETE":
            self._store.delete(record.owner, record.id)
            return _json(_encode({"id": record.id, "object": "response", "deleted": True}))
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise BadRequest("A response is kept whole, not as a stream; leave out `stream`", param="stream")
        return _json(record.response)

    async def input_items(self, request: Request) -> Response:
        record = self._record(request)
        items: list[dict[str, Any]] = []
        for before in reversed([*backwards(self._store, record.owner, record.id)]):  # what is gone is not listed
            items += _decode_items(before.input)
            if before is not record:
                items += _decode_output(before.response).output
        return _json(_encode(page(items, request.query_params)))

    async def cancel(self, request: Request) -> Response:
        self._record(request)
        raise BadRequest("Only a response with `background: true` can be cancelled; close the connection of this one")


def page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """One page of items, as `limit`, `order` and `after` ask for it. Raises BadRequest."""
    asked = query.get("limit", str(_LIMIT))
    if not asked.isdecimal() or not 1 <= int(asked) <= _MAX_LIMIT:
        raise BadRequest(f"`limit` must be 1 to {_MAX_LIMIT}, not {asked!r}", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest(f"`order` must be asc or desc, not {order!r}", param="order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        ids = [item.get("id") for item in ordered]
        if after not in ids:
            raise BadRequest(f"`after` names {after!r}, which is not among these items", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    shown = ordered[: int(asked)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0].get("id") if shown else None,
        "last_id": shown[-1].get("id") if shown else None,
        "has_more": len(ordered) > len(shown),
    }


def _owner(request: Request) -> str:
    return owner_of(request.headers.get("authorization") or request.headers.get("x-api-key"))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
