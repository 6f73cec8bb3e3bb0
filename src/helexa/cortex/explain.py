"""Why a plan is the one that is taken, in words for an operator. Pure: plans in, one sentence out.

The order of plans is `plans.Order`; what is said is the first thing in it by which the next best plan is worse.
"""

from __future__ import annotations

from collections.abc import Sequence

from helexa.cortex.plans import Plan, Reason


def why_here(best: Plan, weighed: Sequence[Plan | Reason]) -> str:
    """weighed: every node's plan, the best first (this one among them), then the reasons of the others."""
    need = f"{best.model} needs {best.need.total_mb:,} MB ({best.need.source})"
    if not best.victims:
        text = f"{need}, and {best.node} has room for it as it is"
    else:
        text = f"{need}; on {best.node} {_listed(best.victims)} would have to go for it, at a price of {best.price:.3g}"
    if best.drains:
        text += f" ({_listed(best.drains)} {'is' if len(best.drains) == 1 else 'are'} in use, and may finish first)"
    second = next((w for w in weighed if isinstance(w, Plan) and w.node != best.node), None)
    if second is not None:
        return f"{text}; {_worse(best, second)}"
    return text + ("; no other node can hold it now" if len(weighed) > 1 else "")


def _worse(best: Plan, second: Plan) -> str:
    """By what the next best plan is no better, in the order of `plans.Order`."""
    node = second.node
    if best.order[0] != second.order[0]:
        return f"{node} could hold it, and is suspect"
    if best.order[1] != second.order[1]:
        return f"{node} could hold it, and would have to fetch the file first"
    if best.order[2] != second.order[2]:
        if not best.victims:
            return f"on {node}, the next best, {_listed(second.victims)} would have to go"
        if best.order[2][0] != second.order[2][0]:
            return f"{node}, the next best, would displace a higher residency_priority"
        return f"{node}, the next best, would cost {second.price:.3g}"
    if best.left_mb != second.left_mb:
        return f"{node} would leave more room unused ({second.left_mb:,} MB against {best.left_mb:,})"
    return f"{node} is as good, and comes later by name"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
