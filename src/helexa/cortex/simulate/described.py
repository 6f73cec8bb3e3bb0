"""A fleet from the operator's files: nodes from cortex.toml, models from models.toml, sizes from the nodes themselves.

A node of cortex.toml is asked what it has, unless it is described in the call: `beast=24GB+24GB@2` are two devices of
24 GB and 2 GB/s of load. A model's need is `vram_mb` of its profile, else what a node says that it takes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from helexa.core.catalogue import Catalogue
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.core.discovery import Discovery
from helexa.core.lifecycle import ModelInfo
from helexa.core.relay.upstream import Upstream
from helexa.cortex.client import CommandFailed, why_unreachable
from helexa.cortex.simulate.world import SLOTS, Model, NodeSpec

LOAD_GB_S: Final = 2.0  # of a node of which nothing is known: an NVMe disk's
_ANSWER_S: Final = 5.0
_CONTEXT: Final = 8192  # of a slot, where the profile does not say; as much again is kept beside the slots
_OF_FILE: Final = 1.2  # a loaded model, by its file's size: weights, KV cache, buffers
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|MB|G|M)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a node says of itself. mb: of models it has, what they take or would; error: why it says nothing."""

    devices_mb: Sequence[int] = ()
    mb: Mapping[str, int] = field(default_factory=dict)
    load_mb_s: float | None = None
    error: str | None = None


def parse_node(text: str, number: int) -> NodeSpec:
    """`[NAME=]SIZE[+SIZE...][@GB_PER_SECOND]`, sizes like 24GB or 8000MB. Raises CommandFailed, code 2."""
    name, equals, rest = text.partition("=")
    if not equals:
        name, rest = f"added{number}", text
    sizes, at, speed = rest.partition("@")
    try:
        rate = float(speed) if at else LOAD_GB_S
        devices = [_mb(size) for size in sizes.split("+")]
    except ValueError:
        devices, rate = [], 0.0
    if not devices or min(devices) <= 0 or not 0 < rate < 1e6 or not name:
        raise CommandFailed(f'"{text}" describes no node; use 24GB, 24GB+24GB, or beast=24GB+24GB@2 (GB/s of load)', 2)
    return NodeSpec(name, devices, rate * 1024)


def _mb(size: str) -> int:
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(size)
    unit = (match[2] or "GB").upper()
    return int(float(match[1]) * (1024 if unit.startswith("G") else 1))


async def fleet(
    settings: CortexSettings, catalogue: Catalogue, described: Sequence[NodeSpec]
) -> tuple[list[NodeSpec], list[Model]]:
    """Nodes and models as they are. Raises CommandFailed with everything that is not known."""
    known = {node.name: node for node in described}
    silent = [entry for entry in settings.neurons if entry.name not in known]
    answers = dict(zip((e.name for e in silent), await asyncio.gather(*map(_ask, silent)), strict=True))
    unknown = [f"{name} {a.error or 'does not tell its memory'}" for name, a in answers.items() if not a.devices_mb]
    if unknown:
        example = next(name for name, a in answers.items() if not a.devices_mb)
        raise CommandFailed(
            f"what these nodes have is not known: {'; '.join(unknown)}. Describe them: --node {example}=24GB+24GB", 2
        )
    for name, answer in answers.items():
        known[name] = NodeSpec(name, answer.devices_mb, answer.load_mb_s or LOAD_GB_S * 1024)
    order = [e.name for e in settings.neurons] + [n.name for n in described]
    return [known[name] for name in dict.fromkeys(order)], _models(catalogue, list(answers.values()))


def _models(catalogue: Catalogue, answers: Sequence[Asked]) -> list[Model]:
    models, unknown = [], []
    for profile in catalogue.models:
        told = [answer.mb[profile.id] for answer in answers if profile.id in answer.mb]
        mb = profile.vram_mb or max(told, default=0)
        if not mb:
            unknown.append(profile.id)
            continue
        models.append(
            Model(
                profile.id,
                mb,
                slots=profile.slots or SLOTS,
                pinned_on=tuple(profile.pinned_on),
                min_devices=profile.min_devices or 1,
                min_device_vram_mb=profile.min_device_vram_mb or 0,
                tensor_parallel=profile.tensor_parallel or 1,
                priority=profile.residency_priority,
                max_replicas=profile.max_replicas,
                cache_tokens=2 * (profile.slots or SLOTS) * (profile.context or _CONTEXT),
            )
        )
    if unknown:
        raise CommandFailed(f"how much memory these models need is not known; set vram_mb: {', '.join(unknown)}", 2)
    return models


async def _ask(entry: NeuronEntry) -> Asked:
    headers = {"authorization": f"Bearer {entry.token}"} if entry.token else None
    node = Upstream(entry.name, entry.endpoint, headers=headers, connect_s=3.0)
    try:
        discovery = (await node.fetch("GET", "/discovery", timeout_s=_ANSWER_S)).json(Discovery)
        listed = (await node.fetch("GET", "/models", timeout_s=_ANSWER_S)).json(list[ModelInfo])
    except OSError as err:
        return Asked(error=f"cannot be asked ({why_unreachable(err)})")
    except (msgspec.MsgspecError, ValueError) as err:
        return Asked(error=f"answers, but not as a neuron ({err})")
    finally:
        node.close()
    mb = {}
    for info in listed:
        size = info.vram_used_mb or int(_OF_FILE * (info.size_bytes or 0) / 2**20)
        if size:
            mb[info.id] = size
    rates = [i.vram_used_mb / i.load_seconds for i in listed if i.vram_used_mb and i.load_seconds]
    return Asked(
        [d.vram_total_mb for d in discovery.devices if d.vram_total_mb and not d.error],
        mb,
        max(rates, default=None),
    )
