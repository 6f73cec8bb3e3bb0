"""Does the loader get on? For GET /ready: a gateway that holds requests for loads that never end is not ready. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from helexa.cortex.swapper import Phase, Pursuit, State

STILL_S: Final = 120.0  # a load or a drain that shows no change so long stands still; drains end after 30 s
UNTOLD_STILL_S: Final = 600.0  # a load whose node does not tell how far it is

_UNDER_WAY: Final = frozenset({Phase.LOADING, Phase.CLEARING})

# What a node says of a load: anything that is not the same once it has got on. None: it does not tell.
Mark = Callable[[str, str], Hashable | None]


class LoadWatch:
    """mark: what the node (second) says of the model (first) now."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._seen: dict[str, tuple[Hashable, float]] = {}  # model -> how it stood, and since when

    def look(self, state: State, now: float) -> None:
        """To be called whenever something may have changed."""
        for model, pursuit in state.wanted.items():
            stands = self._stands(model, pursuit)
            before = self._seen.get(model)
            if before is None or before[0] != stands:
                self._seen[model] = (stands, now)
        for model in self._seen.keys() - state.wanted.keys():
            del self._seen[model]

    def still(self, state: State, now: float) -> list[str]:
        """What stands still, a sentence for each.

        1. A load whose node shows no change. 2. Room that is not made. 3. Requests that wait for a place, though
        nothing loads or drains that could give them one.
        """
        self.look(state, now)
        moves = any(p.phase in _UNDER_WAY for p in state.wanted.values())
        said = []
        for model, pursuit in state.wanted.items():
            still_s = now - self._seen[model][1]
            where = f"{model} on {pursuit.node}"
            if pursuit.phase is Phase.LOADING:
                tells = pursuit.node is not None and self._mark(model, pursuit.node) is not None
                if still_s >= (STILL_S if tells else UNTOLD_STILL_S):
                    said.append(f"loading {where} has made no progress for {still_s:.0f} s")
            elif pursuit.phase is Phase.CLEARING:
                if still_s >= STILL_S:
                    said.append(f"room for {where} has not come for {still_s:.0f} s")
            elif still_s >= STILL_S and not moves:
                why = "; ".join(f"{f.node}: {f.reason}" for f in pursuit.blocked)
                waiting = f"{len(pursuit.waiters)} requests have waited for {model} for {still_s:.0f} s"
                said.append(f"{waiting}, though nothing loads or drains" + (f" ({why})" if why else ""))
        return said

    def _stands(self, model: str, pursuit: Pursuit) -> Hashable:
        """Looking for a place and resting between two looks are one: neither gets anywhere by itself."""
        if pursuit.phase not in _UNDER_WAY or pursuit.node is None:
            return None
        told = self._mark(model, pursuit.node) if pursuit.phase is Phase.LOADING else None
        return (pursuit.phase, pursuit.node, told)
