"""Which node counts the tokens of a request. Pure: nothing is loaded for it, and no model's idle clock is touched.

A node counts for a model that it has loaded, and also for one that it only has on disk: then it needs to know how the
model would be loaded, since a profile may name the file and the template.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Final

import msgspec

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import HelexaError, ModelLoading, NoNode, TemplateFailed
from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.cortex import refusals, router
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node, Replica

PATH: Final = "/v1/tokens/count"


def choose(
    fleet: Fleet, model_id: str, replicas: Sequence[Replica], tried: Collection[str], rng: Random
) -> tuple[Replica, ModelProfile | None] | None:
    """The node, as a replica that is in nobody's list, and the profile that it has to be told. None: no node is left.

    1. A node that has it loaded. 2. One that lists its file. 3. One that may find the file by the catalogue's word.
    """
    loaded = router.choose(replicas, tried, rng)
    if loaded is not None:
        return Replica(loaded.node, model_id, loaded.info), None
    profile = fleet.profiles.get(model_id)
    left = [(node, info) for node, info in fleet.holders(model_id) if node.name not in tried and _may_read(info)]
    if not left:
        return None
    node, info = min(left, key=_order)
    if profile is not None:  # asked for as a load would be
        info = ModelInfo(id=model_id, status=ModelStatus.UNLOADED)
    assert info is not None  # only a catalogue's model has holders that do not list it
    return Replica(node, model_id, info), profile


def nobody(model_id: str, why: str = "no node that is alive has its file") -> NoNode:
    return NoNode(
        f"The tokens of {model_id} cannot be counted: {why}. Ask the model something, which loads it, or fetch its "
        "file with `neuron pull`."
    )


def judge(model_id: str, node: str, status: int, body: bytes) -> HelexaError | None:
    """As refusals.judge; and a node that has no such file, or no whole one, is not the last word."""
    error = refusals.judge(model_id, node, status, body)
    code, said = refusals.code_and_message(body)
    if (status in (404, 422) and code != TemplateFailed.code) or isinstance(error, ModelLoading):
        return nobody(model_id, f"{node} says: {said.rstrip('.') or status}")
    return error


def with_profile(body: bytes, profile: ModelProfile) -> bytes:
    """body: a JSON object of ours, with members."""
    return b'{"profile":%b,%b' % (msgspec.json.encode(profile.load_request()), body[1:])


def _may_read(info: ModelInfo | None) -> bool:
    """Not a file that is known to be damaged."""
    return info is None or info.status != ModelStatus.UNLOADED or not info.error


def _order(candidate: tuple[Node, ModelInfo | None]) -> tuple[bool, bool, str]:
    node, info = candidate
    return info is None, node.state != "up", node.name
