"""What of a request asks for an ability that not every model has. Pure; shared by the harnesses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from helexa.core.errors import BadRequest, UnsupportedModality
from helexa.neuron.harness import openai_fields as fields

_MODALITIES: Final = {"image_url": ("vision", "images"), "input_audio": ("audio", "audio")}


def check(model: str, abilities: Collection[str], messages: Sequence[fields.Message]) -> None:
    """HOT: where every content is a text, one look at each. Raises UnsupportedModality, BadRequest."""
    for message in messages:
        if type(message.content) is list:
            _check_parts(model, abilities, messages)
            return


def check_countable(asked: fields.ChatRequest) -> None:
    if kinds := fields.part_kinds(asked.messages or ()):
        where = next(iter(kinds.values()))
        raise UnsupportedModality(
            "Only text can be counted; what an image or audio takes is known when it is read.", param=where
        )


def must_cut(model: str, abilities: Collection[str], own: int | None, dimensions: int | None) -> bool:
    """Whether an embedding of `own` numbers (None: nobody knows) is to be cut to the `dimensions` asked for."""
    if dimensions is None or dimensions == own:
        return False
    if own is not None and dimensions > own:
        raise BadRequest(f"`dimensions` can be {own} at most: {model} gives no more.", param="dimensions")
    if "dimensions" not in abilities:
        gives = f"gives {own} dimensions, and " if own is not None else ""
        raise BadRequest(
            f"`dimensions` cannot be chosen: {model} {gives}is not known to bear a cut. If it was trained "
            'to, say so in its profile: capabilities = ["embed", "dimensions"].',
            param="dimensions",
        )
    return True


def _check_parts(model: str, abilities: Collection[str], messages: Sequence[fields.Message]) -> None:
    for kind, where in fields.part_kinds(messages).items():
        ability, name = _MODALITIES.get(kind, (None, None))
        if ability is None:
            raise BadRequest(f"`{where}.type` {kind!r} is not known.", param=f"{where}.type")
        if ability not in abilities:
            raise UnsupportedModality(
                f"{model} takes no {name}; use a model that has `{ability}` among its capabilities in "
                "/v1/models, or load this one with its projector.",
                param=where,
            )
    fields.check_images(messages)
