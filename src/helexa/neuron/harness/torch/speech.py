"""How a model says what is not plain text: which parser reads it, and which grammar holds it to a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.errors import BadRequest
from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.answers.families import GENERIC, HARMONY, Family, family_of
from helexa.neuron.harness.answers.grammar import Tool, call_grammar
from helexa.neuron.harness.answers.pieces import Parser
from helexa.neuron.harness.torch.request import Grammar

_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Speech:
    """parser: a new one for each choice, from the answer's id and the choice's index."""

    parser: Callable[[str, int], Parser]
    grammar: Grammar | None = None
    special_text: bool = False


class Speaker:
    """Of one model. template: its text, None where it has none. marks: the tokenizer's added tokens by id, and whether
    each is hidden in the text of an answer."""

    def __init__(self, template: str | None, added: Mapping[int, tuple[str, bool]]) -> None:
        self.family: Family = GENERIC if template is None else family_of(template)
        self._marks = {text: token for token, (text, _) in added.items()}
        hidden = {text for text, special in added.values() if special}
        self._thinks_hidden = self.family is HARMONY or bool(hidden & set(self.family.form.think or ()))

    @classmethod
    def of(cls, template: str | None, tokenizer: Any) -> Speaker:
        """tokenizer: a tokenizers.Tokenizer."""
        added = tokenizer.get_added_tokens_decoder()
        return cls(template, {token: (text.content, text.special) for token, text in added.items()})

    def speech(self, asked: fields.ChatRequest, prompt: str) -> Speech:
        """prompt: as it was rendered; its end says whether the answer begins within thoughts. Raises BadRequest."""
        functions = [tool.function for tool in asked.tools or () if tool.function is not None]
        tools = {} if asked.tool_choice == "none" else {f.name: f.schema for f in functions}
        text = self._grammar(asked, functions, opened=self.family.opens_thoughts(prompt)) if tools else None

        def parser(answer_id: str, index: int) -> Parser:
            base = f"call_{answer_id.removeprefix('chatcmpl-')[:22]}{index:02d}"
            return self.family.parser(
                tools, prompt=prompt, stream=text is not None, call_id=lambda call: f"{base}{call:02d}"
            )

        grammar = Grammar("lark", text, "tools") if text is not None else None
        return Speech(parser, grammar, self._thinks_hidden or (bool(tools) and self.family.special))

    def _grammar(self, asked: fields.ChatRequest, functions: list[fields.Function], *, opened: bool) -> str | None:
        """1. Forced: calls, of the one that is named or of any. 2. An answer by a schema, or calls. 3. Text, and calls
        by their schemas; a schema that llguidance does not know holds the model to a JSON object only."""
        if asked.grammar:
            raise BadRequest("`grammar` and `tools` exclude each other; send one.", param="grammar")
        named = fields.called_function(asked)
        tools: list[Tool] = [(f.name, f.schema) for f in functions if named is None or f.name == named]
        parallel = asked.parallel_tool_calls is not False and named is None
        make = functools.partial(call_grammar, self.family, marks=self._marks, parallel=parallel, opened=opened)
        if asked.forced_tool:  # 1
            return make(tools, forced=True)
        if asked.wants_json:  # 2
            schema = asked.wanted_schema
            answer = _ANY_OBJECT if schema is None or isinstance(schema, bool) else schema
            return make(tools, forced=True, answer=answer)
        known = [(name, schema if _is_known(schema) else _ANY_OBJECT) for name, schema in tools]  # 3
        strict = any(f.strict is True for f in functions)
        return make(known, forced=False, strict=strict)


def _is_known(schema: Mapping[str, Any] | None) -> bool:
    try:
        return schema is None or _can_follow(msgspec.json.encode(schema))
    except (RecursionError, ValueError):
        return False


@functools.lru_cache(maxsize=512)
def _can_follow(schema: bytes) -> bool:
    from llguidance import LLMatcher

    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema.decode()))
    except ValueError:
        return False
