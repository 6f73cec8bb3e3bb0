"""What a serving profile may say beyond its types: the same rules for models.toml and for `default_models`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from helexa.core.errors import nearest
from helexa.core.lifecycle import ServingProfile
from helexa.core.settings_file import Fault, Key

HARNESSES: Final = ("llama", "torch", "candle")  # "candle", of older files, means "choose for me"
TASKS: Final = ("chat", "embed", "rerank")
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_WORDS: Final = {"harness": HARNESSES, "task": TASKS, "kv_cache": KV_TYPES}
_TEXTS: Final = ("source", "quant", "chat_template", "draft", "projector")


def id_faults(model_id: str, key: Key) -> Iterator[Fault]:
    """A model's name travels in headers, paths and metric labels."""
    if not model_id:
        yield Fault(key, "is missing or empty; it is the name that requests use")
    elif model_id != model_id.strip() or not model_id.isprintable():
        yield Fault(key, "must be printable text without spaces around it")


def faults(profile: ServingProfile, at: Key) -> Iterator[Fault]:
    for name, known in _WORDS.items():
        value = getattr(profile, name)
        if value is not None and value not in known:
            near = nearest(value, list(known), 1)
            listed = ", ".join(f'"{word}"' for word in known)
            yield Fault((*at, name), f'must be one of {listed}, not "{value}"', near[0] if near else None)
    for name in _TEXTS:
        value = getattr(profile, name)
        if value is not None and not value.strip():
            yield Fault((*at, name), "is empty; leave the key out instead")
    devices, ranks, shares = profile.devices, profile.tensor_parallel, profile.shares
    if devices is not None:
        if not devices:
            yield Fault((*at, "devices"), "is empty; leave the key out to let the node choose")
        if len(set(devices)) != len(devices):
            yield Fault((*at, "devices"), f"names a device twice: {devices}")
        if ranks is not None and devices and len(devices) != ranks:
            yield Fault((*at, "devices"), f"names {len(devices)} for tensor_parallel = {ranks}")
    if shares is not None:
        if devices is None and ranks is None:
            yield Fault((*at, "shares"), "needs devices or tensor_parallel, one share for each")
        elif devices is not None and len(shares) != len(devices):
            yield Fault((*at, "shares"), f"has {len(shares)} values for {len(devices)} devices")
        elif ranks is not None and len(shares) != ranks:
            yield Fault((*at, "shares"), f"has {len(shares)} values for tensor_parallel = {ranks}")
        if not any(shares):
            yield Fault((*at, "shares"), "gives no device anything")
    for name in ("lora", "capabilities"):
        values = getattr(profile, name)
        if values is not None and (len(set(values)) != len(values) or not all(v.strip() for v in values)):
            yield Fault((*at, name), "has an empty or a repeated entry")
