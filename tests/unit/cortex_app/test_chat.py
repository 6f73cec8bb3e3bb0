"""What `cortex chat` tells of an answer."""

from __future__ import annotations

import pytest

from helexa.cortex.chat import Answer, Chat


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(tokens=48, tokens_per_s=31.23, first_token_s=0.214), "48 tokens, 31.2 tok/s, first after 0.21 s"),
        (Answer(tokens=1, finish_reason="length"), "1 token, cut at max_tokens"),
        (Answer(stopped=True), "stopped"),
        (Answer(), ""),
    ],
)
def test_what_is_not_known_of_an_answer_is_not_said(answer: Answer, words: str) -> None:
    assert answer.figures() == words


def test_a_request_bears_the_conversation_and_nothing_that_was_not_asked_for() -> None:
    chat = Chat(None, "m", system="Be brief.", messages=[{"role": "user", "content": "Hi"}])
    assert chat._body() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
