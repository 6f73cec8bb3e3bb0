"""From a body to what the engine is asked, and how its answer is told. Blocking, no I/O, safe in several threads."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from helexa.neuron.harness import openai_fields as fields
from helexa.neuron.harness.torch import asked as reading
from helexa.neuron.harness.torch.asked import Defaults, Samplers
from helexa.neuron.harness.torch.chunks import Answer, ChatChoice, Choice, CompletionChoice
from helexa.neuron.harness.torch.prompts import Prompts
from helexa.neuron.harness.torch.request import Embedded, Event, Failed, Finished, Grammar, Request
from helexa.neuron.harness.torch.speech import Speaker

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """requests: one for each choice. answer: from the answer's id and the time (seconds since 1970)."""

    requests: Sequence[Request]
    answer: Callable[[str, int], Answer]
    stream: bool
    prefix: str  # of the answer's id


class Desk:
    """Reads bodies as the model that is served here has to.

    slots, context: as the plan promised. vocabulary: token ids are below it. pooling: of an embedding model.
    """

    def __init__(
        self,
        prompts: Prompts,
        *,
        model: str,
        context: int,
        slots: int,
        vocabulary: int,
        defaults: Defaults | None = None,
        pooling: Literal["last", "mean"] | None = None,
    ) -> None:
        self.model = model
        self._prompts = prompts
        template = prompts.template.text if prompts.template is not None else None
        self._speaker = Speaker.of(template, prompts.tokenizer)
        self._context = context
        self._slots = slots
        self._vocabulary = vocabulary
        self._defaults = defaults or Defaults()
        self._pooling = pooling

    def chat(self, body: bytes) -> Generation:
        """Raises HelexaError for what cannot be served."""
        asked = fields.read_chat(body, max_choices=self._slots, context=self._context)
        samplers = reading.read_samplers(body)
        text = self._prompts.render(body, asked)
        prompt = self._prompts.of_rendered(text)
        speech = self._speaker.speech(asked, text)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        n = asked.n or 1

        def answer(answer_id: str, created: int) -> Answer:
            choices = [ChatChoice(i, speech.parser(answer_id, i), logprobs=top) for i in range(n)]
            return self._answer(asked, choices, answer_id, created)

        grammar = speech.grammar or reading.grammar(asked)
        request = self._request(asked, samplers, prompt, grammar, top)
        request = replace(request, special_text=speech.special_text)
        return Generation(self._choices(request, [prompt], n), answer, asked.stream is True, "chatcmpl-")

    def completion(self, body: bytes) -> Generation:
        asked = fields.read_completion(body, max_choices=self._slots, context=self._context)
        samplers = reading.read_samplers(body)
        prompts = self._prompts.of_completion(asked)
        n = asked.n or 1
        echoes = [text for text in asked.texts or () for _ in range(n)] if asked.echo else [""] * (n * len(prompts))

        def answer(answer_id: str, created: int) -> Answer:
            choices = [CompletionChoice(i, echo=echo, logprobs=asked.logprobs) for i, echo in enumerate(echoes)]
            return self._answer(asked, choices, answer_id, created)

        request = self._request(asked, samplers, prompts[0], reading.grammar(asked), asked.logprobs)
        return Generation(self._choices(request, prompts, n), answer, asked.stream is True, "cmpl-")

    def embedding(self, body: bytes) -> Embedding:
        asked = fields.read_embedding(body)
        pooling = self._pooling or "last"
        requests = [Request(prompt, pooling=pooling) for prompt in self._prompts.of_embedding(asked)]
        return Embedding(requests, self.model, base64=asked.encoding_format == "base64", dimensions=asked.dimensions)

    def count(self, body: bytes) -> int:
        """Prompt tokens of a chat body, longer than the context though they may be."""
        asked = fields.read_chat(body, max_choices=self._slots, context=self._context)
        return self._prompts.count_chat(body, asked)

    def _request(
        self,
        asked: fields.ChatRequest | fields.CompletionRequest,
        samplers: Samplers,
        prompt: Prompt,
        grammar: Grammar | None,
        logprobs: int | None,
    ) -> Request:
        return Request(
            prompt=prompt,
            max_tokens=reading.most_tokens(asked),
            sampling=reading.sampling(asked, samplers, self._defaults, vocabulary=self._vocabulary),
            stops=tuple(asked.stops),
            grammar=grammar,
            logprobs=logprobs,
            ignore_eos=samplers.ignore_eos is True,
            progress=asked.stream is True and asked.return_progress is True,
        )

    def _choices(self, request: Request, prompts: Sequence[Prompt], n: int) -> list[Request]:
        """One request for each choice; with a seed, the choices of a prompt are not all the same."""
        seed = request.sampling.seed
        made = []
        for prompt in prompts:
            for i in range(n):
                sampling = request.sampling if seed is None or not i else replace(request.sampling, seed=seed + i)
                made.append(replace(request, prompt=prompt, sampling=sampling))
        return made

    def _answer(
        self,
        asked: fields.ChatRequest | fields.CompletionRequest,
        choices: Sequence[Choice],
        answer_id: str,
        created: int,
    ) -> Answer:
        return Answer(
            choices,
            model=self.model,
            answer_id=answer_id,
            created=created,
            per_prompt=asked.n or 1,
            usage=asked.wants_usage or asked.stream is not True,
            progress=asked.return_progress is True,
            timings=asked.timings_per_token is True,
        )


class Embedding:
    """The answer of an embedding request, as its vectors come. dimensions: cut to so many, of length 1 again."""

    def __init__(self, requests: Sequence[Request], model: str, *, base64: bool, dimensions: int | None) -> None:
        self.requests = requests
        self._model = model
        self._base64 = base64
        self._dimensions = dimensions
        self._vectors: dict[int, array[float]] = {}
        self._tokens: dict[int, int] = {}

    @property
    def is_over(self) -> bool:
        return len(self._tokens) == len(self.requests)

    def take(self, index: int, event: Event) -> None:
        """Raises the HelexaError of a request that failed."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Embedded):
            self._vectors[index] = event.vector
        elif isinstance(event, Finished):
            self._tokens[index] = event.usage.prompt

    def answer(self) -> dict[str, Any]:
        total = sum(self._tokens.values())
        data = [
            {"object": "embedding", "index": i, "embedding": self._told(self._vectors[i])}
            for i in range(len(self.requests))
        ]
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "model": self._model, "data": data, "usage": usage}

    def _told(self, vector: array[float]) -> str | list[float]:
        if self._dimensions is not None and self._dimensions < len(vector):
            cut = vector[: self._dimensions]
            length = math.hypot(*cut) or 1.0
            vector = array("f", [x / length for x in cut])
        if not self._base64:
            return vector.tolist()
        told = array("f", vector)
        if sys.byteorder == "big":
            told.byteswap()
        return base64.b64encode(told.tobytes()).decode()


def read_defaults(raw: bytes) -> Defaults:
    """Of a generation_config.json; what it does not say, or says oddly, is the engine's default."""
    try:
        told = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Defaults()
    if told.get("do_sample") is False:
        told = {}
    known = {name: value for name in Defaults.__struct_fields__ if (value := told.get(name)) is not None}
    try:
        return msgspec.convert(known, Defaults, strict=False)
    except msgspec.ValidationError:
        return Defaults()
