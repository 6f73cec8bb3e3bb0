"""The gateway's fleet, poller and loader against fake neurons, without its front."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tests.helpers.fake_neuron import FakeNeuron, neurons

from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.config import CortexSettings, Eviction, Loading, NeuronEntry, Poll
from helexa.core.errors import HelexaError
from helexa.cortex.fleet import Fleet
from helexa.cortex.loader import Loader
from helexa.cortex.poller import Poller

QWEN = ModelProfile(id="qwen", source="org/qwen", quant="Q4_K_M", context=4096, vram_mb=5000, pinned_on=[])


@dataclass
class Gateway:
    fleet: Fleet
    loader: Loader
    poller: Poller

    def told(self, model_id: str, node: str) -> str | None:
        info = self.fleet.nodes[node].models.get(model_id)
        return info.status if info is not None else None

    def where(self, model_id: str) -> list[str]:
        return sorted(replica.node.name for replica in self.fleet.replicas(model_id))

    def requests(self, model_id: str, count: int = 1) -> None:
        """So many begin, on its first replica."""
        [replica, *_] = self.fleet.replicas(model_id)
        for _ in range(count):
            replica.begin(0.0)


@asynccontextmanager
async def gateway(
    models: Iterable[ModelProfile] = (QWEN,),
    *,
    interval_s: float = 0.3,
    loading: Loading | None = None,
    eviction: Eviction | None = None,
    keeps: bool = False,
    options: dict[str, Any] | None = None,
    **fakes: FakeNeuron,
) -> AsyncIterator[Gateway]:
    """keeps: with its keeper at work, ten times a second. options: the loader's."""
    async with (
        neurons(*fakes.values()),
        second_gateway(
            models,
            interval_s=interval_s,
            loading=loading,
            eviction=eviction,
            keeps=keeps,
            options=options,
            **fakes,
        ) as made,
    ):
        yield made


@asynccontextmanager
async def second_gateway(
    models: Iterable[ModelProfile] = (QWEN,),
    *,
    interval_s: float = 0.3,
    loading: Loading | None = None,
    eviction: Eviction | None = None,
    keeps: bool = False,
    options: dict[str, Any] | None = None,
    **fakes: FakeNeuron,
) -> AsyncIterator[Gateway]:
    """On nodes that are there already."""
    settings = CortexSettings(
        neurons=[NeuronEntry(name=name, endpoint=fake.url) for name, fake in fakes.items()],
        poll=Poll(interval_s=interval_s),
        loading=loading or Loading(),
        eviction=eviction or Eviction(),
    )
    fleet = Fleet(settings, Catalogue(models=list(models)))
    loader = Loader(fleet, settings, keep_every_s=0.1, **(options or {}))
    poller = Poller(fleet, settings)
    await poller.start()
    if keeps:
        loader.start()
    try:
        yield Gateway(fleet, loader, poller)
    finally:
        await loader.stop()
        await poller.stop()
        fleet.close()


async def refused(gate: Gateway, model_id: str = "qwen", waiter: int = 1) -> HelexaError:
    with pytest.raises(HelexaError) as caught:
        await gate.loader.ensure(model_id, waiter)
    return caught.value
