"""Where a model folder keeps its chat template and special tokens, and in which order they count. Reads small files.

transformers' order: chat_template.jinja (with additional_chat_templates/*.jinja by name) before chat_template.json
before tokenizer_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

_CONFIG_BYTES: Final = 1 << 26  # tokenizer_config.json of a large vocabulary of added tokens has some 10 MB
_TEMPLATE_BYTES: Final = 1 << 22


class FolderUnreadable(Exception):
    """A file of the folder is not what it should be. str() names it."""


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """templates: by name, `default` among them; empty: the model has none. special: bos_token and the like, as text."""

    templates: dict[str, str]
    special: dict[str, str]


def read_folder(folder: Path) -> TemplateFiles:
    """Raises FolderUnreadable."""
    config = _json(folder / "tokenizer_config.json")
    return TemplateFiles(_templates(folder, config), _special(config, _json(folder / "special_tokens_map.json")))


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    if (main := folder / "chat_template.jinja").is_file():
        found["default"] = _text(main)
        more = folder / "additional_chat_templates"
        for file in sorted(more.glob("*.jinja")) if more.is_dir() else ():
            found[file.stem] = _text(file)
        return found
    for source in (_json(folder / "chat_template.json"), config):
        if found := named_templates(source.get("chat_template")):
            return found
    return {}


def named_templates(value: Any) -> dict[str, str]:
    """A `chat_template` of a JSON file: a text, or a list of {name, template}, or an object of texts by name."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        return {str(name): text for name, text in value.items() if isinstance(text, str)}
    if isinstance(value, list):
        return {
            str(entry["name"]): entry["template"]
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("template"), str) and "name" in entry
        }
    return {}


def _special(config: dict[str, Any], tokens: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in (tokens, config):
        for key, value in source.items():
            if key.endswith("_token") and (text := _token(value)) is not None:
                found[key] = text
        extra = source.get("extra_special_tokens")
        for key, value in extra.items() if isinstance(extra, dict) else ():
            if (text := _token(value)) is not None:
                found[key] = text
    return found


def _token(value: Any) -> str | None:
    """A token is a text, or an object with it as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _json(file: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = msgspec.json.decode(_bytes(file, _CONFIG_BYTES))
    except (msgspec.DecodeError, RecursionError) as err:
        raise FolderUnreadable(f"{file} is not JSON: {err}") from err
    if not isinstance(value, dict):
        raise FolderUnreadable(f"{file} is not a JSON object")
    return value


def _text(file: Path) -> str:
    try:
        return _bytes(file, _TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as err:
        raise FolderUnreadable(f"{file} is not UTF-8: {err}") from err


def _bytes(file: Path, most: int) -> bytes:
    try:
        if (size := file.stat().st_size) > most:
            raise FolderUnreadable(f"{file} has {size} bytes, more than {most}")
        return file.read_bytes()
    except OSError as err:
        raise FolderUnreadable(f"{file} cannot be read: {err.strerror}") from err
