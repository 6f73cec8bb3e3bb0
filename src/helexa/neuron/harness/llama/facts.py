"""What a model is, from its files' headers alone: task, capabilities, size, quantisation."""

from __future__ import annotations

from typing import Any, Final

from helexa.core.errors import BadRequest, NeverLoads
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.abilities import capabilities
from helexa.neuron.harness.base import ModelFacts, ModelFiles
from helexa.neuron.harness.llama.geometry import ENCODERS, Geometry, Keys, read_geometry
from helexa.neuron.harness.llama.header import BadFile, Header, read_header, read_model

TASKS: Final = ("chat", "completion", "embed", "rerank")

# general.file_type -> the tag people write (llama_ftype)
QUANTS: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}

# Beyond these the engine does not refuse: it aborts the process.
SANE: Final = {"block_count": 512, "context_length": (1 << 31) - 1, "embedding_length": 1 << 24}
POOL_RANK: Final = 4


def inspect(files: ModelFiles, request: LoadRequest) -> ModelFacts:
    """Read the headers of all files of a model. Raises NeverLoads where one is absent, not whole, or lies; BadRequest
    where the profile asks for what the model is not."""
    try:
        headers = read_model(files.files)
        for what, path in _companions(files):
            _check_companion(what, read_header(path), headers[0])
    except BadFile as err:
        raise NeverLoads(f"{files.model_id} cannot be loaded: {err}", code="file_not_whole") from err
    except OSError as err:
        raise NeverLoads(f"{files.model_id} cannot be loaded: {err.filename}: {err.strerror}") from err

    metadata = headers[0].metadata
    keys = Keys(metadata)
    _check_is_model(files, keys)
    geometry = read_geometry(headers)
    has_classifier = any(t.name.startswith(("cls.", "cls")) for h in headers for t in h.tensors)
    template = request.chat_template or metadata.get("tokenizer.chat_template")
    task = _task(request, keys, template, geometry, has_classifier)
    able = capabilities(task, template if isinstance(template, str) else None, sees=files.projector is not None)
    file_type = metadata.get("general.file_type")
    n_ctx_train = keys.number("context_length")
    return ModelFacts(
        architecture=keys.architecture,
        task=task,
        n_ctx_train=n_ctx_train,
        n_params=sum(t.elements for h in headers for t in h.tensors),
        size_bytes=sum(h.size_bytes for h in headers),
        quant=QUANTS.get(file_type & 0x3FF) if isinstance(file_type, int) else None,
        capabilities=tuple(request.capabilities) if request.capabilities else able,
        extra={
            "geometry": geometry,
            "template": template if isinstance(template, str) else None,
            "pooling": keys.get("pooling_type"),
            "projector_bytes": files.projector.stat().st_size if files.projector else 0,
            "lora_bytes": sum(path.stat().st_size for path in files.lora),
            "draft": _draft_geometry(files),
        },
    )


def _companions(files: ModelFiles) -> list[tuple[str, Any]]:
    named = [("projector", files.projector), ("draft", files.draft), *(("lora", path) for path in files.lora)]
    return [(what, path) for what, path in named if path is not None]


def _check_companion(what: str, header: Header, model: Header) -> None:
    """A projector is a projector, an adapter one for this architecture."""
    architecture = header.metadata.get("general.architecture")
    kind = header.metadata.get("general.type")
    if what == "projector" and architecture != "clip":
        raise BadFile(f"{header.path}: it is no projector (mmproj) but a {architecture} model")
    if what == "lora":
        if kind != "adapter":
            raise BadFile(f"{header.path}: it is no LoRA adapter but a {architecture} {kind or 'model'}")
        wanted = model.metadata.get("general.architecture")
        if architecture != wanted:
            raise BadFile(f"{header.path}: the adapter is for {architecture} models, this one is {wanted}")
    if what == "draft" and (kind == "adapter" or architecture == "clip"):
        raise BadFile(f"{header.path}: a draft must be a model, this is a {kind or architecture}")


def _check_is_model(files: ModelFiles, keys: Keys) -> None:
    path = files.files[0]
    if not keys.architecture:
        message = f"{files.model_id} cannot be loaded: {path}: the header names no architecture: it is no model"
        raise NeverLoads(message, code="file_not_whole")
    if keys.architecture == "clip":
        message = f"{path} is a projector (mmproj), not a model: name it as `projector` beside the model it belongs to"
        raise NeverLoads(message)
    if keys.metadata.get("general.type") == "adapter":
        raise NeverLoads(f"{path} is a LoRA adapter, not a model: name it under `lora` beside the model it belongs to")
    for name, high in SANE.items():
        value = keys.number(name)
        if not 1 <= value <= high:
            found = keys.get(name)
            message = f"{files.model_id} cannot be loaded: {path}: {name} is {found}, not 1 to {high}: it is damaged"
            raise NeverLoads(message, code="file_not_whole")


def _task(request: LoadRequest, keys: Keys, template: Any, geometry: Geometry, has_classifier: bool) -> str:
    """1. A pooling that ranks, or a classifier on an encoder: rerank. 2. Another pooling, or an encoder: embed.
    3. A chat template: chat. 4. Else completion. What the profile says goes before, where the model can do it."""
    pooling = keys.get("pooling_type")
    encoder = keys.architecture in ENCODERS
    if pooling == POOL_RANK or (encoder and has_classifier):
        found = "rerank"
    elif encoder or (isinstance(pooling, int) and pooling > 0):
        found = "embed"
    else:
        found = "chat" if template else "completion"
    wanted = request.task
    if wanted is None:
        return found
    if wanted not in TASKS:
        raise BadRequest(f'task = "{wanted}" is not known; use one of {", ".join(TASKS)}', param="task")
    if wanted in ("chat", "completion") and encoder:
        raise BadRequest(f'task = "{wanted}": a {keys.architecture} model only embeds or ranks', param="task")
    if wanted == "chat" and not template:
        raise BadRequest('task = "chat": the model has no chat template; give one as chat_template', param="task")
    if wanted == "rerank" and not has_classifier:
        raise BadRequest('task = "rerank": the model has no classification head (no cls tensors)', param="task")
    return wanted


def _draft_geometry(files: ModelFiles) -> Geometry | None:
    return None if files.draft is None else read_geometry((read_header(files.draft),))
