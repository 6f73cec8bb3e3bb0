"""Requests in, events out. Steps run on one thread of the engine's own; whoever asks only leaves a note and goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from helexa.core.errors import BadRequest, ContextLengthExceeded, ShuttingDown, UpstreamError
from helexa.neuron.harness.torch.request import (
    Emit,
    Event,
    Failed,
    Finished,
    Limits,
    Request,
    Text,
    Timings,
    Usage,
)
from helexa.neuron.harness.torch.step import Row, Runner, Step

log: Final = logging.getLogger("helexa.neuron.torch")


@dataclass(eq=False, slots=True)
class Handle:
    """A request that was taken up; for `cancel`."""

    request: Request
    emit: Emit
    slab: int
    tokens: list[int] = field(default_factory=list)  # of the answer
    begun: float = 0.0
    first: float = 0.0
    cancelled: bool = False


class Engine:
    """submit and cancel may be called from any thread and return at once."""

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
        runner can go no further; all requests have failed by then, and `submit` raises from then on."""
        self.limits = limits
        self.name = name
        self._runner, self._tokenizer, self._eos, self._on_failed = runner, tokenizer, frozenset(eos), on_failed
        self._running: list[Handle] = []
        self._inbox: list[Handle] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failed: str | None = None
        self._slabs = 0
        self._drops: list[int] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, emit: Emit) -> Handle:
        """emit is called on the engine's thread with each event, the last of which is Finished or Failed; it must not
        block. A grammar is compiled here, which may take a while (100 ms for a large schema): not on a loop's thread.

        Raises BadRequest, ContextLengthExceeded for what cannot be served, ShuttingDown after `close`, UpstreamError
        after the engine failed."""
        prompt = request.prompt
        if not prompt:
            raise BadRequest("`prompt` has no tokens; send at least one.", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.limits.vocabulary:
            raise BadRequest(
                f"`prompt` has a number that is no token id of {self.name}: they are 0 to "
                f"{self.limits.vocabulary - 1}.",
                param="prompt",
            )
        if len(prompt) >= self.limits.context:
            raise ContextLengthExceeded(self.name, len(prompt), self.limits.context)
        with self._changed:
            if self._closing:
                raise ShuttingDown(f"{self.name} is being unloaded")
            if self._failed is not None:
                raise UpstreamError(f"{self.name}: {self._failed}")
            self._slabs += 1
            handle = Handle(request, emit, self._slabs)
            self._inbox.append(handle)
            self._changed.notify()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Heard between two steps; the request then ends with Finished("cancelled"). Of no effect on one that ended."""
        handle.cancelled = True

    def close(self) -> None:
        """Ends every request that is left as failed, the thread, and the runner. Blocks for the step at hand."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._inbox or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
                room = self.limits.rows - len(self._running)
                self._running += self._inbox[:room]
                del self._inbox[:room]
            try:
                self._step()
            except Exception as err:
                self._failed = str(err) or type(err).__name__
                self._fail_all(f"{self.name}: {self._failed}")
                self._on_failed(self._failed)
        self._fail_all(f"{self.name} is being unloaded")
        self._runner.close()

    def _step(self) -> None:
        for handle in [h for h in self._running if h.cancelled]:
            self._finish(handle, "cancelled")
        rows, drops = [], self._drops
        self._drops = []
        now = time.monotonic()
        for handle in self._running:
            done = len(handle.request.prompt) + len(handle.tokens) - 1
            if handle.tokens:
                rows.append(Row(handle.slab, done, handle.tokens[-1:]))
            else:
                handle.begun = now
                rows.append(Row(handle.slab, 0, list(handle.request.prompt)))
        if not rows:
            return
        logits = self._runner.step(Step(rows, drops))
        chosen = logits[:, : self.limits.vocabulary].argmax(-1).tolist()
        for handle, token in zip(list(self._running), chosen, strict=True):
            self._take(handle, token)

    def _take(self, handle: Handle, token: int) -> None:
        handle.first = handle.first or time.monotonic()
        before = self._tokenizer.decode(handle.tokens)
        handle.tokens.append(token)
        if token in self._eos and not handle.request.ignore_eos:
            self._finish(handle, "stop")
            return
        text = self._tokenizer.decode(handle.tokens)
        self._emit(handle, Text(text[len(before) :], 1))
        most = handle.request.max_tokens or self.limits.context
        if len(handle.tokens) >= min(most, self.limits.context - len(handle.request.prompt)):
            self._finish(handle, "length")

    def _finish(self, handle: Handle, reason: Any) -> None:
        self._running.remove(handle)
        self._drops.append(handle.slab)
        n, now = len(handle.request.prompt), time.monotonic()
        timings = Timings(
            n, (handle.first - handle.begun) * 1e3, len(handle.tokens), (now - handle.first) * 1e3, cache_n=0
        )
        self._emit(handle, Finished(reason, None, Usage(n, len(handle.tokens), 0), timings))

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            left, self._running, self._inbox = self._running + self._inbox, [], []
        for handle in left:
            self._emit(handle, Failed(UpstreamError(reason)))

    def _emit(self, handle: Handle, event: Event) -> None:
        try:
            handle.emit(event)
        except Exception:
            log.exception("a request's events cannot be told; it is cancelled")
            handle.cancelled = True
