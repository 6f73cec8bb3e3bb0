"""The host process: one engine, one model, one Unix socket. Started by the daemon, never by hand.

Orders come as JSON lines on stdin, events go as JSON lines on what was stdout at the start (host_messages.py); file
descriptor 1 is moved away first, so that no library's print can break a frame. Whatever else is printed goes to
stderr, the daemon's log. The process is warm (harness and engine imported) before it says ready.

It outlives nobody: the kernel kills it when the daemon dies (also while a load holds the interpreter), and where the
kernel cannot, the end of stdin does.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
from typing import IO, Any, Final

from helexa.neuron import host_messages
from helexa.neuron.harness import open_harness
from helexa.neuron.host_messages import Event, Failed, Load, Loaded, Order, Progress, Quit, Ready
from helexa.neuron.orphans import die_with, take_stdout

ERROR_LIMIT: Final = 4000  # characters of a reason


class Orders:
    """stdin, read by a thread of its own, so that its end is noticed whatever the main thread does."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._queue: queue.SimpleQueue[Order] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), name="orders", daemon=True).start()

    def next(self) -> Order:
        return self._queue.get()

    def _read(self, stream: IO[bytes]) -> None:
        quitting = False
        for line in stream:
            order = host_messages.orders.decode(line)
            quitting = quitting or isinstance(order, Quit)
            self._queue.put(order)
        if not quitting:
            os._exit(0)  # the daemon is gone; the engine has nobody left to serve


class Events:
    """The daemon's ear. One write a frame; a daemon that is gone is no error here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, event: Event) -> None:
        try:
            os.write(self._fd, host_messages.line(event))
        except OSError:
            os._exit(0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="neuron host", description="A model's host process; the daemon starts it.")
    parser.add_argument("--harness", default="llama", help='short name, or "module:Class"')
    parser.add_argument("--parent", type=int, default=None, help="process id of the daemon; without it this one ends")
    args = parser.parse_args(argv)

    events = Events(take_stdout())
    die_with(args.parent)
    # Ctrl-C and a service manager's SIGTERM reach the whole group: the daemon drains, and then ends its hosts itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orders = Orders(os.fdopen(os.dup(0), "rb"))

    try:
        harness = open_harness(args.harness)
        harness.warm()
    except Exception as err:
        events.send(Failed(_reason(err)))
        return 1
    events.send(Ready())

    engine: Any = None
    opened = args.harness
    while isinstance(order := orders.next(), Load):
        try:
            if order.harness != opened:
                harness, opened = open_harness(order.harness), order.harness
            engine = harness.serve(order.spec, lambda fraction: events.send(Progress(fraction)))
        except Exception as err:
            events.send(Failed(_reason(err), isinstance(err, MemoryError)))
            return 1
        events.send(Loaded())
    if engine is not None:
        engine.close()
    return 0


def _reason(err: BaseException) -> str:
    """The error in the words of whoever raised it, with its causes."""
    parts: list[str] = []
    cause: BaseException | None = err
    while cause is not None:
        text = str(cause) or type(cause).__name__
        if not parts or text not in parts[-1]:
            parts.append(text)
        cause = cause.__cause__
    return ": ".join(parts)[:ERROR_LIMIT]


if __name__ == "__main__":
    code = main()
    # Not sys.exit: an engine's threads or a destructor at exit may hang or crash, and nothing here needs them.
    sys.stderr.flush()
    os._exit(code)
