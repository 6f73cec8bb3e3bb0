"""A saved prompt cache without an engine: any text."""

from __future__ import annotations

import time

from helexa.neuron.kv.states import State
from helexa.neuron.kv.store import KvStore


def put(kept: KvStore, text: str, *, used_at: float | None = None, files: list[str] | None = None) -> State:
    part = kept.begin(len(text))
    assert part is not None
    part.write_text(text)

    def describe(name: str, size_bytes: int, checksum: str) -> State:
        return State(
            name=name,
            key="key",
            model_id="m",
            files=files or ["/m.gguf"],
            slots=4,
            tokens=len(text),
            blocks=[text[:9]],
            size_bytes=size_bytes,
            checksum=checksum,
            used_at=time.time() if used_at is None else used_at,
        )

    return kept.commit(part, "key", describe)
