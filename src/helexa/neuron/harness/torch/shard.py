"""One rank's part of a model: loaded, then stepped. All ranks run the same code; rank 0 alone has an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import torch

from helexa.neuron.harness.torch.attention import plan_rows
from helexa.neuron.harness.torch.build import build_decoder
from helexa.neuron.harness.torch.config import ModelConfig, heads_of
from helexa.neuron.harness.torch.decoder import Decoder
from helexa.neuron.harness.torch.families import read_config
from helexa.neuron.harness.torch.kv import Slabs
from helexa.neuron.harness.torch.linear import LEAST_ROWS, packs
from helexa.neuron.harness.torch.step import Row, Step, StepFailed
from helexa.neuron.harness.torch.weights import open_weights
from helexa.neuron.tp.collective import Collective
from helexa.neuron.tp.partition import Share, partition

DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "int8": torch.bfloat16}


class ShardSpec(msgspec.Struct):
    """What a rank is told to load.

    shares:  of all ranks, as the leader computed them
    dtype:   f32 | bf16 | f16 | int8: of the weights; int8 computes in bf16
    device:  cpu | cuda:0 ...
    threads: of this rank's torch, on CPU
    """

    folder: str
    rank: int
    world_size: int
    shares: list[Share]
    dtype: str
    device: str
    threads: int


def whole_model(folder: Path, *, dtype: str = "f32", device: str = "cpu", threads: int = 1) -> ShardSpec:
    """For one rank that holds everything. Raises Unsupported."""
    shares = list(partition(read_config(folder).shape, 1))
    return ShardSpec(str(folder), 0, 1, shares, dtype, device, threads)


def load_shard(
    spec: ShardSpec, collective: Collective | None, progress: Callable[[float], None] = lambda part: None
) -> Shard:
    """collective: None at world size 1. progress: told the part of this rank's weights that is read.
    Raises Unsupported, NotWhole, MemoryError."""
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    folder, share = Path(spec.folder), spec.shares[spec.rank]
    config = read_config(folder)
    with torch.inference_mode(), memory_errors(), open_weights(folder, config, share, progress) as weights:
        decoder = build_decoder(config, share, weights, spec.dtype, torch.device(spec.device), collective)
    return Shard(spec, config, decoder)


class Shard:
    """One caller, one thread."""

    def __init__(self, spec: ShardSpec, config: ModelConfig, decoder: Decoder) -> None:
        self.config = config
        self._rank = spec.rank
        self._device = torch.device(spec.device)
        self._dtype = DTYPES[spec.dtype]
        self._decoder: Decoder | None = decoder
        share = spec.shares[spec.rank]
        self.kv_bytes_per_token = config.kv_bytes_per_token(share, self._dtype.itemsize)
        self._slabs = Slabs(
            len(config.layers), len(heads_of(config, share).kv), config.head_dim, self._dtype, self._device
        )
        # Rows that nobody asked for are added up to this many, where that is faster.
        pads = spec.device == "cpu" and spec.dtype == "f32" and config.experts is None and packs(torch.float32)
        self._least_rows = LEAST_ROWS if pads else 1
        self._windows = tuple(dict.fromkeys(layer.window for layer in config.layers))

    def step(self, step: Step) -> torch.Tensor | None:
        """[sum of wanted, vocabulary or hidden size] float32 on rank 0, where anything is wanted; None elsewhere.
        Raises MemoryError before anything is computed, CollectiveFailed, StepFailed."""
        decoder, slabs, device = self._decoder, self._slabs, self._device
        if decoder is None:
            raise StepFailed("the shard is closed")
        with torch.inference_mode(), memory_errors():
            for slab in step.drops:
                slabs.drop(slab)
            for copy in step.copies:
                slabs.copy(copy)
            rows = [row for row in step.rows if row.tokens]
            for row in rows:
                slabs.reserve(row.slab, row.start, row.start + len(row.tokens), row.room)
            if not rows:
                return None
            ids = [token for row in rows for token in row.tokens]
            places = [place for row in rows for place in range(row.start, row.start + len(row.tokens))]
            short = self._least_rows - len(ids)
            ids += ids[:1] * short
            places += places[:1] * short
            plans = plan_rows(rows, self._windows, slabs, self._dtype)
            x = decoder.hidden(
                torch.tensor(ids, device=device), torch.tensor(places, device=device), max(places), plans
            )
            wanted = _wanted(rows)
            if not wanted:
                return None
            chosen = wanted + wanted[:1] * (self._least_rows - len(wanted))
            if chosen != list(range(len(places))):
                x = x.index_select(0, torch.tensor(chosen, device=device))
            x = decoder.final(x)
            if step.hidden:
                return x[: len(wanted)] if self._rank == 0 else None
            return decoder.logits(x, len(wanted))

    def close(self) -> None:
        """Its memory goes with the last reference to a tensor of its. Never raises."""
        self._decoder = None
        self._slabs.clear()


class LocalRunner:
    """A Runner of one rank, in this process."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def step(self, step: Step) -> torch.Tensor | None:
        try:
            return self.shard.step(step)
        except (RuntimeError, ValueError, KeyError) as err:
            raise StepFailed(f"a step failed: {err}") from err

    def close(self) -> None:
        self.shard.close()


def _wanted(rows: list[Row]) -> list[int]:
    """Which of the step's tokens are answered."""
    found: list[int] = []
    end = 0
    for row in rows:
        end += len(row.tokens)
        found += range(end - row.wanted, end)
    return found


@contextmanager
def memory_errors() -> Iterator[None]:
    """torch's errors for memory that is not there, as Python's."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise MemoryError(str(err)) from err
    except RuntimeError as err:
        if "not enough memory" in str(err) or "allocate memory" in str(err):
            raise MemoryError(str(err)) from err
        raise
