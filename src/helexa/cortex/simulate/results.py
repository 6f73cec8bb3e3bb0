"""What a run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeUse:
    """Memory that models held, over time."""

    name: str
    total_mb: int
    mean_mb: float
    peak_mb: int


@dataclass(frozen=True, slots=True)
class Results:
    """cold_starts: loads that a request waited for; copies: second ones, which none did. cold_requests: those that
    found their model nowhere. load_seconds: of all loads. waits: until a slot was theirs, seconds, sorted; of those
    that were not refused. computed_tokens: of prompts, those that no cache had."""

    name: str
    requests: int
    seconds: float
    refused: int
    cold_starts: int
    cold_requests: int
    copies: int
    evictions: int
    drains: int
    load_seconds: float
    waits: Sequence[float]
    nodes: Sequence[NodeUse]
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int

    @property
    def mean_wait_s(self) -> float:
        return sum(self.waits) / len(self.waits) if self.waits else 0.0

    def wait_s(self, share: float) -> float:
        """The wait that this share of the requests stays within."""
        return self.waits[min(len(self.waits) - 1, int(share * len(self.waits)))] if self.waits else 0.0

    @property
    def cached(self) -> float:
        """The share of prompts that the caches had."""
        return 1 - self.computed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0
