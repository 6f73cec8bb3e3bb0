"""Which of the models that an alias lists serves a request: the first that can within the time it may wait.

The rule is `first_in_time`, pure; the class looks up what it is asked with, and remembers what has just failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from helexa.core.errors import HelexaError
from helexa.cortex.nodes import Replica


@dataclass(frozen=True, slots=True)
class Outlook:
    """wait_s: until the model can take a request; None: nobody knows. is_failing: it could not be had lately."""

    wait_s: float | None
    is_failing: bool = False


class Option(Protocol):
    """One of the models: its id, and the fleet's live list of where it is loaded."""

    id: str
    replicas: list[Replica]


T = TypeVar("T", bound=Option)


def first_in_time(outlooks: Iterable[Outlook], left_s: float) -> int | None:
    """The place in the order of the one to take; None where all are failing.

    1. The first that is not failing and comes in time; what nobody knows is taken to.
    2. None does: of those that are not failing, the one that comes first.
    """
    best: tuple[float, int] | None = None
    for index, outlook in enumerate(outlooks):
        if outlook.is_failing:
            continue
        if outlook.wait_s is None or outlook.wait_s <= left_s:
            return index
        if best is None or outlook.wait_s < best[0]:
            best = (outlook.wait_s, index)
    return best[1] if best is not None else None


class Fallbacks:
    """to_load: the outlook of a model that is loaded nowhere."""

    def __init__(self, to_load: Callable[[str], Outlook], clock: Callable[[], float]) -> None:
        self._to_load = to_load
        self._clock = clock
        self._passed_over: dict[str, float] = {}  # until when

    def choose(self, options: Sequence[T], left_s: float) -> T | None:
        """None where all are failing. Looks no further than it has to."""
        now = self._clock()
        index = first_in_time((self._outlook(option, now) for option in options), left_s)
        return None if index is None else options[index]

    def failed(self, model_id: str, error: HelexaError) -> None:
        """A request could not have it. The next ones do not wait for the same."""
        self._passed_over[model_id] = self._clock() + (error.retry_after_s or 5)

    def _outlook(self, option: Option, now: float) -> Outlook:
        if self._passed_over.get(option.id, 0.0) > now and not option.replicas:
            return Outlook(None, is_failing=True)
        return loaded(option.replicas, now) if option.replicas else self._to_load(option.id)


def loaded(replicas: Iterable[Replica], now: float) -> Outlook:
    """Of the replica that has a place first."""
    waits: list[float] = []
    for replica in replicas:
        beyond = replica.beyond_slots
        if beyond < 0:
            return Outlook(0.0)
        pace = replica.pace(now)
        if pace is not None:
            waits.append((beyond + 1) / pace)
    return Outlook(min(waits, default=None))
