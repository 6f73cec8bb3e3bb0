"""A safetensors model in its host process: orders in, a server on a Unix socket out. What needs torch is imported
here, and only when told to.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from helexa.core import logs
from helexa.neuron.harness.templates.files import named_templates, read_folder
from helexa.neuron.harness.templates.template import ChatTemplate, TemplateBroken
from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.facts import TOKENIZER
from helexa.neuron.harness.torch.families import read_config
from helexa.neuron.harness.torch.prompts import Prompts
from helexa.neuron.harness.torch.request import Limits
from helexa.neuron.harness.torch.server import SocketServer
from helexa.neuron.harness.torch.work import Desk, read_defaults

LAST_WORDS_S: Final = 0.3  # for errors that are on their way to clients
FAILED: Final = 70  # EX_SOFTWARE

_log = logs.get("neuron.torch")


class Closes(Protocol):
    def close(self) -> None: ...


def warm() -> None:
    """Import the engine, so that a load does not pay for it."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which discovery counts
    warm_prompts()
    import llguidance  # noqa: F401
    import torch  # noqa: F401


def warm_prompts() -> None:
    """The part of it that renders and counts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would stand in the way of a step's
    import tokenizers  # noqa: F401


class TorchHost:
    """A loaded model that answers on its socket until `close()`."""

    def __init__(self, server: SocketServer, engine: Closes | None) -> None:
        self._server = server
        self._engine = engine

    def close(self) -> None:
        """Requests that still run are cut, memory goes back, no rank is left. Blocks for the step at hand."""
        self._server.close()
        if self._engine is not None:
            self._engine.close()


def serve(spec: dict[str, Any], progress: Callable[[float], None]) -> TorchHost:
    """Load, and answer on spec["socket"]. Raises RuntimeError with a reason, MemoryError for want of memory."""
    folder, model = Path(spec["folder"]), spec["model_id"]
    socket = Path(spec["socket"])
    if len(os.fsencode(socket)) > 107:  # sockaddr_un
        raise RuntimeError(f"the socket's path is too long ({socket}): set run_dir to a shorter one")
    progress(0.0)
    config = read_config(folder)
    prompts = prompts_of(spec)
    desk = Desk(
        prompts,
        model=model,
        context=spec["context"],
        slots=spec["slots"],
        vocabulary=config.vocabulary,
        defaults=read_defaults(_bytes(folder / "generation_config.json")),
        pooling=spec["pooling"],
    )
    engine = None if spec["counts"] else _engine(spec, config, prompts.tokenizer, progress)
    server = SocketServer(desk, engine, socket=socket, api_key=spec["api_key"])
    try:
        server.start()
    except BaseException:
        if engine is not None:
            engine.close()
        raise
    progress(1.0)
    return TorchHost(server, engine)


def prompts_of(spec: dict[str, Any]) -> Prompts:
    """Of the model in spec["folder"]. Raises RuntimeError with a reason."""
    folder = Path(spec["folder"])
    return Prompts(
        _tokenizer(folder),
        _template(folder, spec),
        model=spec["model_id"],
        context=spec["context"],
        merges_system=spec.get("merge_system"),
    )


def _engine(spec: dict[str, Any], config: ModelConfig, tokenizer: Any, progress: Callable[[float], None]) -> Any:
    from helexa.neuron.harness.torch.engine import Engine
    from helexa.neuron.harness.torch.runners import open_runner

    runner = open_runner(spec, config, progress, _end)
    limits = Limits(
        context=spec["context"],
        rows=spec["rows"],
        chunk=spec["chunk"],
        kv_tokens=spec["kv_tokens"],
        vocabulary=config.vocabulary,
    )
    return Engine(runner, tokenizer, limits, name=spec["model_id"], eos=config.eos, on_failed=_end)


def _end(reason: str) -> None:
    """The model can go no further: its requests have been told why, and the process ends, so that the daemon starts
    it anew. The reason is its last line."""
    _log.error("the model failed", reason=reason)

    def leave() -> None:
        sys.stderr.write(f"{reason}\n")
        sys.stderr.flush()
        os._exit(FAILED)

    timer = threading.Timer(LAST_WORDS_S, leave)
    timer.daemon = True
    timer.start()


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as err:  # what its Rust side raises is a bare Exception
        raise RuntimeError(f"{folder / TOKENIZER} cannot be read: {err}") from err


def _template(folder: Path, spec: dict[str, Any]) -> ChatTemplate | None:
    files = read_folder(folder)
    sources = named_templates(spec["chat_template"]) or files.templates
    if not sources:
        return None
    try:
        return ChatTemplate(sources, files.special, model=spec["model_id"])
    except TemplateBroken as err:
        raise RuntimeError(f"{spec['model_id']}: {err}") from err


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b"{}"
