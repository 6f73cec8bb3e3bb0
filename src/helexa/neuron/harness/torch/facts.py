"""What a safetensors model is, from its folder's small files and the weights' headers: task, capabilities, size."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from helexa.core.errors import BadRequest, NeverLoads
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.abilities import capabilities
from helexa.neuron.harness.base import ModelFacts, ModelFiles
from helexa.neuron.harness.templates.files import FolderUnreadable, read_folder
from helexa.neuron.harness.torch.config import FIRST, LAST, ModelConfig, Unsupported
from helexa.neuron.harness.torch.families import read_config
from helexa.neuron.harness.torch.layout import full_name, pieces
from helexa.neuron.harness.torch.safetensors_files import NotWhole, check, read_tensors
from helexa.neuron.tp.partition import partition

TASKS: Final = ("chat", "completion", "embed")
TOKENIZER: Final = "tokenizer.json"


def folder_of(files: ModelFiles) -> Path:
    return files.files[0].parent


def inspect(files: ModelFiles, request: LoadRequest) -> ModelFacts:
    """Raises NeverLoads where the model is not whole or not one that this engine serves, BadRequest where the profile
    asks for what it is not."""
    folder = folder_of(files)
    if not (folder / TOKENIZER).is_file():
        raise NeverLoads(
            f"{files.model_id} cannot be loaded: {folder} has no {TOKENIZER}, and other forms of tokenizer are not "
            "read here; take a repository that has it, or a GGUF of the model."
        )
    try:
        config = read_config(folder)
        _check_tensors(folder, config)
        templates = read_folder(folder).templates
    except Unsupported as err:
        raise NeverLoads(f"{files.model_id} cannot be loaded by the torch engine: {err}") from err
    except (FolderUnreadable, NotWhole) as err:
        raise NeverLoads(f"{files.model_id} cannot be loaded: {err}", code="file_not_whole") from err
    template = request.chat_template or "\n".join(templates.values()) or None
    task = _task(request, config, template)
    return ModelFacts(
        architecture=config.architecture,
        task=task,
        n_ctx_train=config.context,
        n_params=parameters(config),
        size_bytes=files.size_bytes,
        quant=None,
        capabilities=tuple(request.capabilities) if request.capabilities else capabilities(task, template),
        extra={"config": config, "pooling": _pooling(request, config, task)},
    )


def _check_tensors(folder: Path, config: ModelConfig) -> None:
    """Every tensor is there, whole and of its shape. Raises NotWhole."""
    (everything,) = partition(config.shape, 1)
    found = read_tensors(folder)
    check(found, {full_name(name, found): piece.shape for name, piece in pieces(config, everything)})


def _task(request: LoadRequest, config: ModelConfig, template: str | None) -> str:
    """1. A pooling of its own: embed. 2. A chat template: chat. 3. Else completion. What the profile says goes before,
    where the model can do it."""
    found = "embed" if config.pooling is not None else "chat" if template else "completion"
    wanted = request.task
    if wanted is None:
        return found
    if wanted not in TASKS:
        raise BadRequest(
            f'task = "{wanted}" is nothing that the torch engine does; use one of {", ".join(TASKS)}', param="task"
        )
    if wanted == "chat" and not template:
        raise BadRequest('task = "chat": the model has no chat template; give one as chat_template', param="task")
    if wanted != "embed" and config.architecture.endswith("Model"):
        raise BadRequest(f'task = "{wanted}": a {config.architecture} has no head and only embeds', param="task")
    return wanted


def _pooling(request: LoadRequest, config: ModelConfig, task: str) -> str | None:
    if task != "embed":
        return None
    if config.pooling == FIRST:
        raise NeverLoads("a decoder whose first token is its embedding cannot be: that token sees no other")
    return config.pooling or LAST


def parameters(config: ModelConfig) -> int:
    """Exactly where there are no biases and norms of heads, else nearly."""
    heads = config.head_dim * (2 * config.query_heads + 2 * config.kv_heads)
    total = config.vocabulary * config.hidden * (1 if config.tied else 2) + config.hidden
    for layer in config.layers:
        total += config.hidden * heads + 2 * config.hidden
        if layer.experts and config.experts is not None:
            total += config.experts.count * (3 * config.experts.width + 1) * config.hidden
        else:
            total += 3 * config.mlp * config.hidden
    return total


def active_parameters(config: ModelConfig) -> int:
    """What a token is multiplied with: of experts only the chosen ones, and no look-up in the embedding."""
    idle = 0 if config.tied else config.vocabulary * config.hidden
    if config.experts is not None:
        routed = sum(layer.experts for layer in config.layers)
        unused = config.experts.count - config.experts.per_token
        idle += routed * unused * 3 * config.experts.width * config.hidden
    return parameters(config) - idle
