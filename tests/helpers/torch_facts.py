"""Models that are only described, for what the daemon decides about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helexa.neuron.harness.base import ModelFacts, ModelFiles
from helexa.neuron.harness.torch.config import Layer, ModelConfig, Rope
from helexa.neuron.harness.torch.facts import parameters

FILES = ModelFiles("tiny", (Path("/models/tiny/model.safetensors"),))


def config(**changes: Any) -> ModelConfig:
    """Ten layers; 9 heads in 3 groups, as SmolLM2 has them; 0.4 G parameters."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocabulary": 32_000,
        "hidden": 1152,
        "mlp": 8192,
        "query_heads": 9,
        "kv_heads": 3,
        "head_dim": 128,
        "layers": (Layer(),) * 10,
        "ropes": (Rope(10_000.0),),
        "context": 8192,
        "eps": 1e-5,
        "activation": "silu",
        "attention_scale": 128**-0.5,
        "tied": True,
        "stored": "bfloat16",
        "eos": (2,),
    }
    return ModelConfig(**(fields | changes))


def facts(model: ModelConfig | None = None, *, task: str = "chat", **changes: Any) -> ModelFacts:
    model = model or config()
    fields: dict[str, Any] = {
        "architecture": model.architecture,
        "task": task,
        "n_ctx_train": model.context,
        "n_params": parameters(model),
        "size_bytes": 2 * parameters(model),
        "quant": None,
        "capabilities": (task,),
        "extra": {"config": model, "pooling": "last" if task == "embed" else None},
    }
    return ModelFacts(**(fields | changes))
