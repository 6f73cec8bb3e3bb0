"""A GGUF file that is a model's tokenizer and template, and next to nothing else: what tokens are counted with.

The engine loads no vocabulary without a model around it. So the model's own metadata are put around the smallest llama
that it accepts, one layer of 32 by 32: the file has a hole where the weights would be, and the engine a few MB. Nothing
is ever generated with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from helexa.neuron.harness.llama.geometry import Geometry
from helexa.neuron.harness.llama.header import DEFAULT_ALIGNMENT, MAGIC, TYPES, BadFile, raw_metadata, read_header
from helexa.neuron.harness.llama.memory import HOST_BYTES, in_mb

WIDTH: Final = 32
CONTEXT: Final = 256
# Of a profile's options those that need no more than that. main_gpu: no device is touched, not even for its context.
OPTIONS: Final[dict[str, Any]] = {
    "task": "chat",
    "n_ctx": CONTEXT,
    "slots": 1,
    "kv_type": "f16",
    "kv_unified": False,
    "flash_attention": False,
    "threads": 1,
    "batch": WIDTH,
    "ubatch": WIDTH,
    "gpu_layers": 0,
    "tensor_split": [],
    "main_gpu": -1,
    "split": "none",
    "mmap": False,
    "checkpoints": 0,
    "prompt_cache_mb": 0,
    "draft_gpu_layers": 0,
}
TOKEN_BYTES: Final = 220  # what a token takes; measured: 71 MB with 49,152 of them, 115 MB with 262,144
_F32, _Q4_0 = 0, 2
_SHAPE: Final[dict[str, tuple[str, Any]]] = {
    "llama.context_length": ("I", CONTEXT),
    "llama.embedding_length": ("I", WIDTH),
    "llama.block_count": ("I", 1),
    "llama.feed_forward_length": ("I", WIDTH),
    "llama.attention.head_count": ("I", 1),
    "llama.attention.head_count_kv": ("I", 1),
    "llama.rope.dimension_count": ("I", WIDTH),
    "llama.attention.layer_norm_rms_epsilon": ("f", 1e-5),
}
_TYPE_OF: Final = {"I": 4, "f": 6}  # GGUF's numbers for a uint32 and a float32


def host_mb(geometry: Geometry) -> int:
    """Memory of a process that counts with a model's vocabulary."""
    return in_mb(HOST_BYTES + TOKEN_BYTES * geometry.n_vocab)


def write_vocabulary(source: Path, to: Path) -> None:
    """source: the model's first file. Raises BadFile, OSError."""
    header = read_header(source)
    tokens = header.lengths.get("tokenizer.ggml.tokens", 0)
    if not tokens:
        raise BadFile(f"{source}: it has no tokenizer")
    own = f"{header.metadata.get('general.architecture')}."
    # What the model is made of and how its file is laid out is ours to say; all else is kept, by its bytes.
    kept = [
        raw
        for key, raw in raw_metadata(source).items()
        if not key.startswith((own, "llama.", "split.")) and key not in ("general.architecture", "general.alignment")
    ]
    keys = [_text("general.architecture") + struct.pack("<I", 8) + _text("llama"), *_shape(), *kept]
    tensors = list(_tensors(tokens))
    described, at = [], 0
    for name, shape, kind in tensors:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        described.append(_text(name) + dims + struct.pack("<IQ", kind, at))
        at += _padded(_size(shape, kind))
    head = b"".join([MAGIC, struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys, *described])
    with to.open("wb") as file:
        file.write(head)
        file.truncate(_padded(len(head)) + at)  # zeros that take no room on the disk


def _shape() -> Iterator[bytes]:
    for key, (kind, value) in _SHAPE.items():
        yield _text(key) + struct.pack(f"<I{kind}", _TYPE_OF[kind], value)


def _tensors(tokens: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    yield "token_embd.weight", (WIDTH, tokens), _Q4_0
    yield "output_norm.weight", (WIDTH,), _F32
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.0.{name}.weight", (WIDTH, WIDTH), _F32
    for name in ("attn_norm", "ffn_norm"):
        yield f"blk.0.{name}.weight", (WIDTH,), _F32


def _size(shape: tuple[int, ...], kind: int) -> int:
    _, block, block_bytes = TYPES[kind]
    elements = 1
    for dim in shape:
        elements *= dim
    return elements // block * block_bytes


def _padded(n: int) -> int:
    return -(-n // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
