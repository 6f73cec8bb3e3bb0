"""How a load stands, as those who wait for it are told. Pure. What nobody knows is left out, never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from helexa.core.errors import ModelLoading
from helexa.core.lifecycle import ModelInfo, ModelStatus

UNDER_WAY: Final = frozenset({ModelStatus.LOADING, ModelStatus.DOWNLOADING, ModelStatus.RECOVERING})

RETRY_AFTER_S: Final = 5  # where there is no estimate
RETRY_AFTER_MOST_S: Final = 60


@dataclass(frozen=True, slots=True)
class Standing:
    """node: None while one is looked for. info: what that node says. left_s: from the last load there.
    is_clearing: other models are going there first."""

    model: str
    node: str | None = None
    info: ModelInfo | None = None
    left_s: float | None = None
    is_clearing: bool = False

    @property
    def doing(self) -> str:
        status = self.info.parsed_status if self.info is not None else None
        return status.value if status is not None and status in UNDER_WAY else ModelStatus.LOADING.value

    @property
    def fraction(self) -> float | None:
        return self.info.progress.fraction if self.info is not None and self.info.progress is not None else None

    @property
    def eta_s(self) -> float | None:
        """The node's own figure before ours."""
        if self.info is not None and self.info.progress is not None and self.info.progress.eta_seconds is not None:
            return self.info.progress.eta_seconds
        return self.left_s if self.left_s is not None and self.left_s > 0 else None

    @property
    def retry_after_s(self) -> int:
        return max(1, min(RETRY_AFTER_MOST_S, ceil(self.eta_s))) if self.eta_s is not None else RETRY_AFTER_S

    def heartbeat(self) -> bytes:
        """As one line: a file's name may hold a line break."""
        if self.node is None:
            text = f"waiting for a node that can load {self.model}"
        elif self.is_clearing:
            text = f"making room for {self.model} on {self.node}"
        else:
            far = ", ".join(self._how_far())
            text = f"{self.doing} {self.model} on {self.node}" + (f": {far}" if far else "")
        return "".join(c if c.isprintable() else "?" for c in text).encode()

    def _how_far(self) -> Iterator[str]:
        """As far as it is known: the share, the bytes, the seconds left."""
        if self.fraction is not None:
            yield f"{self.fraction * 100:.0f} %"
        progress = self.info.progress if self.info is not None else None
        if progress is not None and progress.bytes_done is not None and progress.bytes_total:
            yield f"{progress.bytes_done / 1e9:.2f} of {progress.bytes_total / 1e9:.2f} GB"
        if self.eta_s is not None:
            yield f"about {ceil(self.eta_s)} s left"

    def still_loading(self) -> ModelLoading:
        """For a request that cannot wait longer."""
        told: dict[str, Any] = {
            "state": self.doing if self.node is not None and not self.is_clearing else "waiting",
            "node": self.node,
            "progress": self.fraction,
            "eta_seconds": round(self.eta_s, 1) if self.eta_s is not None else None,
        }
        doing = f"{self.doing} on {self.node}" if self.node is not None else "waiting for a node that can load it"
        if self.is_clearing:
            doing = f"waiting for room on {self.node}"
        return ModelLoading(
            f"{self.model} is still {doing}; try again in {self.retry_after_s} s",
            retry_after_s=self.retry_after_s,
            details={"loading": {key: value for key, value in told.items() if value is not None}},
        )
