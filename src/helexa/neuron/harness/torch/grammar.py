"""Answers bound to a grammar, through llguidance: which tokens may come next.

Grammars are compiled once and kept; each answer has a matcher of its own. What llguidance cannot take is the request's
error, told with its own words.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from helexa.core.errors import BadRequest
from helexa.neuron.harness.torch.request import Grammar

KEPT: Final = 64  # compiled grammars
# Between the tokens of JSON: nothing, a space, or up to two line ends and an indent. Without a bound a small model can
# go on with blanks for ever; llama.cpp draws the same line.
SPACE: Final = r"( |\n{1,2}[ \t]{0,20})?"


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._words = np.zeros(-(-vocabulary // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """HOT. By token id. Whatever ends an answer is allowed where the grammar may end. Raises BadRequest where the
        grammar has become too costly to follow."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise BadRequest(f"the grammar could not be followed: {self._matcher.get_error()}", param="grammar")
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little", count=self._vocabulary)
        return bits.view(np.bool_)

    def took(self, token: int) -> None:
        """A token that was allowed."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Nothing more can come."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        """tokenizer: a tokenizers.Tokenizer. It is read for this at the first grammar, in some 100 ms."""
        self._source = tokenizer
        self._vocabulary = vocabulary
        self._eos = sorted(token for token in eos if token < vocabulary) or None  # None: as the tokenizer says
        self._tokenizer: Any = None
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of the grammar. May take 100 ms and more where it is large and new. Raises BadRequest."""
        key = (grammar.kind, grammar.text)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
        if kept is None:
            kept = self._compiled(grammar)
            with self._lock:
                self._kept[key] = kept
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return Matcher(kept.deep_copy(), self._vocabulary)

    def _compiled(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        try:
            if grammar.kind == "json_schema":
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": SPACE})
            elif grammar.kind == "json_object":
                text = LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides={"whitespace_pattern": SPACE})
            elif grammar.kind == "lark":
                text = LLMatcher.grammar_from_lark(grammar.text)
            else:
                text = LLMatcher.grammar_from_regex(grammar.text)
        except ValueError as err:
            raise _refused(grammar, str(err)) from err
        matcher = LLMatcher(self._read_tokenizer(), text, log_level=0)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher

    def _read_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._source.to_str(), n_vocab=self._vocabulary, eos_token=self._eos or None
                )
            return self._tokenizer


def _refused(grammar: Grammar, why: str) -> BadRequest:
    kinds = {"json_schema": "JSON schema", "lark": "Lark grammar", "regex": "regular expression"}
    what = kinds.get(grammar.kind, "grammar")
    return BadRequest(f"`{grammar.param}`: this {what} cannot be followed: {why.strip()}", param=grammar.param)
