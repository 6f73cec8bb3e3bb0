from pathlib import Path
from typing import Any

import pytest

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFacts, ModelFiles, Plan
from helexa.neuron.harness.llama.geometry import Geometry, LayerShape
from helexa.neuron.harness.llama.memory import layer_devices
from helexa.neuron.harness.llama.planning import plan

MB = 1 << 20
FILES = ModelFiles("tiny", (Path("/models/tiny.gguf"),))


def geometry(count: int = 10, /, *, windowed: int = 0, window: int | None = None, **changes: Any) -> Geometry:
    """Layers of 100 MB; each keeps 1024 + 1024 elements a token (4 kB in f16). windowed: how many of them slide."""
    shapes = tuple(LayerShape(100 * MB, 1024, 1024, i < windowed, 0) for i in range(count))
    fields: dict[str, Any] = {
        "layers": shapes,
        "input_bytes": 50 * MB,
        "output_bytes": 50 * MB,
        "repacked_bytes": 0,
        "window": window,
        "n_embd": 4096,
        "n_ff": 8192,
        "n_head": 32,
        "head_widths": (128, 128),
        "n_vocab": 32_000,
        "encoder": False,
        "active_params": 1_000_000_000,
    }
    return Geometry(**(fields | changes))


def facts(shape: Geometry | None = None, *, task: str = "chat", n_ctx_train: int = 131_072, **extra: Any) -> ModelFacts:
    found = {"geometry": shape or geometry(), "pooling": None, "projector_bytes": 0, "lora_bytes": 0, "draft": None}
    return ModelFacts("llama", task, n_ctx_train, 10**9, 1100 * MB, "Q4_K_M", ("chat",), found | extra)


def cpu(free_mb: int = 64_000) -> list[FreeDevice]:
    return [FreeDevice(0, "cpu", "CPU", free_mb, 64_000)]


def gpus(*free_mb: int, total_mb: int = 24_576) -> list[FreeDevice]:
    return [FreeDevice(i, "cuda", f"GPU {i}", free, total_mb) for i, free in enumerate(free_mb)]


def planned(devices: list[FreeDevice], known: ModelFacts | None = None, /, **profile: Any) -> Plan:
    return plan(LoadRequest(model_id="tiny", **profile), FILES, known or facts(), devices)


def test_the_default_is_four_slots_of_a_context_of_32768_where_that_fits() -> None:
    found = planned(cpu())
    assert (found.slots, found.context, found.estimate.why) == (4, 32_768, None)
    assert found.extra["n_ctx"] == 4 * 32_768


def test_the_default_context_is_not_more_than_the_model_was_trained_for() -> None:
    assert planned(cpu(), facts(n_ctx_train=8192)).context == 8192


def test_the_default_context_shrinks_to_what_fits() -> None:
    found = planned(cpu(4000), prompt_cache_mb=0)
    assert found.estimate.why is None
    assert 2048 <= found.context < 32_768
    assert found.context % 256 == 0
    need = found.estimate.devices[0].need_mb
    assert need <= 4000
    assert 4000 - need < 45  # one step more is 40 MB


def test_a_context_that_was_asked_for_is_not_shrunk_but_refused_with_the_figures() -> None:
    found = planned(cpu(4000), context=32_768, prompt_cache_mb=0)
    why = found.estimate.why or ""
    assert not found.estimate.fits
    assert found.context == 32_768
    assert "tiny with 4 slots of 32768 tokens each needs 6" in why
    assert "4000 MB are free" in why
    assert "weights 1100, KV cache 5120, overhead" in why
    assert "It would fit with context = 16384 or slots = 1" in why
    assert found.estimate.ways[:2] == ["context = 16384", "slots = 1"]
    assert planned(cpu()).estimate.ways == []


def test_slots_share_the_context_where_the_cache_is_unified() -> None:
    apart, shared = planned(cpu(), context=8192), planned(cpu(), context=8192, kv_unified=True)
    assert apart.estimate.devices[0].kv_mb == 4 * shared.estimate.devices[0].kv_mb == 1280
    assert shared.extra["n_ctx"] == 8192


@pytest.mark.parametrize(("kv_cache", "mb"), [("f32", 640), ("f16", 320), ("q8_0", 170), ("q4_0", 90)])
def test_the_cache_is_priced_by_its_type(kv_cache: str, mb: int) -> None:
    assert planned(cpu(), context=8192, slots=1, kv_cache=kv_cache).estimate.devices[0].kv_mb == mb


def test_layers_with_a_window_keep_only_the_window_and_one_batch() -> None:
    found = planned(cpu(), facts(geometry(windowed=8, window=1024)), context=32_768, slots=2, batch=512)
    full, window = 2 * 32_768 * 4096 * 2, 2 * 1536 * 4096 * 8
    assert found.estimate.devices[0].kv_mb == (full + window) // MB


def test_a_draft_and_a_projector_are_counted() -> None:
    alone = planned(cpu(), context=4096).estimate.devices[0]
    both = planned(
        cpu(), facts(draft=geometry(1), projector_bytes=70 * MB), context=4096, draft="d", projector="p"
    ).estimate.devices[0]
    assert both.weights_mb == alone.weights_mb + 200 + 70
    assert both.kv_mb == alone.kv_mb + 64


def test_one_card_is_taken_where_one_is_enough_and_two_where_not() -> None:
    assert planned(gpus(6000, 20_000), context=4096).device_indices == (1,)
    two = planned(gpus(1500, 1600), context=4096, slots=1)
    assert two.device_indices == (0, 1)
    assert two.estimate.why is None
    assert two.extra["split"] == "layer"


def test_layers_are_dealt_out_by_free_memory_or_by_shares() -> None:
    by_memory = planned(gpus(8000, 16_000), context=4096, devices=[0, 1])
    weights = [d.weights_mb for d in by_memory.estimate.devices]
    assert sum(weights) == 1000 + 50
    assert weights[0] < weights[1]
    by_shares = planned(gpus(8000, 16_000), context=4096, devices=[0, 1], shares=[3, 1])
    assert by_shares.extra["tensor_split"] == [3, 1]
    assert by_shares.estimate.devices[0].weights_mb > by_shares.estimate.devices[1].weights_mb


def test_the_engines_own_way_of_dealing_out_layers_is_followed() -> None:
    assert layer_devices(4, 5, [1, 1]) == [0, 0, 0, 1, 1]
    assert layer_devices(4, 2, [1, 1]) == [None, None, None, 0, 1]
    assert layer_devices(4, 0, [1]) == [None] * 5
    assert layer_devices(4, 99, [0, 1]) == [1] * 5


def test_devices_by_number_reach_the_engines_places() -> None:
    found = planned(gpus(20_000, 20_000, 20_000), devices=[2], context=4096)
    assert found.extra["tensor_split"] == [0, 0, 20_000]
    assert (found.extra["main_gpu"], found.extra["split"], found.extra["gpu_layers"]) == (2, "none", 11)


def test_a_card_too_small_is_told_with_the_layers_that_would_fit() -> None:
    found = planned(gpus(1200), context=4096, slots=1)
    assert "gpu_layers = 6 (the rest on the CPU)" in (found.estimate.why or "")
    assert planned(gpus(1200), context=4096, slots=1, gpu_layers=6).estimate.why is None


def test_layers_left_to_the_cpu_take_nothing_of_the_card() -> None:
    whole, half = (planned(gpus(20_000), context=4096, gpu_layers=n).estimate.devices[0] for n in (None, 5))
    assert (whole.weights_mb, half.weights_mb) == (1050, 450)


def test_wishes_about_devices_that_cannot_be_met_are_told() -> None:
    assert "asks for 2 devices; 1 can be used" in (planned(gpus(20_000), min_devices=2).estimate.why or "")
    why = planned(gpus(20_000, total_mb=8000), min_device_vram_mb=10_000).estimate.why or ""
    assert "asks for 10000 MB on each device; device 0 has 8000 MB" in why
    assert planned(gpus(20_000, 20_000), min_devices=2, context=4096).device_indices == (0, 1)


def test_tensor_parallel_takes_as_many_cards_and_splits_each_layer() -> None:
    found = planned(gpus(20_000, 20_000, 20_000), tensor_parallel=2, context=4096)
    assert len(found.device_indices) == 2
    assert found.extra["split"] == "tensor"


def test_an_input_that_is_pooled_goes_through_in_one_batch() -> None:
    known = facts(geometry(encoder=True), task="embed", n_ctx_train=512, pooling=1)
    found = planned(cpu(), known)
    assert (found.context, found.extra["batch"], found.extra["prompt_cache_mb"]) == (512, 512, 0)
    assert planned(cpu(), known, batch=256).context == 256


def test_a_batch_takes_at_most_half_a_second_by_the_models_size() -> None:
    small, large = (planned(cpu(), facts(geometry(active_params=n)), threads=2) for n in (10**8, 7 * 10**9))
    assert (small.extra["batch"], large.extra["batch"]) == (64, 8)
    assert planned(gpus(20_000), context=4096).extra["batch"] == 2048
    assert planned(cpu(), batch=256).extra["batch"] == 256


@pytest.mark.parametrize(
    ("profile", "param", "words"),
    [
        ({"slots": 0}, "slots", "at least 1"),
        ({"slots": 10_000}, "slots", "more than is possible"),
        ({"batch": 1}, "batch", "at least 8"),
        ({"context": 0}, "context", "at least 1"),
        ({"context": 1 << 20}, "context", r"trained for \(131072\)"),
        ({"threads": 0}, "threads", "at least 1"),
        ({"gpu_layers": -1}, "gpu_layers", "at least 0"),
        ({"prompt_cache_mb": -1}, "prompt_cache_mb", "at least 0"),
        ({"kv_cache": "q3"}, "kv_cache", "is not known; use one of f32, f16"),
        ({"kv_cache": "q8_0", "flash_attention": False}, "kv_cache", "needs flash attention"),
        ({"devices": [3]}, "devices", "this node has 0"),
        ({"devices": []}, "devices", "each must be named once"),
        ({"devices": [0, 0]}, "devices", "each must be named once"),
        ({"tensor_parallel": 0}, "tensor_parallel", "at least 1"),
        ({"tensor_parallel": 2}, "tensor_parallel", "needs 2 GPUs; this node has none"),
        ({"shares": [1]}, "shares", "one share for each"),
        ({"shares": [0], "devices": [0]}, "shares", "one more than 0"),
    ],
)
def test_an_impossible_option_is_refused_by_name(profile: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        planned(cpu(), **profile)
    assert refused.value.param == param


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(BadRequest, match="100 tokens, the model's has 32000"):
        planned(cpu(), facts(draft=geometry(1, n_vocab=100)), draft="d")


def test_heads_that_a_quantised_cache_cannot_hold_are_refused() -> None:
    with pytest.raises(BadRequest, match="not a multiple of 32"):
        planned(cpu(), facts(geometry(head_widths=(80, 80))), kv_cache="q8_0")
