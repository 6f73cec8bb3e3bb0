"""Tokens into text: whole characters, stop strings across tokens, log-probabilities beside their tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import torch_tokenizers as kinds

from helexa.neuron.harness.torch.answer import Answer
from helexa.neuron.harness.torch.detokenise import Detokeniser, UnknownDecoder, Vocabulary
from helexa.neuron.harness.torch.request import Text, TokenLogprob
from helexa.neuron.harness.torch.stops import Stops

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'helexa[torch]'")

BYTE_LEVEL = kinds.byte_level()
TOKENIZERS = [BYTE_LEVEL, kinds.sentencepiece(), kinds.sentencepiece(strip=False)]
VOCABULARIES = [Vocabulary(t) for t in TOKENIZERS]
texts = st.text(max_size=30) | st.sampled_from(kinds.CORPUS)


@pytest.mark.parametrize("kind", range(3))
@settings(deadline=None)
@given(texts, st.booleans())
def test_a_text_comes_back_as_the_tokenizer_itself_would_write_it(kind: int, text: str, special: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(f"{text}<tool_call>{text}", add_special_tokens=False).ids
    ids.insert(len(ids) // 2, 1)  # a special token
    stream = Detokeniser(VOCABULARIES[kind], special=special)
    whole = "".join(stream.feed(i) for i in ids)
    want = tokenizer.decode(ids, skip_special_tokens=not special)
    if "�" not in want:  # else the special token stands within a character
        assert whole == want


@pytest.mark.parametrize("kind", range(3))
def test_no_piece_has_half_a_character(kind: int) -> None:
    for text in kinds.CORPUS:
        stream = Detokeniser(VOCABULARIES[kind])
        pieces = [stream.feed(i) for i in TOKENIZERS[kind].encode(text).ids]
        assert "�" not in "".join(pieces)
        assert not stream.within


@settings(deadline=None)
@given(st.lists(st.integers(0, 399), max_size=40))
def test_any_tokens_make_the_text_that_the_tokenizer_writes(ids: list[int]) -> None:
    stream = Detokeniser(VOCABULARIES[0])
    whole = "".join(stream.feed(i) for i in ids)
    want = BYTE_LEVEL.decode(ids)
    assert whole == want or (stream.within and want.startswith(whole) and want[len(whole) :] == "�")


def test_an_id_that_has_no_token_has_no_text() -> None:
    assert Detokeniser(VOCABULARIES[0]).feed(10_000) == ""


def test_a_decoder_that_is_not_known_is_named() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}))
    with pytest.raises(UnknownDecoder, match="no decoder"):
        Vocabulary(tokenizer)
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(UnknownDecoder, match="WordPiece"):
        Vocabulary(tokenizer)


def stopped(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character, by definition."""
    for end in range(1, len(text) + 1):
        here = [s for s in stops if text[:end].endswith(s)]
        if here:
            longest = max(here, key=len)
            return text[: end - len(longest)], longest
    return text, None


short = st.text("ab\n", max_size=12)


@settings(max_examples=500)
@given(short, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_the_first_stop_string_ends_the_text_wherever_it_is_cut(text: str, stops: list[str], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    machine, got = Stops(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if machine.matched is None:
            got += machine.feed(text[start:end])
            assert text.startswith(got)
    got += machine.end()
    assert (got, machine.matched) == stopped(text, stops)


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    machine = Stops(["\n\nUser:"])
    assert machine.feed("one\n") == "one"
    assert machine.feed("two") == "\ntwo"
    assert machine.feed("\n\nUs") == ""
    assert machine.feed("er: hi") == ""
    assert machine.matched == "\n\nUser:"


def told(tokens: list[int], stops: list[str]) -> tuple[list[Text], Answer]:
    answer, out = Answer(VOCABULARIES[0], stops), []
    for n, token in enumerate(tokens):
        piece = answer.feed(token, TokenLogprob(token, VOCABULARIES[0].data[token], -float(n)))
        if piece is not None:
            assert piece.text or answer.matched is not None
            out.append(piece)
        if answer.matched is not None:
            return out, answer
    piece = answer.end()
    return out + ([piece] if piece is not None else []), answer


@settings(deadline=None)
@given(texts, st.lists(st.sampled_from(["the", "o", " ", "日本", "🦊", '": ', "\n"]), max_size=2))
def test_each_token_is_told_once_with_the_text_it_ends_in(text: str, stops: list[str]) -> None:
    tokens = BYTE_LEVEL.encode(text).ids
    pieces, answer = told(tokens, stops)
    whole = "".join(p.text for p in pieces)
    assert (whole, answer.matched) == stopped(text, stops)
    spoken = [lp.id for p in pieces for lp in p.logprobs]
    assert spoken == tokens[: len(spoken)]
    assert len(spoken) == sum(p.tokens for p in pieces)
    if answer.matched is None:
        assert spoken == tokens
    else:  # all whose text is told, even in part, and none of the stop string's own
        data = b"".join(VOCABULARIES[0].data[t] for t in spoken)
        assert data.startswith(whole.encode())
        if spoken:
            assert len(data) - len(VOCABULARIES[0].data[spoken[-1]]) < max(1, len(whole.encode()))


def test_pieces_never_split_a_character_of_several_tokens() -> None:
    tokens = BYTE_LEVEL.encode("𝄞").ids
    assert len(tokens) > 1
    pieces, _ = told(tokens, [])
    assert [(p.text, p.tokens) for p in pieces] == [("𝄞", len(tokens))]


def test_half_a_character_at_the_end_is_left_out_but_its_tokens_count() -> None:
    tokens = BYTE_LEVEL.encode("a𝄞").ids[:-1]
    pieces, _ = told(tokens, [])
    assert "".join(p.text for p in pieces) == "a"
    assert sum(p.tokens for p in pieces) == len(tokens)


def test_random_bytes_are_decoded_as_a_whole_would_be() -> None:
    rng = random.Random(5)
    by_byte = {data[0]: n for n, data in enumerate(VOCABULARIES[0].data) if len(data) == 1}
    for _ in range(200):
        raw = bytes(rng.choice([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF]) for _ in range(8))
        stream = Detokeniser(VOCABULARIES[0])
        got = "".join(stream.feed(by_byte[b]) for b in raw)
        want = raw.decode("utf-8", "replace")
        assert got == want or (stream.within and got == want[:-1])
