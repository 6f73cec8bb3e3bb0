"""A model that is up: its host, the seats before it and the keeper of its prompt cache, which come and go together."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from helexa.core.errors import LoadFailed
from helexa.core.relay.upstream import Upstream
from helexa.neuron.admission import Seats
from helexa.neuron.devices import Devices
from helexa.neuron.harness import reference
from helexa.neuron.hosts import Host, HostFailed, Hosts, OnProgress
from helexa.neuron.kv.keeper import Keeper
from helexa.neuron.memory import Claim
from helexa.neuron.planner import Placed
from helexa.neuron.tasks import owned, surely

if TYPE_CHECKING:
    from helexa.neuron.kv.store import KvStore

OUT_OF_MEMORY: Final = "out_of_memory"  # why a load failed, where more memory may mend it


@dataclass(frozen=True, slots=True)
class Serving:
    """since: monotonic time; keeper: None where prompt caches are not kept."""

    placed: Placed
    host: Host
    upstream: Upstream
    seats: Seats
    since: float
    keeper: Keeper | None

    async def save(self) -> None:
        """What it knows, to disk; nobody is admitted any more."""
        if self.keeper is not None:
            await self.keeper.save(self.seats.last_used)

    async def close(self, devices: Devices, within_s: float) -> None:
        """Its host is gone, and the devices show it or were given the time to; or its claim is stranded."""
        if self.keeper is not None:
            self.keeper.close()
        # An engine in this process waits, with the interpreter in its hands, for its server's threads, and those for
        # their clients: a connection of ours that this loop had still to close would never be closed.
        await self.upstream.cut_off()
        before = devices.says_mb()
        await end_host(self.host, self.placed.claim, within_s)
        await devices.given_back(self.placed.claim, before)

    def died(self) -> None:
        """Nothing more is sent to its host or written of it."""
        self.upstream.close()
        if self.keeper is not None:
            self.keeper.close()


async def start(
    placed: Placed, *, hosts: Hosts, devices: Devices, kv_store: KvStore | None, on_fraction: OnProgress
) -> Serving:
    """It answers, and has what was saved of its prompt cache. Raises LoadFailed with the host's reason; nothing is left
    then, nor where it was cancelled."""
    plan, harness = placed.plan, reference(placed.harness)
    model_id = plan.request.id
    key = secrets.token_urlsafe(24)
    try:
        host = await hosts.take(model_id, harness, own_process=placed.harness.own_process)
    except HostFailed as err:
        raise LoadFailed(f"{model_id} could not be loaded: {err}") from err
    upstream = Upstream(
        model_id, f"unix:{host.socket}", headers={"authorization": f"Bearer {key}"}, max_idle=plan.slots, renew=True
    )
    session = placed.harness.session(plan)
    cache = None if kv_store is None else placed.harness.prompt_cache(plan)
    keeper = None if kv_store is None or cache is None else Keeper(kv_store, cache, plan, upstream)
    try:
        states = None if kv_store is None or keeper is None else kv_store.folder
        spec = placed.harness.host_spec(plan, host.socket, key, states)
        await host.load(harness, spec, plan.files.size_bytes, on_fraction)
        await session.learn(upstream)
        await devices.measure(placed.claim, host)
        if keeper is not None:
            await keeper.restore()
    except BaseException as err:
        if keeper is not None:
            keeper.close()
        upstream.abort()
        await surely(end_host(host, placed.claim, 0))
        if isinstance(err, HostFailed):
            cause = {"cause": OUT_OF_MEMORY} if err.out_of_memory else {}
            raise LoadFailed(f"{model_id} could not be loaded: {err}", details=cause) from err
        raise
    seats = Seats(model_id, plan.slots, session, upstream, host.alive_at)
    return Serving(placed, host, upstream, seats, time.monotonic(), keeper)


async def end_host(host: Host, claim: Claim, within_s: float) -> None:
    """Close it. Where nothing ends it the claim is stranded, until it is gone after all."""
    if not await host.close(within_s):
        claim.strand()
        owned(_late(host, claim), "a host that does not end")


async def _late(host: Host, claim: Claim) -> None:
    await host.gone()
    claim.washed_up()
