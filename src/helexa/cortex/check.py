"""`cortex check`: the files were read by the time this runs; here the nodes are asked, side by side."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from helexa.core.catalogue import Catalogue
from helexa.core.config import CortexSettings, NeuronEntry
from helexa.core.relay.upstream import Upstream
from helexa.cortex.client import why_unreachable
from helexa.cortex.operate import print_json
from helexa.cortex.refusals import code_and_message

_ANSWER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """error: one sentence, None where the node is well."""

    name: str
    endpoint: str
    version: str | None = None
    devices: int | None = None
    models: int | None = None
    error: str | None = None


async def check(
    settings: CortexSettings,
    catalogue: Catalogue,
    settings_path: Path | None,
    catalogue_path: Path | None,
    *,
    as_json: bool,
) -> bool:
    """Prints what was found; True if all is well."""
    names = {entry.name for entry in settings.neurons}
    strangers = [
        f"models.toml: {model.id} is pinned on {name}, which is no node of cortex.toml"
        for model in catalogue.models
        for name in model.pinned_on
        if name not in names
    ]
    asked = (_ask(entry, settings.timeouts.connect_s) for entry in settings.neurons)
    nodes = list(await asyncio.gather(*asked))
    if as_json:
        print_json(
            {
                "settings": None if settings_path is None else str(settings_path),
                "catalogue": None if catalogue_path is None else str(catalogue_path),
                "models": len(catalogue.models),
                "problems": strangers,
                "nodes": [asdict(node) for node in nodes],
            }
        )
    else:
        _print(settings_path, catalogue_path, catalogue, strangers, nodes)
    return not strangers and all(node.error is None for node in nodes)


def _print(
    settings_path: Path | None,
    catalogue_path: Path | None,
    catalogue: Catalogue,
    strangers: list[str],
    nodes: list[NodeCheck],
) -> None:
    print(f"ok    {settings_path}" if settings_path is not None else "ok    no cortex.toml: the defaults")
    if catalogue_path is not None:
        print(f"ok    {catalogue_path}: {len(catalogue.models)} models, {len(catalogue.aliases)} aliases")
    else:
        print("ok    no models.toml: only what nodes have on disk is served")
    for problem in strangers:
        print(f"wrong {problem}")
    if not nodes:
        print("ok    no nodes: name them under [[neurons]] in cortex.toml")
    for node in nodes:
        if node.error is not None:
            print(f"wrong {node.name} ({node.endpoint}): {node.error}")
        else:
            has = f"neuron {node.version}, {node.devices} devices, {node.models} models"
            print(f"ok    {node.name} ({node.endpoint}): {has}")
    sys.stdout.flush()


async def _ask(entry: NeuronEntry, connect_s: float) -> NodeCheck:
    headers = {"authorization": f"Bearer {entry.token}"} if entry.token else None
    node = Upstream(entry.name, entry.endpoint, headers=headers, connect_s=connect_s)
    try:
        found = {}
        for path in ("/version", "/discovery", "/models"):
            answer = await node.fetch("GET", path, timeout_s=_ANSWER_S)
            if answer.status != 200:
                _, message = code_and_message(answer.body)
                return NodeCheck(entry.name, entry.endpoint, error=message or f"{path} answered {answer.status}")
            found[path] = answer.json()
        discovery = found["/discovery"]
        return NodeCheck(
            entry.name,
            entry.endpoint,
            version=found["/version"].get("version"),
            devices=len(discovery.get("devices", ())),
            models=len(found["/models"]),
            error=discovery.get("error"),
        )
    except OSError as err:  # TimeoutError is one
        return NodeCheck(entry.name, entry.endpoint, error=f"{why_unreachable(err)}; is a neuron running there?")
    except (msgspec.MsgspecError, AttributeError, ValueError) as err:
        return NodeCheck(entry.name, entry.endpoint, error=f"answers, but not as a neuron: {err}")
    finally:
        node.close()
