"""Requests in, events out. Steps run on one thread of the engine's own; whoever asks only leaves a note and goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    Overloaded,
    ShuttingDown,
    UpstreamError,
)
from helexa.neuron.harness.torch.answer import Answer
from helexa.neuron.harness.torch.blocks import BLOCK, blocks_for
from helexa.neuron.harness.torch.detokenise import Vocabulary
from helexa.neuron.harness.torch.grammar import Grammars, Matcher
from helexa.neuron.harness.torch.pace import Pace
from helexa.neuron.harness.torch.request import (
    MAX_TOP_LOGPROBS,
    Embedded,
    Emit,
    Event,
    Failed,
    Finished,
    Limits,
    Progress,
    Request,
    Timings,
    Usage,
)
from helexa.neuron.harness.torch.sampling import Chooser, NoNumbers, logprobs_of
from helexa.neuron.harness.torch.scheduler import Part, Plan, Scheduler, Sequence
from helexa.neuron.harness.torch.step import Runner

log: Final = logging.getLogger("helexa.neuron.torch")
NO_ROOM: Final = "there is not enough memory left for so many tokens; send a shorter request, or try again later"
NO_NUMBERS: Final = "the model computed something that is no number for this request"

_NONE: Final[NDArray[Any]] = np.zeros((0, 0), np.float32)


@dataclass(eq=False, slots=True)
class Handle:
    """A request that was taken up; for `cancel`. What is in it is the engine's."""

    request: Request
    emit: Emit
    answer: Answer
    chooser: Chooser
    matcher: Matcher | None
    most: int  # tokens of the answer
    sequence: Sequence | None = None
    tokens: int = 0  # of the answer
    begun: float = 0.0
    first: float = 0.0
    cancelled: bool = False
    out_of_memory: int = 0  # times it was the largest when there was no memory
    pooled: NDArray[Any] | None = None  # sum of the hidden states so far


@dataclass(slots=True)
class Costs:
    """Since the start. computed_s: within the runner; own_s: processor time of the engine's thread outside it."""

    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    computed_s: float = 0.0
    own_s: float = 0.0


class Engine:
    """submit and cancel may be called from any thread; neither waits for a step."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        limits: Limits,
        *,
        name: str,
        eos: Collection[int],
        on_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """runner: closed with the engine. tokenizer: a tokenizers.Tokenizer. name: of the model, for errors.
        eos: tokens that end an answer. on_failed: called once, on the engine's thread, with the reason, when the
        runner can go no further; all requests have failed by then, and `submit` raises from then on.
        Raises UnknownDecoder for a tokenizer whose tokens we cannot turn into text, ValueError for impossible limits.
        """
        if limits.kv_tokens // BLOCK < blocks_for(limits.context) or limits.rows < 1 or limits.chunk < 1:
            raise ValueError(
                f"{name}: keys and values of {limits.kv_tokens} tokens, {limits.rows} rows and chunks of "
                f"{limits.chunk} cannot serve a context of {limits.context} tokens"
            )
        self.limits, self.name, self.costs = limits, name, Costs()
        self.vocabulary = Vocabulary(tokenizer)
        self._known = min(limits.vocabulary, len(self.vocabulary.data))  # ids that the model and the tokenizer know
        self._runner, self._eos, self._on_failed = runner, frozenset(eos), on_failed
        self._grammars = Grammars(tokenizer, self._known, eos)
        self._scheduler = Scheduler(
            rows=limits.rows, chunk=limits.chunk, kv_tokens=limits.kv_tokens, context=limits.context
        )
        self._pace = Pace(limits.chunk)
        self._handles: dict[Sequence, Handle] = {}
        # Under the lock: what other threads leave for the engine's.
        self._changed = threading.Condition()
        self._inbox: list[Handle] = []
        self._cancels: list[Handle] = []
        self._closing = False
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row, or for memory."""
        return len(self._scheduler.waiting) + len(self._inbox)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens whose keys and values have memory, the prefix cache's included."""
        return self._scheduler.pool.used * BLOCK

    def submit(self, request: Request, emit: Emit) -> Handle:
        """emit is called on the engine's thread with each event, the last of which is Finished or Failed; it must not
        block. A grammar is compiled here, which may take a while (100 ms for a large schema): not on a loop's thread.

        Raises BadRequest, ContextLengthExceeded for what cannot be served, ShuttingDown after `close`, UpstreamError
        after the engine failed."""
        self._check(request)
        seed = request.sampling.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        room = self.limits.context - len(request.prompt)
        handle = Handle(
            request,
            emit,
            Answer(self.vocabulary, request.stops, special=request.special_text),
            Chooser(request.sampling, request.prompt, self._known, seed),
            self._grammars.matcher(request.grammar) if request.grammar is not None else None,
            room if request.max_tokens is None else min(request.max_tokens, room),
        )
        with self._changed:
            if self._closing:
                raise ShuttingDown(f"{self.name} is being unloaded")
            if self._failed is not None:
                raise UpstreamError(f"{self.name}: {self._failed}")
            self._inbox.append(handle)
            self._changed.notify()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Heard between two steps; the request then ends with Finished("cancelled"). Of no effect on one that ended."""
        with self._changed:
            self._cancels.append(handle)
            self._changed.notify()

    def close(self) -> None:
        """Ends every request that is left as failed, the thread, and the runner. Blocks for the step at hand."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, request: Request) -> None:
        prompt, most = request.prompt, self._known
        if not prompt:
            raise BadRequest("`prompt` has no tokens; send at least one.", param="prompt")
        if min(prompt) < 0 or max(prompt) >= most:
            raise BadRequest(
                f"`prompt` has a number that is no token id of {self.name}: they are 0 to {most - 1}.", param="prompt"
            )
        # An answer needs room for a token; an embedding is of the prompt alone.
        if len(prompt) + (request.pooling is None) > self.limits.context:
            raise ContextLengthExceeded(self.name, len(prompt), self.limits.context)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise BadRequest(f"`max_tokens` must be at least 1, not {request.max_tokens}.", param="max_tokens")
        if any(not 0 <= token < most for token in request.sampling.logit_bias):
            raise BadRequest(
                f"`logit_bias` has a number that is no token id of {self.name}: they are 0 to {most - 1}.",
                param="logit_bias",
            )
        if request.sampling.repetition_penalty <= 0:
            raise BadRequest("`repetition_penalty` must be over 0; 1 is none.", param="repetition_penalty")
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
            raise BadRequest(f"`top_logprobs` must be 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs")

    def _run(self) -> None:
        reason = f"{self.name} is being unloaded"
        while True:
            try:
                if not self._await_work():
                    break
                began = time.thread_time()
                computed_s = self._step()
                self.costs.own_s += time.thread_time() - began - computed_s
            except Exception as err:  # StepFailed, or a fault of ours: nothing that is left can be relied on
                reason = str(err) or type(err).__name__
                log.exception("%s can go no further", self.name)
                break
        self._end(reason)

    def _await_work(self) -> bool:
        """Take up what others left; False to end."""
        with self._changed:
            while not (self._inbox or self._cancels or self._handles or self._closing):
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
            cancels, self._cancels = self._cancels, []
            closing = self._closing
        for handle in inbox:
            hidden = handle.request.pooling is not None
            every = handle.request.pooling == "mean"
            handle.sequence = self._scheduler.add(handle.request.prompt, hidden=hidden, every=every)
            self._handles[handle.sequence] = handle
        for handle in cancels:
            handle.cancelled = True
        for handle in [h for h in self._handles.values() if h.cancelled]:
            self._finish(handle, "cancelled")
        return not closing

    def _step(self) -> float:
        """Plan, compute, and hand out what came of it. Returns the processor time of this thread in the runner."""
        self._scheduler.chunk = self._pace.chunk(answers=any(h.tokens for h in self._handles.values()))
        plan = self._scheduler.plan()
        if plan is None:
            return 0.0
        if not plan.parts:
            raise RuntimeError("no request can go on: memory for a whole context is not there")
        began = time.monotonic()
        for sequence in plan.admitted:
            handle = self._handles[sequence]
            handle.begun = began
            self._tell_progress(handle)
        before = time.thread_time()
        try:
            answers = self._runner.step(plan.step)
        except MemoryError as err:
            self._shrink(err)
            return time.thread_time() - before
        took = time.monotonic() - began
        computed_s = time.thread_time() - before
        self.costs.computed_s += took
        self._scheduler.done(plan)
        self._pace.saw(plan.prefill, took)
        self.costs.steps += 1
        self._hand_out(plan, answers)
        return computed_s

    def _hand_out(self, plan: Plan, answers: Any) -> None:
        """HOT. answers: the runner's, a row for each that was wanted."""
        wanted = any(part.wanted for part in plan.parts)
        rows: NDArray[Any] = answers.numpy(force=True) if wanted else _NONE
        at = 0
        for part in plan.parts:
            handle = self._handles.get(part.sequence)
            mine = rows[at : at + part.wanted]
            at += part.wanted
            if handle is None:
                continue
            try:
                if handle.tokens == 0:
                    self.costs.prompt_tokens += part.count
                    self._tell_progress(handle)
                if handle.request.pooling is not None:
                    self._pool(handle, part, mine)
                elif part.wanted:
                    self._take(handle, mine[0])
            except HelexaError as err:
                self._fail(handle, err)
            except NoNumbers:
                self._fail(handle, UpstreamError(f"{self.name}: {NO_NUMBERS}"))

    def _take(self, handle: Handle, row: NDArray[Any]) -> None:
        """HOT, once per token. row: its logits."""
        assert handle.sequence is not None
        allowed = handle.matcher.allowed() if handle.matcher is not None else None
        token = handle.chooser.choose(row, handle.tokens, allowed)
        if not handle.tokens:
            handle.first = time.monotonic()
        handle.tokens += 1
        self.costs.answer_tokens += 1
        if token in self._eos and not handle.request.ignore_eos:
            self._finish(handle, "stop")
            return
        self._scheduler.append(handle.sequence, token)
        handle.chooser.took(token)
        logprob = None
        if handle.request.logprobs is not None:
            logprob = logprobs_of(row[: self._known], token, handle.request.logprobs, self.vocabulary.data)
        text = handle.answer.feed(token, logprob)
        if text is not None:
            self._emit(handle, text)
        ended = False
        if handle.matcher is not None:
            handle.matcher.took(token)
            ended = handle.matcher.ended
        if ended or handle.answer.matched is not None:
            self._finish(handle, "stop")
        elif handle.tokens >= handle.most:
            self._finish(handle, "length")

    def _pool(self, handle: Handle, part: Part, rows: NDArray[Any]) -> None:
        """rows: hidden states, of each token of a chunk or of the last token only."""
        assert handle.sequence is not None
        if len(rows):
            new = rows.sum(axis=0, dtype=np.float64)
            again = handle.sequence.done == part.count  # from the beginning, perhaps after a preemption
            handle.pooled = new if handle.pooled is None or again else handle.pooled + new
        if handle.sequence.pending:
            return
        assert handle.pooled is not None
        length = float(np.linalg.norm(handle.pooled))
        if not np.isfinite(length) or length == 0.0:
            raise NoNumbers
        self._emit(handle, Embedded(array("f", (handle.pooled / length).astype(np.float32).tobytes())))
        self._finish(handle, "stop")

    def _tell_progress(self, handle: Handle) -> None:
        sequence = handle.sequence
        if handle.request.progress and sequence is not None:
            time_ms = (time.monotonic() - handle.begun) * 1e3
            self._emit(handle, Progress(sequence.prompt, sequence.cached or 0, sequence.done, time_ms))

    def _finish(self, handle: Handle, reason: Literal["stop", "length", "cancelled"]) -> None:
        rest = handle.answer.end()
        if rest is not None and reason != "cancelled":
            self._emit(handle, rest)
        sequence = self._leave(handle)
        now = time.monotonic()
        cached = sequence.cached or 0
        first = handle.first or now
        computed = sequence.prompt if handle.tokens or handle.pooled is not None else sequence.done
        timings = Timings(
            prompt_n=max(0, computed - cached),
            prompt_ms=(first - handle.begun) * 1e3 if handle.begun else 0.0,
            predicted_n=handle.tokens,
            predicted_ms=(now - first) * 1e3,
            cache_n=cached,
        )
        usage = Usage(sequence.prompt, handle.tokens, cached)
        self._emit(handle, Finished(reason, handle.answer.matched, usage, timings))

    def _fail(self, handle: Handle, error: HelexaError) -> None:
        self._leave(handle)
        self._emit(handle, Failed(error))

    def _leave(self, handle: Handle) -> Sequence:
        assert handle.sequence is not None
        del self._handles[handle.sequence]
        self._scheduler.finish(handle.sequence)
        return handle.sequence

    def _emit(self, handle: Handle, event: Event) -> None:
        try:
            handle.emit(event)
        except Exception:
            if not handle.cancelled:
                log.exception("%s: events of a request cannot be told; it is cancelled", self.name)
            handle.cancelled = True

    def _shrink(self, err: MemoryError) -> None:
        """Compute everything anew, within three quarters of the memory that was not to be had. A request that is the
        largest for the second time when that happens is given up, so that this comes to an end."""
        budget = max(blocks_for(self.limits.context) * BLOCK, self.kv_tokens_used * 3 // 4)
        log.warning("%s: out of memory (%s); the cache is emptied and held to %d tokens", self.name, err, budget)
        self._scheduler.restart(budget)
        largest = self._handles[max(self._handles, key=len)]
        largest.out_of_memory += 1
        if largest.out_of_memory > 1:
            self._fail(largest, Overloaded(f"{self.name}: {NO_ROOM}"))

    def _end(self, reason: str) -> None:
        """The thread's last act."""
        error: HelexaError
        with self._changed:
            closing = self._closing
            if not closing:
                self._failed = reason
            left = self._inbox
            self._inbox = []
        error = ShuttingDown(reason) if closing else UpstreamError(f"{self.name}: {reason}")
        for handle in [*self._handles.values(), *left]:
            self._emit(handle, Failed(error))
        self._handles.clear()
        try:
            if not closing:
                self._on_failed(reason)
        finally:
            self._runner.close()
