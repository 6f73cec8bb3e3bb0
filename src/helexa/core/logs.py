"""Log lines of both programs: structlog, on stderr, as JSON or, on a terminal, for reading.

A logger costs nothing to make: structlog (0.1 s of imports) is loaded with the first line that is written, so that
`cortex --help` and the commands that never log do not pay for it.
"""

from __future__ import annotations

import sys
from typing import Any, Final

LEVELS: Final = ("debug", "info", "warning", "error")

_chosen: dict[str, Any] = {"json": None, "level": "info", "root": None}


class BoundLogger:
    """A named logger. Keyword arguments become fields: `log.info("node is down", node="beast", error=str(err))`."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def bind(self, **fields: Any) -> BoundLogger:
        """The same logger with further fields in each line."""
        return BoundLogger({**self._fields, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """error, with the traceback of the exception that is being handled."""
        self._write("error", event, {"exc_info": True, **fields})

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS.index(level) < LEVELS.index(_chosen["level"]):
            return
        root = _chosen["root"] or _build()
        getattr(root, level)(event, **{**self._fields, **fields})


def configure(*, json: bool | None = None, level: str = "info") -> None:
    """json None: JSON unless stderr is a terminal. Takes effect at once, for every logger there is."""
    if level not in LEVELS:
        raise ValueError(f'log level "{level}" is not known; use one of {", ".join(LEVELS)}')
    _chosen.update(json=json, level=level, root=None)


def get(name: str) -> BoundLogger:
    return BoundLogger({"logger": name})


def writes_json() -> bool:
    """What was chosen, else JSON unless stderr is a terminal; for those who write many lines at once themselves."""
    chosen: bool | None = _chosen["json"]
    return not sys.stderr.isatty() if chosen is None else chosen


def _build() -> Any:
    import msgspec
    import structlog

    as_json = writes_json()
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[Any] = [structlog.processors.add_log_level, stamp]
    if as_json:
        encode = msgspec.json.Encoder(enc_hook=str).encode
        shared += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=lambda event, **_: encode(event).decode()),
        ]
    else:
        shared.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,  # the rich one prints locals: prompts and tokens
            )
        )
    _chosen["root"] = structlog.wrap_logger(_Stderr(), processors=shared, wrapper_class=structlog.BoundLogger)
    return _chosen["root"]


class _Stderr:
    """Writes to what sys.stderr is now: tests and daemons put another there."""

    def msg(self, line: str) -> None:
        stream = sys.stderr
        if stream is not None:
            stream.write(line + "\n")
            stream.flush()

    debug = info = warning = error = msg
