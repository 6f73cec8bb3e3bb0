"""A tensor-parallel rank: `neuron --worker --rank R --world-size N --device D`. Started by the leader, never by hand.

Requests come as lines on stdin (rpc.py) and are answered one by one on what was stdout at the start. stdin is read by a
thread of its own: its end is the leader's, and ends this process at once, even while the main thread is in a
collective. torch is imported at `init`, not before, so that `ping` answers at once.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
from typing import Final

from helexa.neuron.freed import give_back_freed
from helexa.neuron.orphans import die_with, take_stdout
from helexa.neuron.tp import comm, rpc
from helexa.neuron.tp.collective import Collective, CollectiveFailed, CollectiveUnavailable
from helexa.neuron.tp.holder import LOADER, CannotLoad, Holder, NoShard
from helexa.neuron.tp.rendezvous import open_collective

READ: Final = 1 << 16
SHOWN: Final = 200  # bytes of a bad line that the log gets


class Requests:
    """stdin as lines; None for one over the limit."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.leaving = False  # the rank ends by itself; the end of stdin is then no news
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def next(self) -> bytes | None:
        return self._queue.get()

    def _read(self) -> None:
        lines = rpc.Lines()
        while data := os.read(self._fd, READ):
            for line in lines.feed(data):
                self._queue.put(line)
        if not self.leaving:
            if lines.half:
                print(f"stdin ended inside a frame, which is dropped: {lines.half[:SHOWN]!r}", file=sys.stderr)
            os._exit(0)  # the leader is gone


class Worker:
    """One rank, and where it stands: outside a group, or in one."""

    def __init__(self, rank: int, world_size: int, device: int, holder: Holder) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.collective: Collective | None = None
        self._holder = holder

    def answer(self, line: bytes | None) -> rpc.Response:
        """Never raises: what goes wrong is the answer."""
        try:
            if line is None:
                raise rpc.BadFrame("bad_request", f"a frame of over {rpc.MAX_FRAME} bytes")
            request = rpc.read_request(line)
        except rpc.BadFrame as err:
            return err.error
        try:
            response = self._do(request)
        except (CollectiveFailed, CollectiveUnavailable) as err:
            response = rpc.Error(kind="collective_unavailable", message=str(err))
        except NoShard:
            response = self._not_initialised("holds no shard; send load_shard first")
        except CannotLoad as err:
            response = rpc.Error(kind="load", message=f"rank {self.rank}: {err}")
        except MemoryError as err:
            response = rpc.Error(kind="device", message=f"rank {self.rank}: out of memory{f': {err}' * bool(str(err))}")
        except RuntimeError as err:  # torch's own errors, a device's among them
            response = rpc.Error(kind="device", message=f"rank {self.rank}: {err}")
        except Exception as err:
            response = rpc.Error(kind="internal", message=f"rank {self.rank}: {err!r}")
        response.id = request.id
        return response

    def _do(self, request: rpc.Request) -> rpc.Response:
        match request:
            case rpc.Ping():
                return rpc.Pong(rank=self.rank, world_size=self.world_size, cuda_device=self.device)
            case rpc.Init(comm_id=comm_id):
                return self._init(comm_id)
            case rpc.NcclSanityCheck():
                return self._sanity()
            case rpc.Step(step=step):
                return self._holder.step(step)
            case rpc.LoadShard(spec=spec):
                if self.collective is None:
                    return self._not_initialised("is in no group; send init first")
                return self._holder.load(spec, self.collective)
            case rpc.Drop(slabs=slabs):
                self._holder.drop(slabs)
                return rpc.DropOk()
            case rpc.Clear():
                self._holder.clear()
                return rpc.ClearOk()
            case rpc.QueryMemory():
                return self._holder.memory()
            case rpc.Unload():
                self._holder.unload()
                give_back_freed()
                return rpc.UnloadOk()
            case rpc.Shutdown():
                if self.collective is not None:
                    self.collective.close()
                return rpc.Bye()

    def _init(self, comm_id: str) -> rpc.Response:
        if self.collective is not None:
            return rpc.Error(kind="bad_request", message=f"rank {self.rank} is in a group already")
        try:
            known = comm.read(comm_id)
        except ValueError as err:
            return rpc.Error(kind="bad_request", message=str(err))
        self.collective = open_collective(known, self.rank, self.world_size, self.device)
        return rpc.InitOk()

    def _sanity(self) -> rpc.Response:
        if self.collective is None:
            return self._not_initialised("is in no group; send init first")
        return rpc.NcclSanityResult(observed_sum=self.collective.count_ranks())

    def _not_initialised(self, why: str) -> rpc.Error:
        return rpc.Error(kind="not_initialised", message=f"rank {self.rank} {why}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="neuron --worker", description="A tensor-parallel rank; the leader of a model starts it."
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--device", type=int, required=True, help="the device's index, as GET /discovery gives it")
    parser.add_argument("--parent", type=int, default=None, help="process id of the leader; without it this one ends")
    parser.add_argument("--loader", default=LOADER, help='the engine\'s loader of a shard, "module:function"')
    args = parser.parse_args(argv)
    if not 0 <= args.rank < args.world_size:
        parser.error(f"--rank is 0 to {args.world_size - 1} where --world-size is {args.world_size}")

    frames = take_stdout()
    die_with(args.parent)
    # Both reach the whole group of processes: the leader ends its ranks itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests = Requests(os.dup(0))
    worker = Worker(args.rank, args.world_size, args.device, Holder(args.loader))
    while True:
        response = worker.answer(requests.next())
        requests.leaving = isinstance(response, rpc.Bye)
        _write(frames, rpc.line(response))
        if requests.leaving:
            return 0


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError:
            os._exit(0)  # the leader is gone
