"""The ledger: which model holds how much of which device, and what is left. Pure: no clock, no I/O, no asyncio.

A claim counts as max(estimate, measured) from before its load begins until its process is gone. What is left of a
device is the least of two views: its limit less all claims, and what the device itself says is free less those parts
of the claims that it cannot see yet (a load that has only begun; weights that are mapped, which the kernel goes on
calling available). A claim that yields (a host that only counts tokens) is nobody's obstacle: its host ends when a
load begins, so what it holds is free to a load.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType


class DoesNotFit(Exception):
    """A reservation for more than is left. need and free are MB by device."""

    def __init__(self, need_mb: Mapping[int, int], free_mb: Mapping[int, int]) -> None:
        super().__init__(f"needs {dict(need_mb)} MB of {dict(free_mb)} MB free")
        self.need_mb = dict(need_mb)
        self.free_mb = dict(free_mb)


class Claim:
    """One model's memory. A context manager: left without `keep`, it is given back.

    need_mb:      the estimate, by device
    measured_mb:  what its host was last seen to hold, mapped weights included
    taken_mb:     the part of it that the device's own "free" already misses
    yields:       its host ends as soon as a load begins
    """

    def __init__(self, ledger: Ledger, owner: str, need_mb: Mapping[int, int], *, yields: bool = False) -> None:
        self._ledger = ledger
        self.owner = owner
        self.yields = yields
        self.need_mb = dict(need_mb)
        self.measured_mb: dict[int, int] = {}
        self.taken_mb: dict[int, int] = {}
        self.kept = False
        self.stranded = False

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if not self.kept:
            self.release()

    def keep(self) -> None:
        """The load succeeded: from now on it is memory in use, until `release`."""
        self.kept = True

    def release(self) -> None:
        """Idempotent."""
        if not self.stranded:
            self._ledger.claims.discard(self)

    def strand(self) -> None:
        """Its host could not be ended: what it holds stays taken, whatever becomes of the model, until `washed_up`."""
        self.stranded = True

    def washed_up(self) -> None:
        """The host has ended after all."""
        self.stranded = False
        self.release()

    def measure(self, held_mb: Mapping[int, int], taken_mb: Mapping[int, int]) -> None:
        self.measured_mb = dict(held_mb)
        self.taken_mb = dict(taken_mb)

    def held_mb(self, device: int) -> int:
        return max(self.need_mb.get(device, 0), self.measured_mb.get(device, 0))

    def unseen_mb(self, device: int) -> int:
        """What it may still take beyond what the device's own figure tells."""
        return max(0, self.held_mb(device) - self.taken_mb.get(device, 0))

    @property
    def devices(self) -> list[int]:
        return sorted(self.need_mb.keys() | self.measured_mb.keys())


class Ledger:
    """limits_mb: what may be used of each device; a device that is not in it has no limit of ours."""

    def __init__(self, limits_mb: Mapping[int, int]) -> None:
        self.limits_mb = dict(limits_mb)
        self.claims: set[Claim] = set()

    def used_mb(self, device: int) -> int:
        """Loaded models and reservations for loads that run."""
        return sum(claim.held_mb(device) for claim in self.claims if not claim.yields)

    def free_mb(self, device: int, says_mb: int | None, *, without: Claim | None = None) -> int | None:
        """What a new load may take. says_mb: the device's own free memory. None: nothing is known of the device.

        without: a claim to leave out of account, as if its model were not there.
        """
        out = [claim for claim in self.claims if claim is without or claim.yields]
        claims = self.claims.difference(out)
        bounds = []
        if device in self.limits_mb:
            bounds.append(self.limits_mb[device] - sum(claim.held_mb(device) for claim in claims))
        if says_mb is not None:
            says_mb += sum(claim.taken_mb.get(device, 0) for claim in out)
            bounds.append(says_mb - sum(claim.unseen_mb(device) for claim in claims))
        return max(0, min(bounds)) if bounds else None

    def reserve(
        self, owner: str, need_mb: Mapping[int, int], says_mb: Mapping[int, int | None], *, yields: bool = False
    ) -> Claim:
        """Take it now, before anything is awaited; to be entered with `with`. Raises DoesNotFit.

        yields: the claim does, and takes nothing from others that do.
        """
        free = {device: self.free_mb(device, says_mb.get(device)) for device in need_mb}
        if yields:
            others = [claim for claim in self.claims if claim.yields]
            free = {i: mb and max(0, mb - sum(claim.held_mb(i) for claim in others)) for i, mb in free.items()}
        if any(left is None or need_mb[device] > left for device, left in free.items()):
            raise DoesNotFit(need_mb, {device: left or 0 for device, left in free.items()})
        claim = Claim(self, owner, need_mb, yields=yields)
        self.claims.add(claim)
        return claim
