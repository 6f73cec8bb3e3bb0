"""A real gateway before fake neurons that have the model "m" loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, Gateway, cortex
from tests.helpers.serving_neuron import ServingNeuron


@asynccontextmanager
async def fleet(folder: Path, *nodes: ServingNeuron, toml: str = SETTINGS) -> AsyncIterator[Gateway]:
    for node in nodes:
        node.put("m", "loaded", tell=False, capabilities=["chat"])
    async with neurons(*nodes):
        named = {f"n{number}": node.url for number, node in enumerate(nodes)}
        async with cortex(folder, named, toml=toml) as gateway:
            await gateway.until_up(*named)
            yield gateway
