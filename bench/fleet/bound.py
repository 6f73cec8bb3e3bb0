"""The least loads that any policy can make, for models of one size in one pool, served in order: a linear programme.

Between two uses of a model it may be kept (no load at the second one) or not. Kept intervals are what is chosen; at
each request, what is kept across it, and the model that is asked for, must fit. The matrix is one of intervals, so that
the programme's optimum is whole. Needs scipy, of the development extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def least_loads(models: Sequence[str], capacity: int) -> float:
    """models: what each request asks for, in order. capacity: how many fit."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    last: dict[str, int] = {}
    intervals: list[tuple[int, int]] = []
    for at, model in enumerate(models):
        if model in last and last[model] + 1 < at:
            intervals.append((last[model], at))
        last[model] = at
    free_hits = sum(a == b for a, b in pairwise(models))
    if not intervals:
        return len(models) - free_hits
    rows = [at for begin, end in intervals for at in range(begin + 1, end)]
    columns = [i for i, (begin, end) in enumerate(intervals) for _ in range(begin + 1, end)]
    across = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(models), len(intervals)))
    found = linprog(-np.ones(len(intervals)), A_ub=across, b_ub=np.full(len(models), capacity - 1), bounds=(0, 1))
    assert found.success, found.message
    return len(models) - free_hits + float(found.fun)
