"""Other names for models: what each stands for, and what is wrong with a table of them. Pure.

An alias is a name or a pattern (one `*`, for any text), and stands for one model or for several in order of preference.
What it stands for may be an alias again, but not a pattern's match: a pattern for everything would never end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Table = Mapping[str, str | Sequence[str]]
ANY: Final = "*"


@dataclass(frozen=True, slots=True)
class Pattern:
    prefix: str
    suffix: str
    targets: tuple[str, ...]

    def matches(self, name: str) -> bool:
        long_enough = len(name) >= len(self.prefix) + len(self.suffix)
        return long_enough and name.startswith(self.prefix) and name.endswith(self.suffix)


class Aliases:
    """exact: by alias, what it stands for, aliases of aliases followed to their ends, the preferred first.
    patterns: the longest prefix first, then the longest suffix."""

    def __init__(self, table: Table) -> None:
        self.exact: dict[str, tuple[str, ...]] = {}
        self.patterns: list[Pattern] = []
        self._leading: dict[str, list[str]] = {}
        for alias in table:
            targets = _ends(alias, table)
            for target in targets:
                self._leading.setdefault(target, []).append(alias)
            if ANY in alias:
                prefix, _, suffix = alias.partition(ANY)
                self.patterns.append(Pattern(prefix, suffix, targets))
            else:
                self.exact[alias] = targets
        self.patterns.sort(key=lambda p: (-len(p.prefix), -len(p.suffix)))

    def match(self, name: str) -> tuple[str, ...] | None:
        """What the most exact pattern that the name matches stands for. A name that means something by itself is not
        to be asked for here."""
        return next((p.targets for p in self.patterns if p.matches(name)), None)

    def leading_to(self, model_id: str) -> Sequence[str]:
        """The aliases and patterns that may come to mean this model."""
        return self._leading.get(model_id, ())

    def first(self, name: str, known: Collection[str]) -> str:
        """What is preferred for `name`, where ids of models are the only other names there are."""
        targets = self.exact.get(name) or (None if name in known else self.match(name))
        return targets[0] if targets else name


def targets_of(alias: str, table: Table) -> Sequence[str]:
    """As the table has it; () for what is no alias."""
    value = table.get(alias, ())
    return (value,) if isinstance(value, str) else value


def loop(alias: str, table: Table) -> list[str] | None:
    """A shortest way from an alias back to itself; None where there is none."""
    came_from: dict[str, str] = {}
    ahead = deque([alias])
    while ahead:
        at = ahead.popleft()
        for target in targets_of(at, table):
            if target == alias:
                way = [alias, at]
                while way[-1] != alias:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if target in table and target not in came_from:
                came_from[target] = at
                ahead.append(target)
    return None


def mistakes(alias: str, table: Table) -> Iterator[str]:
    """What is wrong with one entry, beyond how names are written."""
    targets = targets_of(alias, table)
    if not targets:
        yield "stands for nothing; name a model, or take the line out"
    if len(set(targets)) != len(targets):
        yield "names a model twice"
    if alias.count(ANY) > 1:
        yield f'has more than one "{ANY}"; a pattern has one, for any text'
    for target in targets:
        if ANY in target:
            yield f'stands for the pattern "{target}"; name a model or an alias'
    if (way := loop(alias, table)) is not None:
        yield f"leads back to itself: {' -> '.join(way)}"


def _ends(alias: str, table: Table) -> tuple[str, ...]:
    """The models at the ends of all ways, in order of preference. Loops, which are refused elsewhere, end here too."""
    found: dict[str, None] = {}
    seen: set[str] = set()  # what was met once has given its models already, all of them preferred
    ahead = [alias]
    while ahead:
        at = ahead.pop()
        if at not in table:
            found[at] = None
        elif at not in seen:
            seen.add(at)
            ahead += reversed(targets_of(at, table))
    return tuple(found)
