"""From token ids to text, as they come, never with half a character.

A tokenizer's decoder is read once into the bytes of each token; a text is then those bytes, decoded as UTF-8 as far as
they are whole. That covers the byte-level and the SentencePiece kind, which is what language models have.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Final

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnknownDecoder(ValueError):
    """This tokenizer's way from tokens to text is not one we know. str() names it."""


class Vocabulary:
    """data: each token's bytes, by id (empty where an id has no token). special: ids that no text shows.
    strip: how many spaces a text loses at its beginning."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a tokenizers.Tokenizer. Raises UnknownDecoder."""
        spec = json.loads(tokenizer.to_str())
        steps = _steps(spec.get("decoder"))
        tokens: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.data: list[bytes] = [b""] * (max(tokens.values()) + 1)
        for token, number in tokens.items():
            self.data[number] = _bytes_of(token, steps)
        self.special = frozenset(t["id"] for t in spec.get("added_tokens") or () if t["special"])
        self.strip = 0
        for step in steps:
            if step["type"] == "Strip":
                self.strip = step["start"]
            elif step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                self.strip = 1


class Detokeniser:
    """The text of one answer."""

    def __init__(self, vocabulary: Vocabulary, *, special: bool = False) -> None:
        """special: the text shows special tokens."""
        self._data = vocabulary.data
        self._hidden: frozenset[int] = frozenset() if special else vocabulary.special
        self._strip = vocabulary.strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes. An id without a token has none."""
        if token in self._hidden or token >= len(self._data):
            return ""
        data = self._data[token]
        while self._strip and data:
            if not data.startswith(b" "):
                self._strip = 0
                break
            data = data[1:]
            self._strip -= 1
        return self._decoder.decode(data)

    @property
    def within(self) -> bool:
        """It stands within a character."""
        return bool(self._decoder.getstate()[0])


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise UnknownDecoder("the tokenizer has no decoder")
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        plain = step["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
        replace = step["type"] == "Replace" and "String" in step["pattern"]
        strip = step["type"] == "Strip" and step["content"] == " " and not step["stop"]
        if not (plain or replace or strip):
            raise UnknownDecoder(
                f"the tokenizer's decoder has a step {json.dumps(step)}; known are ByteLevel, ByteFallback, Fuse, "
                "Metaspace, Replace of a string, and Strip of spaces at the beginning"
            )
    return steps


def _bytes_of(token: str, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "ByteFallback" and (match := _BYTE.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        elif kind == "ByteLevel":
            try:
                return bytes(_FROM_BYTE_LEVEL[character] for character in token)
            except KeyError:  # an added token, which stands for itself
                return token.encode()
    return token.encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_FROM_BYTE_LEVEL: Final = _byte_level()
