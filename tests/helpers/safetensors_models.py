"""Safetensors model folders for the torch harness's tests: SmolLM2-135M-Instruct, and a tiny random model of every
family, written with transformers. Each is made once and kept outside the repository; a test that wants one that cannot
be made here is skipped with the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from tests.helpers import models

CACHE: Final = Path(os.environ.get("HELEXA_TEST_CACHE") or Path.home() / ".cache" / "helexa-tests")
_SMOLLM2: Final = "smollm2-135m-instruct-f32-v1"  # another number for another content
_RANDOM: Final = "random-v2"

CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY: Final = 320  # of the random models: 4 control tokens, 256 bytes, merges, and rows no token has

# What each random model is, for transformers. Sizes that no two dimensions share, so that a mistake cannot hide; with
# more positions than a sliding window has.
_SIZES: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("Llama", {"head_dim": 16}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-4-groups": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "head_dim": 16}),
    "qwen2": ("Qwen2", {"head_dim": 16}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3-embedding": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 72}),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 20,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, its GGUF's values dequantised: config, tokenizer, chat template, weights."""
    return _made(_SMOLLM2, _write_smollm2)


def random_model(family: str) -> Path:
    """A key of FAMILIES. Babbles; its logits are as spread as a trained model's, so that comparing them means much.
    The tokenizer is of bytes, with ChatML."""
    return _made(f"{_RANDOM}/{family}", lambda folder: _write_random(folder, family))


def _made(name: str, write: Callable[[Path], None]) -> Path:
    path = CACHE / name
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # two test runs may do this at once
    try:
        write(mine)
        mine.chmod(0o755)
        mine.rename(path)
    except OSError:
        if not path.is_dir():  # else the other run was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(mine, ignore_errors=True)
    return path


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: the safetensors models of the tests are made with it")


def _write_smollm2(folder: Path) -> None:
    _need("gguf", "numpy", "safetensors")
    import gguf
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(models.smollm2())

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads, groups = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    weights = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        kind = tensor.name.removesuffix(".weight")
        if kind in ("token_embd", "output_norm"):
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[kind]
        else:
            _, layer, part = kind.split(".")
            name = f"layers.{layer}.{names[part]}"
            if part in ("attn_q", "attn_k"):  # GGUF has the two halves that rope turns together side by side
                n = heads if part == "attn_q" else groups
                values = values.reshape(n, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        weights[f"model.{name}.weight"] = np.ascontiguousarray(values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hidden = field("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    _write_json(folder / "config.json", config)
    tokens = field("tokenizer.ggml.tokens")
    controls = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == 3]
    merges = field("tokenizer.ggml.merges")
    _write_tokenizer(folder, tokens, controls, merges, field("tokenizer.chat_template"), unknown=tokens[0])
    _write_json(folder / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2})


def _write_tokenizer(
    folder: Path, tokens: list[str], controls: list[int], merges: list[str], template: str, *, unknown: str | None
) -> None:
    """A byte-level BPE as SmolLM2 has it: digits one by one, no beginning is added."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in controls
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": unknown,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "added_tokens_decoder": {
                str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
            },
            "chat_template": template,
        },
    )
    (folder / "chat_template.jinja").write_text(template)


def _write_random(folder: Path, family: str) -> None:
    _need("torch", "transformers", "safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest makes errors of them, and these are another library's
        import torch
        import transformers

        kind, changes = FAMILIES[family]
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **changes})
        name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
        model = getattr(transformers, name)(config)
        if family == "qwen3-embedding":
            model = model.model  # as such models are published: without a head, names without "model."
        generator = torch.Generator().manual_seed(len(family) * 1000 + sum(family.encode()))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:  # rows keep the spread of what they read
                    parameter.copy_(noise if "embed_tokens" in key else noise / parameter.shape[-1] ** 0.5)
                elif key.endswith("bias"):
                    parameter.copy_(noise * 0.3)
                else:
                    parameter.add_(noise * 0.2)
        if getattr(config, "tie_word_embeddings", False):
            with torch.no_grad():
                model.get_input_embeddings().weight.div_(config.hidden_size**0.5)
        model.eval().save_pretrained(folder)
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *_byte_letters()]
    merges = []
    for pair in ("t h", "th e", "i n", "a n", "Ġ t", "Ġt h", "Ġth e", "Ġ a", "e r"):
        merges.append(pair)
        tokens.append(pair.replace(" ", ""))
    _write_tokenizer(folder, tokens, [0, 1, 2, 3], merges, CHATML, unknown="<unk>")
    if family == "qwen3-embedding":
        (folder / "1_Pooling").mkdir()
        _write_json(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True},
        )
        module = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        _write_json(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, path) in enumerate(module.items())
            ],
        )


def _byte_letters() -> list[str]:
    """How a byte-level BPE writes each byte: the printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False))


@dataclass(frozen=True)
class Reference:
    """What transformers makes of a prompt, in float32. logits: [tokens, vocabulary], or [tokens, hidden] of an
    embedding model. margins: of each token, how far the last expert chosen lay before the first that was not, the
    least over the layers; empty where there are no experts."""

    tokens: list[int]
    logits: Any
    margins: Any


def reference(family: str) -> Reference:
    """family: a key of FAMILIES, or "smollm2". Computed once for each version of transformers."""
    _need("torch", "transformers", "safetensors")
    import torch
    from safetensors.torch import load_file, save_file

    version = importlib.metadata.version("transformers")

    def write(folder: Path) -> None:
        tokens, logits, margins = _refer(smollm2() if family == "smollm2" else random_model(family), family)
        save_file({"tokens": tokens, "logits": logits, "margins": margins}, folder / "reference.safetensors")

    found = load_file(_made(f"reference-v1-{version}/{family}", write) / "reference.safetensors")
    return Reference(found["tokens"].to(torch.int64).tolist(), found["logits"], found["margins"])


def _refer(folder: Path, family: str) -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        bare = family.endswith("embedding")
        kind = transformers.AutoModel if bare else transformers.AutoModelForCausalLM
        # eager: written out in plain products, no kernel of torch's own in the reference
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(7)
        highest = min(model.config.vocab_size, 49_152) if family == "smollm2" else 260
        tokens = torch.randint(4, highest, (1, 100), generator=generator)
        margins = []

        def note(module: Any, given: Any, got: Any) -> None:
            router, chosen = got[0], model.config.num_experts_per_tok
            best = router.float().reshape(-1, router.shape[-1]).softmax(-1).sort(-1, descending=True).values
            margins.append(best[:, chosen - 1] - best[:, chosen])

        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(note)
        with torch.inference_mode():
            got = model(tokens)
        logits = (got.last_hidden_state if bare else got.logits)[0]
        least = torch.stack(margins).amin(0) if margins else torch.empty(0)
        return tokens[0].clone(), logits.contiguous().clone(), least.clone()
