"""A GGUF model whose weights are a script: the real engine, with its template, tokenizer, grammar and tool-call parser,
plays raw text turn by turn. SmolLM2's vocabulary, so that prompts are counted as a real model counts them.

How it works. Each turn's text is cut into pieces, and each piece is one more token of the vocabulary. The chat template
puts a marker, a token as well, behind the messages: it names the turn, as many as the conversation has answers. Marker
and pieces have directions of their own, and the output matrix holds for each of them what follows: by far the likeliest
token at any temperature. The one layer has every token look at the marker, and add a little of its direction: enough
where the token has none, which is the end of the prompt. After the last piece comes the end of the turn.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from tests.helpers.models import smollm2

PIECE: Final = 5  # bytes, or more where such a piece is a token already
GAIN: Final = 30.0  # the next piece's logit lies above 100, the runner-up's below half of that
WIDTH: Final = 128
DIRECTIONS: Final = 96  # dimensions of the residual stream; the next two say "a token" and "a marker"
TOKEN, MARKER = DIRECTIONS, DIRECTIONS + 1
HINT: Final = (
    0.03  # of the marker's direction as the layer sees it (normalised), on each token: a fifth of a piece's own
)
ASIDE: Final = "aside"
LOST: Final = "lost"
_NORMAL, _CONTROL = 1, 3

# In the form of Hermes and Qwen: tools and calls as JSON between tags. A system message stands first or nowhere, as
# Qwen's later templates have it.
TEMPLATE: Final = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\nYou may call these functions:\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\n\\nA call:" }}
{{- "\\n<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <object>}\\n</tool_call>" }}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if not loop.first %}{{- raise_exception('System message must be at the beginning.') }}{%- endif %}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- set answers = messages | selectattr('role', 'equalto', 'assistant') | list | length %}
{{- MARKER }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """says:  raw text, as a model writes it: tags of calls and of thinking included
    after: what the last message of the conversation must hold, else the model says that it is lost"""

    says: str
    after: str = ""


def call(name: str, **arguments: Any) -> str:
    """A call as the template's model writes it. Arguments in the order of the tool's schema: the engine's grammar lets
    no other pass, and a model that cannot say its piece says anything."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def write(
    path: Path,
    turns: Sequence[Turn],
    *,
    aside: str | None = "A title",
    before: int = 0,
    context: int = 65_536,
    template: str = TEMPLATE,
) -> Path:
    """aside:  what it says where it is given no tools (agents ask for titles and the like); None: it plays there too
    before: answers with which the client begins every conversation, as examples"""
    script = {f"turn{i}": turn.says for i, turn in enumerate(turns)}
    script |= {
        ASIDE: aside or "",
        LOST: "The script does not go on from here: this is not what the last message should say.",
    }
    vocabulary = _smollm2()
    tokens, kinds = list(vocabulary.tokens), list(vocabulary.kinds)
    known = {text: i for i, text in enumerate(tokens)}

    def token(text: str, kind: int) -> int:
        known[text] = len(tokens)
        tokens.append(text)
        kinds.append(kind)
        return known[text]

    follows: list[tuple[int, int]] = []
    played: dict[str, list[int]] = {}
    for name, says in script.items():
        if says not in played:
            played[says] = [token(piece, _NORMAL) for piece in _pieces(says.encode(), known)]
        chain = [token(_marker(name), _CONTROL), *played[says], vocabulary.end]
        follows += [pair for pair in itertools.pairwise(chain) if pair not in follows]
    stream = np.zeros((len(tokens), WIDTH))
    own = len(vocabulary.tokens)
    directions = np.random.default_rng(0).standard_normal((len(tokens) - own, DIRECTIONS))
    stream[own:, :DIRECTIONS] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    stream[:, TOKEN] = 1
    stream[[known[_marker(name)] for name in script], MARKER] = 1
    output = np.zeros((len(tokens), WIDTH))
    for now, then in follows:
        output[then, :DIRECTIONS] += GAIN * stream[now, :DIRECTIONS]
    query, key, value = np.zeros((3, WIDTH, WIDTH))
    query[WIDTH - 1, TOKEN] = key[WIDTH - 1, MARKER] = 10
    value[:DIRECTIONS, :DIRECTIONS] = HINT * np.eye(DIRECTIONS)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_file_type(1)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(1e30)  # the last pair of dimensions is never rotated
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end - 1)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template.replace("MARKER", _choice(turns, before, plays_without_tools=aside is None)))
    writer.add_tensor("token_embd.weight", stream.astype(np.float16))
    writer.add_tensor("output.weight", output.astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    layer = {"attn_q": query, "attn_k": key, "attn_v": value, "attn_output": np.eye(WIDTH)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weights = layer.get(name, np.zeros((WIDTH, WIDTH)))
        writer.add_tensor(f"blk.0.{name}.weight", weights.astype(np.float16))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _choice(turns: Sequence[Turn], before: int, *, plays_without_tools: bool) -> str:
    """The template's expression for the marker: the number of answers so far chooses the turn."""
    chosen = f"'{_marker(LOST)}'"
    for i, turn in reversed(list(enumerate(turns))):
        asked = f"answers == {i + before}" + (f" and {turn.after!r} in messages[-1].content" if turn.after else "")
        chosen = f"'{_marker(f'turn{i}')}' if {asked} else ({chosen})"
    return f"({chosen})" if plays_without_tools else f"('{_marker(ASIDE)}' if not tools else ({chosen}))"


def _marker(name: str) -> str:
    return f"<|{name}|>"


def _pieces(text: bytes, known: dict[str, int]) -> Iterator[str]:
    """Texts of new tokens that make up `text`, none of them known already."""
    cuts = [0]
    used: set[str] = set()
    while cuts[-1] < len(text):
        end = cuts[-1] + PIECE
        while (piece := _spelled(text[cuts[-1] : end])) in known or piece in used:
            if end >= len(text):  # what is left is a token already: the piece before takes it in
                used.discard(_spelled(text[cuts[-2] : cuts[-1]]))
                cuts.pop()
            end += 1
        used.add(piece)
        cuts.append(min(end, len(text)))
    return (_spelled(text[start:end]) for start, end in itertools.pairwise(cuts))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    end: int  # <|im_end|>


@functools.cache
def _smollm2() -> _Vocabulary:
    fields = gguf.GGUFReader(smollm2()).fields
    read: Any = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")}
    tokens = tuple(read["tokens"])
    return _Vocabulary(tokens, tuple(read["token_type"]), tuple(read["merges"]), tokens.index("<|im_end|>"))


def _spelled(raw: bytes) -> str:
    """Bytes as byte-level BPE spells them in a vocabulary."""
    return "".join(_SPELLING[byte] for byte in raw)


def _spelling() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for letters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


_SPELLING: Final = _spelling()
