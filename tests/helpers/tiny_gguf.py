"""Tiny random GGUF models, written with the `gguf` package: real files for the real engine, a few hundred kB each.

Their answers are noise; what they show is that a path works: chat, draft, adapter, embedding, rerank, projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True)
class Shape:
    """A llama model's sizes; heads are 32 wide, as quantised caches need them.

    The vocabulary is fixed: 3 control tokens, 256 bytes, a space, letters.
    """

    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_head_kv: int = 1
    n_ff: int = 128
    n_ctx: int = 2048


def chat_model(
    path: Path,
    shape: Shape | None = None,
    *,
    seed: int = 0,
    template: str | None = CHATML,
    controls: Sequence[str] = (),
    **metadata: Any,
) -> Path:
    """A llama that babbles. Two with the same seed and other layers make a model and its draft.

    controls: further control tokens, such as those for filling in
    metadata: further keys ("general.alignment" and such), written as they are.
    """
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    tokens, scores, kinds = _spm_vocabulary(controls)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(0)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    kv = shape.n_embd // shape.n_head * shape.n_head_kv
    writer.add_tensor("token_embd.weight", _random(rng, len(tokens), shape.n_embd))
    writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    writer.add_tensor("output.weight", _random(rng, len(tokens), shape.n_embd))
    for i in range(shape.n_layer):
        for name, rows, columns in (
            ("attn_q", shape.n_embd, shape.n_embd),
            ("attn_k", kv, shape.n_embd),
            ("attn_v", kv, shape.n_embd),
            ("attn_output", shape.n_embd, shape.n_embd),
            ("ffn_gate", shape.n_ff, shape.n_embd),
            ("ffn_up", shape.n_ff, shape.n_embd),
            ("ffn_down", shape.n_embd, shape.n_ff),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", _random(rng, rows, columns))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape.n_embd, np.float32))
    return _close(writer, path)


def lora_adapter(path: Path, shape: Shape | None = None, *, rank: int = 4, scale: float = 4.0, seed: int = 7) -> Path:
    """An adapter for `chat_model` of the same shape, strong enough to change every answer."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)
    for i in range(shape.n_layer):
        writer.add_tensor(f"blk.{i}.attn_q.weight.lora_a", _random(rng, rank, shape.n_embd))
        writer.add_tensor(f"blk.{i}.attn_q.weight.lora_b", _random(rng, shape.n_embd, rank))
        writer.add_tensor(f"blk.{i}.ffn_down.weight.lora_a", _random(rng, rank, shape.n_ff))
        writer.add_tensor(f"blk.{i}.ffn_down.weight.lora_b", _random(rng, shape.n_embd, rank))
    return _close(writer, path)


def embedding_model(path: Path, *, seed: int = 1, pooling: int = 1, n_ctx: int = 512) -> Path:
    """A BERT that reads lower-case letters. pooling: 1 mean, 2 first token."""
    writer = _bert(path, np.random.default_rng(seed), pooling, n_ctx)
    return _close(writer, path)


def rerank_model(path: Path, *, seed: int = 2, n_ctx: int = 512) -> Path:
    """The same with a classification head of one output."""
    rng = np.random.default_rng(seed)
    writer = _bert(path, rng, 4, n_ctx)
    writer.add_tensor("cls.weight", _random(rng, 64, 64))
    writer.add_tensor("cls.bias", np.zeros(64, np.float32))
    writer.add_tensor("cls.output.weight", _random(rng, 1, 64))
    writer.add_tensor("cls.output.bias", np.zeros(1, np.float32))
    return _close(writer, path)


def _bert(path: Path, rng: np.random.Generator, pooling: int, n_ctx: int) -> gguf.GGUFWriter:
    width, layers, n_ff = 64, 2, 128
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("▁" + c for c in letters + "?.,"), *letters]
    kinds = [_CONTROL, _UNKNOWN, _CONTROL, _CONTROL, _CONTROL, *[_NORMAL] * (len(tokens) - 5)]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny-bert")
    writer.add_file_type(0)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_uint32("tokenizer.ggml.cls_token_id", 2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    writer.add_tensor("token_embd.weight", _random(rng, len(tokens), width))
    writer.add_tensor("token_types.weight", _random(rng, 2, width))
    writer.add_tensor("position_embd.weight", _random(rng, n_ctx, width))
    _norm(writer, "token_embd_norm", width)
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", width, width),
            ("attn_v", width, width),
            ("attn_output", width, width),
            ("ffn_up", n_ff, width),
            ("ffn_down", width, n_ff),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", _random(rng, rows, columns))
            writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(rows, np.float32))
        _norm(writer, f"blk.{i}.attn_output_norm", width)
        _norm(writer, f"blk.{i}.layer_output_norm", width)
    return writer


def projector(path: Path, *, n_embd: int = 64, seed: int = 3) -> Path:
    """A LLaVA-like eye of one layer for images of 28 x 28, for a model of this width."""
    rng = np.random.default_rng(seed)
    width, layers, n_ff, image, patch = 32, 2, 64, 28, 14
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(0)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    writer.add_uint32("clip.vision.image_size", image)
    writer.add_uint32("clip.vision.patch_size", patch)
    writer.add_uint32("clip.vision.embedding_length", width)
    writer.add_uint32("clip.vision.feed_forward_length", n_ff)
    writer.add_uint32("clip.vision.projection_dim", n_embd)
    writer.add_uint32("clip.vision.block_count", layers)
    writer.add_uint32("clip.vision.attention.head_count", 4)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_tensor("v.patch_embd.weight", _random(rng, width, 3, patch, patch))
    writer.add_tensor("v.class_embd", _random(rng, width))
    writer.add_tensor("v.position_embd.weight", _random(rng, (image // patch) ** 2 + 1, width))
    _norm(writer, "v.pre_ln", width)
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", width, width),
            ("attn_v", width, width),
            ("attn_out", width, width),
            ("ffn_up", n_ff, width),
            ("ffn_down", width, n_ff),
        ):
            writer.add_tensor(f"v.blk.{i}.{name}.weight", _random(rng, rows, columns))
            writer.add_tensor(f"v.blk.{i}.{name}.bias", np.zeros(rows, np.float32))
        _norm(writer, f"v.blk.{i}.ln1", width)
        _norm(writer, f"v.blk.{i}.ln2", width)
    for name, rows, columns in (("mm.0", n_embd, width), ("mm.2", n_embd, n_embd)):
        writer.add_tensor(f"{name}.weight", _random(rng, rows, columns))
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))
    return _close(writer, path)


def split_model(folder: Path, parts: int = 2) -> tuple[Path, ...]:
    """A chat model in several files, as `gguf-split` writes them: metadata in the first, tensors dealt out."""
    whole = gguf.GGUFReader(chat_model(folder / "whole.gguf"))
    tensors = [(t.name, np.array(t.data).reshape([int(n) for n in reversed(t.shape)])) for t in whole.tensors]
    per_part = -(-len(tensors) // parts)
    paths = []
    for no in range(parts):
        path = folder / f"tiny-{no + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if no == 0:
            for field in whole.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", no)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(tensors))
        for name, data in tensors[no * per_part : (no + 1) * per_part]:
            writer.add_tensor(name, data)
        paths.append(_close(writer, path))
    return tuple(paths)


def _spm_vocabulary(controls: Sequence[str] = ()) -> tuple[list[str], list[float], list[int]]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"(){}[]<>|/_-"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters, *controls]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * (len(letters) + 1), *[_CONTROL] * len(controls)]
    return tokens, [-float(i) for i in range(len(tokens))], kinds


def _norm(writer: gguf.GGUFWriter, name: str, width: int) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
