"""Where a model is loaded, and what makes room for it. Pure: a view of the fleet in, a Plan or a NoPlan out.

The loader, the simulator, `cortex plan` and `GET /fleet/plan` all ask this module, so that they cannot disagree.

The rule, measured (docs/explanation/placement.md): the node where the sum of the victims' scores is least, 0 where it
fits without any; of equals the one with the least room left over. It is worth ten times the eviction policy. Load
seconds are told, and never weighed: added to a score with a guessed factor they make 5 to 9 times the loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import ceil, inf
from typing import Final

from helexa.core.lifecycle import ModelStatus
from helexa.cortex import eviction
from helexa.cortex.eviction import FREE, Kept, Policy, Price, Resident
from helexa.cortex.plans import Bar, DeviceView, Need, NodeView, NoPlan, Order, Plan, Reason, Wanted

ALIVE: Final = ("up", "suspect")
_LOADED: Final = ModelStatus.LOADED
_NO_RANK: Final = 2**31


def plan(
    nodes: Iterable[NodeView], wanted: Wanted, policy: Policy, now: float, *, drain: bool = False
) -> Plan | NoPlan:
    """The best plan. drain: models in use may be victims too, which then have to finish first.

    1. Nodes where it fits as they are: no other can be cheaper.
    2. The others in the order of a lower bound of their price, which is made tighter when its turn comes, until the
       bound passes the best plan: a few nodes are looked at closely, not all. Bench: bench/fleet.
    3. None: why, for each node.
    """
    nodes = list(nodes)
    best: Plan | None = None
    full: list[NodeView] = []
    weighed = 0
    for node in nodes:
        if node.state not in ALIVE or (wanted.pinned_on and node.name not in wanted.pinned_on):
            continue
        seat = _seat(node, wanted, {})
        if seat is None:
            full.append(node)
            continue
        weighed += 1
        if best is None or seat.left_mb <= best.left_mb or _lasts(node, wanted) < best.order[:2]:
            order = _order(node, wanted, FREE, seat.left_mb)
            if (best is None or order < best.order) and _bar(node, wanted) is None:
                best = _plan(node, wanted, seat, [], order)
    bounds: list[tuple[bool, bool, Price, int]] = []
    tight: set[int] = set()
    for at, node in enumerate(full):
        last = _lasts(node, wanted)
        if best is None or (*last, FREE) < best.order[:3]:
            cheapest = _cheapest(node, wanted, policy, now, drain=drain)
            if cheapest is not None:
                bounds.append((*last, cheapest, at))
    heapify(bounds)
    while bounds and (best is None or bounds[0][:3] <= best.order[:3]):
        suspect, fetches, cheapest, at = heappop(bounds)
        if at not in tight:
            tight.add(at)
            bound = _bound(full[at], wanted, policy, now, cheapest, drain=drain)
            heappush(bounds, (suspect, fetches, bound, at))
            continue
        found = _by_evicting(full[at], wanted, policy, now, drain=drain)
        weighed += 1
        if found is not None and (best is None or found.order < best.order):
            best = found
    if best is None:
        return NoPlan(wanted.model, lambda: tuple(why_not(node, wanted, policy, now, drain=drain) for node in nodes))
    return replace(best, weighed=weighed)


def _cheapest(node: NodeView, wanted: Wanted, policy: Policy, now: float, *, drain: bool) -> Price | None:
    """What the cheapest victim of a full node costs; None: the node is barred, or not even all that may go make
    room."""
    # HOT, once per resident of the fleet: the tests are why_kept's, without the call.
    need = wanted.need_on.get(node.name, wanted.need)
    if need is None or node.name in wanted.avoid:
        return None
    whole = need.total_mb
    total_mb = room_mb = 0
    for d in node.devices:
        if d.total_mb is not None:
            total_mb += d.total_mb
        if d.free_mb is not None and d.free_mb > d.reserved_mb:
            room_mb += d.free_mb - d.reserved_mb
    if total_mb < whole:
        return None
    movable: list[Resident] = []
    model, by_class, priority = wanted.model, policy.by_class, wanted.priority
    for r in node.residents:
        if r.model == model:
            return None
        if ((r.in_use or r.queued) and not drain) or r.pinned or r.state is not _LOADED:
            continue
        if now >= r.loaded_at + r.min_residency_s and not (by_class and r.priority > priority):
            movable.append(r)
            room_mb += r.mb
    if room_mb < whole or not movable:
        return None
    least_rank, least_score, score_of = _NO_RANK, inf, policy.score
    for r in movable:
        score = 0.0 if r.copies > 1 else score_of(r, now)  # as Policy.price has it
        if score < least_score:
            least_score = score
        if by_class and r.priority < least_rank:
            least_rank = r.priority
    return least_rank if by_class else 0, least_score


def _bound(node: NodeView, wanted: Wanted, policy: Policy, now: float, cheapest: Price, *, drain: bool) -> Price:
    """A price that no plan for this full node is below: the missing memory at the rate of the victim that gives
    most for its score, where that is more than the cheapest victim."""
    need = wanted.need_on.get(node.name, wanted.need)
    assert need is not None
    missing, rate = need.total_mb, inf
    for d in node.devices:
        missing -= d.room_mb
    for r in node.residents:
        if eviction.why_kept(r, policy, wanted.priority, now, drain=drain) is None:
            score = policy.price(r, now)[1]
            if score < rate * r.mb:
                rate = score / r.mb
    # rounded down a little: a sum of floats may come out below what is at least its value
    return cheapest[0], max(cheapest[1], missing * rate * (1 - 1e-9)) if rate < inf else cheapest[1]


def weigh(
    nodes: Iterable[NodeView], wanted: Wanted, policy: Policy, now: float, *, drain: bool = False
) -> list[Plan | Reason]:
    """Every node's own plan, the best first, then the reasons of those without one: what else could be done."""
    plans: list[Plan] = []
    reasons: list[Reason] = []
    for node in nodes:
        found = on_node(node, wanted, policy, now, drain=drain)
        if isinstance(found, Plan):
            plans.append(found)
        else:
            reasons.append(found)
    return [*sorted(plans, key=lambda p: p.order), *reasons]


def on_node(node: NodeView, wanted: Wanted, policy: Policy, now: float, *, drain: bool = False) -> Plan | Reason:
    """The plan for this node, chosen by the caller."""
    if _bar(node, wanted) is None:
        seat = _seat(node, wanted, {})
        if seat is not None:
            return _plan(node, wanted, seat, [], _order(node, wanted, FREE, seat.left_mb))
        found = _by_evicting(node, wanted, policy, now, drain=drain)
        if found is not None:
            return found
    return why_not(node, wanted, policy, now, drain=drain)


# One node


@dataclass(frozen=True, slots=True)
class _Seat:
    devices: tuple[int, ...]
    parts_mb: tuple[int, ...]
    left_mb: int


def _by_evicting(node: NodeView, wanted: Wanted, policy: Policy, now: float, *, drain: bool) -> Plan | None:
    need = _need(node, wanted)
    if need is None:
        return None
    missing = need.total_mb - sum(d.room_mb for d in node.devices)
    ordered = eviction.candidates(node.residents, policy, wanted.priority, now, drain=drain)
    chosen = eviction.victims(
        ordered, lambda freed: sum(freed.values()) >= missing and _seat(node, wanted, freed) is not None
    )
    if chosen is None:
        return None
    freed: dict[int, int] = {}
    for victim in chosen:
        for device, mb in victim.resident.memory_mb.items():
            freed[device] = freed.get(device, 0) + mb
    seat = _seat(node, wanted, freed)
    assert seat is not None
    price = eviction.total(v.price for v in chosen)
    return _plan(node, wanted, seat, [v.resident for v in chosen], _order(node, wanted, price, seat.left_mb))


def _plan(node: NodeView, wanted: Wanted, seat: _Seat, victims: Sequence[Resident], order: Order) -> Plan:
    need = _need(node, wanted)
    assert need is not None
    seconds = wanted.load_s.get(node.name)
    if seconds is None and node.load_mb_s:
        seconds = need.total_mb / node.load_mb_s
    return Plan(
        model=wanted.model,
        node=node.name,
        devices=seat.devices,
        parts_mb=seat.parts_mb,
        need=need,
        victims=tuple(v.model for v in victims),
        price=order[2][1],
        left_mb=seat.left_mb,
        order=order,
        seconds=None if seconds is None else seconds + node.busy_s,
        drains=tuple(v.model for v in victims if v.is_busy),
    )


def _order(node: NodeView, wanted: Wanted, price: Price, left_mb: int) -> Order:
    suspect, fetches = _lasts(node, wanted)
    return (suspect, fetches, price, left_mb, node.name)


def _lasts(node: NodeView, wanted: Wanted) -> tuple[bool, bool]:
    return node.state != "up", wanted.files_on is not None and node.name not in wanted.files_on


def _need(node: NodeView, wanted: Wanted) -> Need | None:
    return wanted.need_on.get(node.name, wanted.need)


def _is_plain(node: NodeView, wanted: Wanted) -> bool:
    """It has no wishes for its devices."""
    return (
        wanted.devices is None and wanted.min_devices <= 1 and node.ranks(wanted) <= 1 and not wanted.min_device_vram_mb
    )


def _seat(node: NodeView, wanted: Wanted, freed: Mapping[int, int]) -> _Seat | None:
    """Where it would sit if so much more were free, by device."""
    # HOT, once per node of the fleet: what has no wishes for its devices, and is not spread, is settled here.
    need = wanted.need_on.get(node.name, wanted.need)
    plain = wanted.devices is None and wanted.min_devices <= 1 and (wanted.tensor_parallel <= 1 or node.on_cpu)
    if plain and not wanted.min_device_vram_mb and need is not None:  # _is_plain, without the call
        whole, best, least, in_all, is_one_enough = need.total_mb, -1, -1, 0, False
        for d in node.devices:
            if d.free_mb is None or d.total_mb is None:
                continue
            room = d.free_mb - d.reserved_mb  # below 0 where loads were promised what their victims hold still
            if freed:
                room = min(room + freed.get(d.index, 0), d.empty_mb)
            if room < 0:
                room = 0
            in_all += room
            if room < whole:
                is_one_enough = is_one_enough or d.total_mb - d.strangers_mb >= whole
            elif best < 0 or room < least:
                best, least = d.index, room
        if best >= 0:
            return _Seat((best,), (whole,), least - whole)
        if is_one_enough or in_all < whole:
            return None
    usable = _usable(node, wanted)
    if not freed:
        return _seat_in(node, wanted, [(d.room_mb, d.index) for d in usable])
    # what models are thought to hold may come to more than the device has
    rooms = [min((d.free_mb or 0) - d.reserved_mb + freed.get(d.index, 0), d.empty_mb) for d in usable]
    return _seat_in(node, wanted, [(max(0, room), d.index) for room, d in zip(rooms, usable, strict=True)])


def _usable(node: NodeView, wanted: Wanted) -> Sequence[DeviceView]:
    """The devices that the profile leaves, of known size."""
    least, only = wanted.min_device_vram_mb, wanted.devices
    return [
        d
        for d in node.devices
        if d.total_mb is not None
        and d.free_mb is not None
        and (only is None or d.index in only)
        and (not least or d.empty_mb >= least)
    ]


def _seat_in(node: NodeView, wanted: Wanted, rooms: list[tuple[int, int]]) -> _Seat | None:
    """rooms: (MB, device). 1. The profile names the devices: all of them. 2. One device: of those with room the
    fullest. 3. Several, as few as hold it, the emptiest; but what one device could hold is not spread."""
    need = _need(node, wanted)
    if need is None:
        return None
    whole, count = need.total_mb, len(rooms)
    ranks = node.ranks(wanted)
    least = max(wanted.min_devices, ranks, 1)
    if count < least:
        return None
    if wanted.devices is not None:
        return _spread(rooms, wanted, need) if count == len(wanted.devices) else None
    if least == 1:
        fitting = [room for room in rooms if room[0] >= whole]
        if fitting:
            room, index = min(fitting)
            return _Seat((index,), (whole,), room - whole)
        if any(d.empty_mb >= whole for d in node.devices):
            return None
    rooms.sort(reverse=True)
    for k in range(max(least, 2), (ranks if ranks > 1 else count) + 1):
        seat = _spread(rooms[:k], wanted, need)
        if seat is not None:
            return seat
    return None


def _spread(rooms: list[tuple[int, int]], wanted: Wanted, need: Need) -> _Seat | None:
    """Over all of these, as the node will split it: equally for tensor_parallel (or as it was measured on so many
    devices), by `shares` where they are given, else in proportion to the room."""
    rooms.sort(reverse=True)
    whole, room = need.total_mb, sum(r for r, _ in rooms)
    if wanted.devices is not None and wanted.shares is not None:
        share_of = dict(zip(wanted.devices, wanted.shares, strict=True))
        parts = [ceil(whole * share_of[i] / sum(wanted.shares)) for _, i in rooms]
    elif wanted.tensor_parallel > 1:
        parts = sorted(need.mb, reverse=True) if len(need.mb) == len(rooms) else [-(-whole // len(rooms))] * len(rooms)
    elif room < whole:
        return None
    else:
        parts = [whole * r // max(room, 1) for r, _ in rooms]
        missing = whole - sum(parts)  # fewer than there are devices with room, and those come first
        parts = [part + (at < missing) for at, part in enumerate(parts)]
    if any(part > r for part, (r, _) in zip(parts, rooms, strict=True)):
        return None
    seats = sorted((index, part) for part, (_, index) in zip(parts, rooms, strict=True))
    return _Seat(tuple(i for i, _ in seats), tuple(p for _, p in seats), room - sum(parts))


# Why not


def _bar(node: NodeView, wanted: Wanted) -> Reason | None:
    """What stands against the node whatever it holds."""
    name, model = node.name, wanted.model
    if wanted.pinned_on and name not in wanted.pinned_on:
        return Reason(name, Bar.NEVER, f"pinned_on allows only {', '.join(wanted.pinned_on)}")
    if node.state == "down" or node.state == "draining":
        return Reason(name, Bar.AWAY, f"is {node.state}")
    if name in wanted.avoid:
        return Reason(name, Bar.AWAY, wanted.avoid[name])
    for resident in node.residents:
        if resident.model == model:
            return Reason(name, Bar.AWAY, f"has it already ({resident.state.value})")
    return None


def why_not(node: NodeView, wanted: Wanted, policy: Policy, now: float, *, drain: bool = False) -> Reason:
    """For a node that has no plan: the longest-lived thing that is in the way.

    1. Excluded or away. 2. Nothing is known of its memory, or of the need. 3. Too few or too small devices.
    4. Too large even when it is empty; or but for strangers. 5. Pinned models. 6. Those that cannot go now.
    """
    barred = _bar(node, wanted)
    if barred is not None:
        return barred
    need, unknown = _need(node, wanted), [d.index for d in node.devices if d.total_mb is None or d.free_mb is None]
    if not node.devices or len(unknown) == len(node.devices):
        return Reason(node.name, Bar.AWAY, "its memory is not known")
    if need is None:
        return Reason(node.name, Bar.AWAY, f"what {wanted.model} needs is not known; set vram_mb in models.toml")
    return _too_small(node, wanted, need) or _held(node, wanted, need, policy, now, drain=drain)


def _too_small(node: NodeView, wanted: Wanted, need: Need) -> Reason | None:
    usable = _usable(node, wanted)
    if _is_plain(node, wanted) and len(usable) == len(node.devices):  # most are, and then it is a matter of sums
        if sum([d.empty_mb for d in usable]) >= need.total_mb:
            return None
        fits_alone = sum([d.total_mb or 0 for d in usable]) >= need.total_mb
        return _never_fits(node, usable, need, Bar.NOT_NOW if fits_alone else Bar.NEVER)
    if _seat_in(node, wanted, [(d.empty_mb, d.index) for d in usable]) is not None:
        return None
    devices = [d for d in node.devices if d.total_mb is not None]
    least = max(wanted.min_devices, node.ranks(wanted))
    if wanted.devices is not None and len(wanted.devices) < least:
        return Reason(node.name, Bar.NEVER, f"the profile names {len(wanted.devices)} devices, and asks for {least}")
    count = f"{len(devices)} device" + ("s" if len(devices) != 1 else "")
    if len(devices) < least:
        return Reason(node.name, Bar.NEVER, f"{count}, and {wanted.model} asks for {least}")
    missing = [i for i in wanted.devices or () if i not in {d.index for d in devices}]
    if missing:
        return Reason(node.name, Bar.NEVER, f"{count}, and none is device {missing[0]}, which the profile names")
    asked = [d for d in devices if wanted.devices is None or d.index in wanted.devices]
    small = [d for d in asked if d.empty_mb < wanted.min_device_vram_mb]
    if len(asked) - len(small) < least:
        d = max(small, key=lambda device: device.total_mb or 0)
        large = sum((device.total_mb or 0) >= wanted.min_device_vram_mb for device in asked)
        bar = Bar.NEVER if large < least else Bar.NOT_NOW
        text = f"{count}, but device {d.index} has {d.empty_mb:,} of {wanted.min_device_vram_mb:,} MB even when empty"
        return Reason(node.name, bar, text + _strangers([d]))
    without = _seat_in(node, wanted, [(d.total_mb or 0, d.index) for d in usable])
    return _never_fits(node, usable, need, Bar.NEVER if without is None else Bar.NOT_NOW)


def _never_fits(node: NodeView, usable: Sequence[DeviceView], need: Need, bar: Bar) -> Reason:
    has = " + ".join([f"{d.empty_mb:,}" for d in usable])
    figure = f"{need.total_mb:,} MB ({need.source}" + (f": {need.split})" if need.split is not None else ")")
    text = f"needs {figure}, and has {has} MB even when empty{_strangers(usable)}"
    if need.ways and need.told == node.name:
        text += f"; it would fit with {' or '.join(need.ways)}"
    return Reason(node.name, bar, text, need=need)


def _strangers(devices: Iterable[DeviceView]) -> str:
    held = [f"{d.strangers_mb:,} MB of device {d.index}" for d in devices if d.strangers_mb]
    return f"; other processes hold {', '.join(held)}" if held else ""


def _held(node: NodeView, wanted: Wanted, need: Need, policy: Policy, now: float, *, drain: bool) -> Reason:
    usable = _usable(node, wanted)
    kept = [(r, eviction.why_kept(r, policy, wanted.priority, now, drain=drain)) for r in node.residents]
    pins = [r for r, why in kept if why is Kept.PINNED]
    if pins:
        taken = {d.index: sum(r.memory_mb.get(d.index, 0) for r in pins) for d in usable}
        if _seat_in(node, wanted, [(max(0, d.empty_mb - taken[d.index]), d.index) for d in usable]) is None:
            held = ", ".join(f"{r.model} ({sum(r.memory_mb.values()):,} MB)" for r in pins)
            text = f"needs {need}, and what is pinned there leaves too little: {held}"
            return Reason(node.name, Bar.PINNED, text, tuple(r.model for r in pins), need=need)
    room = " + ".join(f"{d.room_mb:,}" for d in usable)
    text = f"needs {need} and has {room} MB free"
    promised = sum(d.reserved_mb for d in usable)
    text += f" ({promised:,} MB are promised to loads that have begun)" if promised else ""
    words = [f"{r.model} {_words(r, why, now)}" for r, why in kept if why is not None]
    young = [r.may_go_at for r, why in kept if why is Kept.YOUNG]
    again_at = min(young, default=None)
    return Reason(node.name, Bar.NOT_NOW, "; ".join([text, *words]), tuple(r.model for r in pins), again_at, need)


def _words(resident: Resident, why: Kept, now: float) -> str:
    match why:
        case Kept.IN_USE:
            requests = resident.in_use + resident.queued
            return f"is in use ({requests} request{'s' if requests != 1 else ''})"
        case Kept.YOUNG:
            return f"has just been loaded, and may go in {ceil(resident.may_go_at - now)} s"
        case Kept.UNSETTLED:
            return f"is {resident.state.value}"
        case _:
            return str(why.value)
