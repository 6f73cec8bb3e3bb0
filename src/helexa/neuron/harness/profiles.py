"""What a profile asks for, held to what there is: the same for every harness. Pure; raises BadRequest by the key."""

from __future__ import annotations

from collections.abc import Sequence

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice


def usable_devices(request: LoadRequest, devices: Sequence[FreeDevice], *, mixed: str = "") -> list[FreeDevice]:
    """The devices that the profile leaves, in its order: GPUs where there are any, else the CPU. mixed: what to do in
    place of naming a CPU beside GPUs."""
    by_index = {device.index: device for device in devices}
    if request.devices is None:
        found = [device for device in devices if device.kind != "cpu"] or list(devices)
    else:
        unknown = [i for i in request.devices if i not in by_index]
        if unknown or not request.devices or len(set(request.devices)) != len(request.devices):
            known = ", ".join(str(i) for i in by_index) or "none"
            message = f"devices = {request.devices} cannot be: each must be named once; this node has {known}"
            raise BadRequest(message, param="devices")
        found = [by_index[i] for i in request.devices]
        if any(device.kind == "cpu" for device in found) and len(found) > 1:
            raise BadRequest(f"devices: the CPU cannot be mixed with GPUs{mixed}", param="devices")
    if not found:
        raise BadRequest("this node has no device that could hold a model", param="devices")
    return found


def within(name: str, value: int | None, low: int, high: int, default: int, of_high: str = "") -> int:
    """of_high: what the bound above is."""
    if value is None:
        return default
    if value < low:
        raise BadRequest(f"{name} = {value} is not possible; it must be at least {low}", param=name)
    if value > high:
        raise BadRequest(f"{name} = {value} is more than {of_high or 'is possible'} ({high})", param=name)
    return value
