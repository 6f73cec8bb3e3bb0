"""One worker process, as the leader sees it: its pipes, its answers, its end. Owned by one loop, but for `post`."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from signal import Signals
from typing import Final, TypeVar, cast

from helexa.core import logs
from helexa.neuron.tp import rpc

_log = logs.get("neuron.tp")

REAP_S: Final = 5.0
LAST_WORDS_S: Final = 0.5  # for output that is still in the pipes of a process that ended
CONSEQUENCE_S: Final = 0.5  # what a rank says of its peers waits so long for what the peers say themselves
TAIL_LINES: Final = 5

R = TypeVar("R", bound=rpc.Response)


class PoolFailed(Exception):
    """A rank could not be started, died, did not answer in time, or said no. str() names the rank and the reason.
    out_of_memory: for want of it, in a rank's own words."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Rank(asyncio.SubprocessProtocol):
    """failed: told, once or more often, why this rank is good for nothing any more, unless it was asked to leave."""

    def __init__(self, rank: int, device: int, failed: Callable[[str], None]) -> None:
        self.rank, self.device = rank, device
        self.gone = asyncio.Event()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._failed = failed
        self._transport = cast("asyncio.SubprocessTransport", None)
        self._lines = {1: rpc.Lines(), 2: rpc.Lines(limit=1 << 20)}
        self._waiting: dict[int, asyncio.Future[rpc.Response]] = {}
        self._posted: deque[int] = deque()  # ids of steps that are not answered yet, in their order
        self._stdin = -1
        self._writing = threading.Lock()
        self._pipes_open = len(self._lines)
        self._leaving = False

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    async def start(self, program: Sequence[str], world_size: int, options: Sequence[str] = ()) -> None:
        """Raises OSError."""
        command = [
            *(*program, "--worker", "--rank", str(self.rank), "--world-size", str(world_size)),
            *("--device", str(self.device), "--parent", str(os.getpid()), *options),
        ]
        loop = asyncio.get_running_loop()
        # A pipe of our own: the engine's thread writes steps to it, and asyncio's transports are for the loop's.
        theirs, self._stdin = os.pipe()
        try:
            os.set_blocking(self._stdin, False)
            # A session of its own: Ctrl-C on a terminal is for the daemon.
            await loop.subprocess_exec(lambda: self, *command, stdin=theirs, start_new_session=True)
        finally:
            os.close(theirs)

    def send(self, frame_id: int, request: rpc.Request) -> asyncio.Future[rpc.Response]:
        """Written when it returns. The future is the response, or PoolFailed where the rank ends before it."""
        request.id = frame_id
        response: asyncio.Future[rpc.Response] = asyncio.get_running_loop().create_future()
        self._waiting[frame_id] = response
        if self.gone.is_set() or not self._write(rpc.line(request)):
            del self._waiting[frame_id]
            response.set_exception(PoolFailed(f"rank {self.rank} has ended{self._last_words()}"))
        return response

    def post(self, frame_id: int, line: bytes) -> None:
        """HOT, once a step. A step's frame, written when it returns; its answer is looked at as it comes, and any but
        step_ok is a failure. From any thread, one at a time."""
        self._posted.append(frame_id)
        self._write(line)  # where the rank has ended, its end is told by itself

    async def receive(self, sent: asyncio.Future[rpc.Response], answer: type[R], within_s: float) -> R:
        """What `send` waits for. Raises PoolFailed, also where it is another response."""
        try:
            async with asyncio.timeout(within_s):
                response = await sent
        except TimeoutError:
            raise PoolFailed(f"rank {self.rank} gave no {_op_of(answer)} within {within_s:g} s") from None
        if isinstance(response, rpc.Error):
            raise PoolFailed(self._said(response), out_of_memory="out of memory" in response.message.lower())
        if not isinstance(response, answer):
            raise PoolFailed(f"rank {self.rank} answered with {response!r}, not {_op_of(answer)}")
        return response

    async def leave(self, frame_id: int, within_s: float) -> None:
        """Asked to end, and ended, in time or by force."""
        self._leaving = True
        try:
            async with asyncio.timeout(within_s):
                await self.receive(self.send(frame_id, rpc.Shutdown()), rpc.Bye, within_s)
                await self.gone.wait()
        except (PoolFailed, TimeoutError) as err:
            if not self.gone.is_set():
                _log.warning("a rank did not leave and is killed", rank=self.rank, pid=self.pid, reason=str(err))
        await self.kill()

    async def kill(self) -> None:
        self._leaving = True
        if self._transport is None:
            self._close_stdin()
            return  # it was never started
        if not self.gone.is_set():
            try:
                self._transport.kill()
            except ProcessLookupError:
                pass
            try:
                async with asyncio.timeout(REAP_S):
                    await self.gone.wait()
            except TimeoutError:
                _log.error("a rank cannot be killed: it is inside the kernel", rank=self.rank, pid=self.pid)
        self._transport.close()
        self._close_stdin()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        for line in self._lines[fd].feed(data):
            if fd == 1:
                self._response(line)
            elif line is not None and (text := line.decode(errors="replace").rstrip()):
                self.tail.append(text[:500])
                _log.info(text, rank=self.rank, pid=self.pid)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._lines:
            self._pipes_open -= 1
            if not self._pipes_open and self._transport.get_returncode() is not None:
                self._end()

    def process_exited(self) -> None:
        if self._pipes_open:  # its last frame may be on its way, unless a process that it left behind holds the pipes
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end)
        else:
            self._end()

    # ours

    def _end(self) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        reason = f"rank {self.rank} ended ({self._how()}){self._last_words()}"
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(PoolFailed(reason))
        if not self._leaving:
            self._failed(reason)

    def _response(self, line: bytes | None) -> None:
        try:
            response = rpc.read_response(line if line is not None else b"")
        except ValueError as err:
            self._failed(f"rank {self.rank} sent what is no frame ({err}): {(line or b'')[:200]!r}")
            return
        if self._posted and response.id == self._posted[0]:
            self._posted.popleft()
            if not isinstance(response, rpc.StepOk):
                self._step_failed(response)
            return
        waiting = self._waiting.pop(response.id, None) if response.id is not None else None
        if waiting is None:
            # An answer to a request that timed out, or to none: never the answer to the next one.
            _log.warning("a rank answered what nobody waits for", rank=self.rank, answer=repr(response)[:200])
        elif not waiting.done():
            waiting.set_result(response)

    def _step_failed(self, response: rpc.Response) -> None:
        if not isinstance(response, rpc.Error):
            self._failed(f"rank {self.rank} answered a step with {response!r}"[:300])
        elif response.kind == "collective_unavailable":
            # That a peer did not come is a consequence; the peer's own end says why.
            asyncio.get_running_loop().call_later(CONSEQUENCE_S, self._failed, self._said(response))
        else:
            self._failed(self._said(response))

    def _said(self, error: rpc.Error) -> str:
        who = f"rank {self.rank}"
        message = error.message.removeprefix(f"{who}: ")
        return f"{who}: {error.kind}: {message}"

    def _write(self, data: bytes) -> bool:
        """All of it, waiting for a rank that does not read. False where there is nobody to read it."""
        view = memoryview(data)
        with self._writing:
            while view and self._stdin >= 0:
                try:
                    view = view[os.write(self._stdin, view) :]
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(self._stdin, select.POLLOUT)
                    poll.poll()  # also when the rank ends
                except OSError:
                    return False
        return not view

    def _close_stdin(self) -> None:
        # Whoever still writes to a rank that cannot be killed keeps the pipe: its number must not be another's.
        if self._writing.acquire(blocking=False):
            try:
                if self._stdin >= 0:
                    os.close(self._stdin)
                self._stdin = -1
            finally:
                self._writing.release()

    def _how(self) -> str:
        code = self._transport.get_returncode() or 0
        return f"exit code {code}" if code >= 0 else Signals(-code).name

    def _last_words(self) -> str:
        return f"; its last lines: {' | '.join(self.tail)}" if self.tail else ""


def _op_of(frame: type[rpc.Frame]) -> str:
    return str(frame.__struct_config__.tag)
