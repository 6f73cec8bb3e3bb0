"""The text of one answer, as it is told: whole characters, nothing of a stop string, log-probabilities beside their
tokens. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from helexa.neuron.harness.torch.detokenise import Detokeniser, Vocabulary
from helexa.neuron.harness.torch.request import Text, TokenLogprob
from helexa.neuron.harness.torch.stops import Stops


@dataclass(slots=True)
class _Untold:
    """A token, and between which characters of the text it stands; end is None within a character."""

    begin: int
    end: int | None
    logprob: TokenLogprob | None


class Answer:
    """A token is told with the last of its text; one that is all within the stop string which ended it, never."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], *, special: bool = False) -> None:
        self._text = Detokeniser(vocabulary, special=special)
        self._stops = Stops(stops)
        self._decoded = 0  # characters
        self._told = 0
        self._tokens: deque[_Untold] = deque()

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> Text | None:
        """HOT. What can be told now. Nothing is fed once a stop string has matched."""
        begin = self._decoded
        piece = self._text.feed(token)
        self._decoded += len(piece)
        self._tokens.append(_Untold(begin, None, logprob))
        if not self._text.within:
            for untold in reversed(self._tokens):
                if untold.end is not None:
                    break
                untold.end = self._decoded
        text = self._stops.feed(piece)
        if not text and self.matched is None:
            return None
        self._told += len(text)
        count = 0
        for untold in self._tokens:
            whole = untold.end is not None and untold.end <= self._told
            if not whole and not (self.matched is not None and untold.begin < self._told):
                break
            count += 1
        return self._take(count, text) if text or count else None

    def end(self) -> Text | None:
        """The rest, where no stop string came of it. Half a character at the end is left out."""
        if self.matched is not None:
            return None
        text = self._stops.end()
        return self._take(len(self._tokens), text) if text or self._tokens else None

    def _take(self, count: int, text: str) -> Text:
        taken = [self._tokens.popleft() for _ in range(count)]
        return Text(text, count, tuple(t.logprob for t in taken if t.logprob is not None))
