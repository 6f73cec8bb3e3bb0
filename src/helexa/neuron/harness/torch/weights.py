"""One rank's weights, read from the model's files: its slices only, each straight from the mapped file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from helexa.neuron.harness.torch.config import ModelConfig
from helexa.neuron.harness.torch.layout import full_name, pieces
from helexa.neuron.harness.torch.safetensors_files import NotWhole, check, read_tensors
from helexa.neuron.tp.partition import Share


class Weights:
    """What `pieces` names, one tensor at a time. Made by `open_weights`."""

    def __init__(
        self, folder: Path, config: ModelConfig, share: Share, progress: Callable[[float], None], stack: ExitStack
    ) -> None:
        self._found = read_tensors(folder)
        self._pieces = dict(pieces(config, share))
        self._names = {name: full_name(name, self._found) for name in self._pieces}
        check(self._found, {self._names[name]: piece.shape for name, piece in self._pieces.items()})
        self._stack = stack
        self._files: dict[Path, Any] = {}
        self._progress = progress
        self._total = sum(math.prod(piece.held) for piece in self._pieces.values())
        self._read = 0

    def read(self, name: str) -> torch.Tensor:
        """This rank's part, in the dtype it is stored in, on the CPU. It may be a view of the mapped file: copy it."""
        piece = self._pieces[name]
        stored = self._found[self._names[name]]
        file = self._files.get(stored.file)
        if file is None:
            file = self._stack.enter_context(safe_open(stored.file, framework="pt", device="cpu"))
            self._files[stored.file] = file
        try:
            part = file.get_slice(self._names[name])
            span = piece.span
            if span is None or span.size == piece.shape[piece.cut or 0]:
                tensor = part[:]
            elif piece.cut == 0:
                tensor = part[span.start : span.stop]
            else:
                tensor = part[:, span.start : span.stop]
        except SafetensorError as err:
            raise NotWhole(f"{stored.file.name}: tensor {self._names[name]} cannot be read: {err}") from err
        self._read += math.prod(piece.held)
        self._progress(self._read / self._total)
        return tensor

    def has(self, name: str) -> bool:
        return name in self._pieces


@contextmanager
def open_weights(
    folder: Path, config: ModelConfig, share: Share, progress: Callable[[float], None]
) -> Iterator[Weights]:
    """progress is told the part of this rank's weights that is read. Raises NotWhole before anything is read."""
    with ExitStack() as stack:
        yield Weights(folder, config, share, progress, stack)
