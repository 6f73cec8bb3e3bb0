"""The least loads that any policy can make over all memory as one pool, served in order: a linear programme.

Between two uses of a model it may be kept (no load at the second one) or not, or in part, which makes it a bound.
Across each request, what is kept and the model that is asked for must fit. A gateway that lets requests wait, and
serves those for one model together, may have fewer. For models of one size the bound is what Belady's rule comes to.

Needs scipy, which the gateway itself does not: imported here alone, and only when a bound is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class NoSolver(Exception):
    """scipy is not installed; str() says what to do."""


def least_loads(asked: Sequence[str], mb: Mapping[str, int], capacity_mb: int) -> float:
    """asked: the model of each request, in order; one that is larger than everything is never loaded."""
    try:
        import numpy as np
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix
    except ImportError as err:
        raise NoSolver("the bound needs scipy: pip install scipy") from err

    asked = [model for model in asked if mb[model] <= capacity_mb]
    last: dict[str, int] = {}
    intervals: list[tuple[int, int]] = []
    free_hits = 0
    for at, model in enumerate(asked):
        if model in last:
            if last[model] + 1 < at:
                intervals.append((last[model], at))
            else:
                free_hits += 1
        last[model] = at
    # What cannot be kept beside one of the models that are asked for meanwhile is not kept in part either.
    wanted = np.array([mb[model] for model in asked], dtype=float)
    too_large: dict[int, np.ndarray] = {}  # by size: how many requests up to each leave no room for it
    for size in {mb[model] for model in last}:
        too_large[size] = np.concatenate([[0], np.cumsum(wanted > capacity_mb - size)])
    intervals = [
        (begin, end) for begin, end in intervals if (before := too_large[mb[asked[begin]]])[end] == before[begin + 1]
    ]
    if not intervals:
        return len(asked) - free_hits
    # A row for each request: what is kept across it, and the room that is left (a variable too), come to the rest of
    # the memory. Each row stands as its difference to the one before it, so that an interval is in two rows and not
    # in all that it spans: 30,000 requests take seconds.
    count, kept = len(asked), len(intervals)
    room = np.arange(count)
    begins, ends = np.array(intervals).T
    sizes = np.array([mb[asked[begin]] for begin, _ in intervals], dtype=float)
    rows = np.concatenate([begins + 1, ends, room, room[1:]])
    columns = np.concatenate([np.arange(kept), np.arange(kept), kept + room, kept + room[:-1]])
    values = np.concatenate([sizes, -sizes, np.ones(count), -np.ones(count - 1)])
    found = linprog(
        np.concatenate([-np.ones(kept), np.zeros(count)]),
        A_eq=csr_matrix((values / capacity_mb, (rows, columns)), shape=(count, kept + count)),
        b_eq=np.diff(capacity_mb - wanted, prepend=0.0) / capacity_mb,
        bounds=np.concatenate([np.tile([0.0, 1.0], (kept, 1)), np.tile([0.0, np.inf], (count, 1))]),
        method="highs",
    )
    assert found.success, found.message
    return len(asked) - free_hits + float(found.fun)
