from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.torch_facts import FILES, config, facts

from helexa.core.errors import BadRequest
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.harness.base import FreeDevice, ModelFacts, Plan
from helexa.neuron.harness.torch import profile
from helexa.neuron.harness.torch.config import Experts, Layer
from helexa.neuron.harness.torch.facts import active_parameters, parameters
from helexa.neuron.harness.torch.layout import weight_bytes
from helexa.neuron.harness.torch.planning import plan
from helexa.neuron.tp.partition import partition

MB = 1 << 20
PER_TOKEN = 2 * 10 * 3 * 128 * 4  # bytes of keys and values in f32


@pytest.fixture(autouse=True)
def _a_plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(profile, "default_threads", lambda: 4)


def cpu(free_mb: int = 64_000) -> list[FreeDevice]:
    return [FreeDevice(0, "cpu", "CPU", free_mb, 64_000)]


def gpus(*free_mb: int, total_mb: int = 24_576) -> list[FreeDevice]:
    return [FreeDevice(i, "cuda", f"GPU {i}", free, total_mb) for i, free in enumerate(free_mb)]


def planned(devices: list[FreeDevice], known: ModelFacts | None = None, /, **asked: Any) -> Plan:
    return plan(LoadRequest(model_id="tiny", **asked), FILES, known or facts(), devices)


def test_the_default_keeps_four_contexts_where_that_fits() -> None:
    found = planned(cpu())
    assert (found.slots, found.context, found.estimate.why) == (4, 8192, None)
    assert found.extra["kv_tokens"] == 4 * 8192
    (need,) = found.estimate.devices
    assert need.kv_mb == -(-4 * 8192 * PER_TOKEN // MB)
    table = 2 * config().vocabulary * config().hidden  # tokens are looked up in bf16, beside the head that is the same
    assert need.weights_mb == -(-(4 * parameters(config()) + table) // MB)
    assert found.estimate.ranks == []


def test_requests_share_what_is_kept_where_memory_is_short_but_each_may_have_its_context() -> None:
    found = planned(cpu(2400), context=8192)
    assert (found.context, found.slots, found.estimate.why) == (8192, 4, None)
    assert 8192 <= found.extra["kv_tokens"] < 4 * 8192
    assert found.estimate.devices[0].need_mb <= 2400


def test_a_context_that_nobody_asked_for_shrinks_to_what_fits() -> None:
    found = planned(cpu(1950))
    assert found.estimate.why is None
    assert 2048 <= found.context < 8192
    assert found.extra["kv_tokens"] == found.context


def test_a_context_that_was_asked_for_is_refused_with_the_figures_and_what_would_fit() -> None:
    found = planned(cpu(1950), context=8192)
    why = found.estimate.why or ""
    assert not found.estimate.fits
    assert "tiny with a context of 8192 tokens needs" in why
    assert "1950 MB are free: weights" in why
    ways = found.estimate.ways
    assert 'quant = "bf16"' in ways
    (fitting,) = [int(way.removeprefix("context = ")) for way in ways if way.startswith("context")]
    assert planned(cpu(1950), context=fitting).estimate.fits
    assert planned(cpu(1950), context=8192, quant="bf16").estimate.fits


@pytest.mark.parametrize(("quant", "dtype", "kv"), [(None, "f32", 4), ("BF16", "bf16", 2), ("int8", "int8", 2)])
def test_memory_is_told_by_the_dtype(quant: str | None, dtype: str, kv: int) -> None:
    found = planned(cpu(), quant=quant, slots=1)
    assert found.extra["dtype"] == dtype
    assert found.estimate.devices[0].kv_mb == 8192 * PER_TOKEN * kv // 4 // MB


def test_a_cpu_that_computes_in_bf16_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert planned(cpu()).extra["dtype"] == "bf16"
    assert planned(cpu(), facts(config(stored="float32"))).extra["dtype"] == "f32"


def test_a_gpu_takes_two_bytes_as_the_file_has_them() -> None:
    assert planned(gpus(24_000)).extra["dtype"] == "bf16"
    assert planned(gpus(24_000), facts(config(stored="float16"))).extra["dtype"] == "f16"


def test_ranks_on_a_cpu_share_its_memory_and_are_told_one_by_one() -> None:
    one, two = planned(cpu()), planned(cpu(), tensor_parallel=2)
    assert two.extra["devices"] == ["cpu", "cpu"]
    assert two.device_indices == (0,)
    assert [rank.rank for rank in two.estimate.ranks] == [0, 1]
    (need,) = two.estimate.devices
    assert need.weights_mb == sum(rank.weights_mb for rank in two.estimate.ranks)
    assert need.weights_mb - one.estimate.devices[0].weights_mb in (0, 1, 2)  # norms are on both


def test_shares_are_dealt_as_asked() -> None:
    found = planned(cpu(), tensor_parallel=2, shares=[2, 1])
    assert found.extra["weights"] == [2, 1]
    first, second = found.estimate.ranks
    assert first.kv_mb in (2 * second.kv_mb, 2 * second.kv_mb - 1)
    assert planned(cpu(), shares=[2, 1]).extra["weights"] == [2, 1]


def test_as_few_gpus_as_hold_it_are_taken() -> None:
    assert planned(gpus(3000, 20_000)).device_indices == (1,)
    two = planned(gpus(1300, 1300), context=8192)
    assert two.device_indices == (0, 1)
    assert two.extra["devices"] == ["cuda:0", "cuda:1"]
    assert two.extra["weights"] is None
    assert two.estimate.fits


def test_unequal_gpus_together_hold_what_equal_shares_would_not() -> None:
    big = facts(config(mlp=65_536, hidden=2304, context=4096))  # 9.4 GB in bf16
    found = planned(gpus(9000, 4600), big, tensor_parallel=2)
    assert found.estimate.fits
    assert found.extra["weights"] == [9000.0, 4600.0]
    equal = planned(gpus(9000, 9000), big, tensor_parallel=2)
    assert (equal.estimate.fits, equal.extra["weights"]) == (True, None)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"tensor_parallel": 10}, "tensor_parallel", "World sizes that work: 1 to 9"),
        ({"tensor_parallel": 17}, "tensor_parallel", "more than is possible"),
        ({"shares": [1, 1], "tensor_parallel": 3}, "shares", "2 values for 3 ranks"),
        ({"shares": [1, 0]}, "shares", "over 0"),
        ({"devices": [1]}, "devices", "this node has 0"),
        ({"devices": [0, 0]}, "devices", "named once"),
        ({"context": 9000}, "context", "8192"),
        ({"slots": 257}, "slots", "256"),
        ({"quant": "Q4_K_M"}, "quant", "f32, bf16, f16, int8"),
        ({"kv_cache": "q8_0"}, "kv_cache", "f32"),
        ({"kv_cache": "f32", "quant": "int8"}, "kv_cache", "bf16"),
        ({"gpu_layers": 4}, "gpu_layers", "torch"),
        ({"draft": "x"}, "draft", "torch"),
        ({"lora": ["x"]}, "lora", "torch"),
    ],
)
def test_what_is_impossible_whatever_the_memory_is_refused_by_name(
    asked: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        planned(cpu(), **asked)
    assert refused.value.param == param


def test_ranks_want_a_gpu_each_and_devices_one_rank_each() -> None:
    with pytest.raises(BadRequest, match="needs 3 GPUs; 2 can be used"):
        planned(gpus(9000, 9000), tensor_parallel=3)
    with pytest.raises(BadRequest, match="devices names 2"):
        planned(gpus(9000, 9000), tensor_parallel=1, devices=[0, 1])
    assert planned(gpus(9000, 9000), devices=[1, 0]).extra["devices"] == ["cuda:1", "cuda:0"]


def test_the_wishes_for_devices_are_kept() -> None:
    assert planned(gpus(9000, 9000), min_devices=2).device_indices == (0, 1)
    assert "asks for 3 devices" in (planned(gpus(9000, 9000), min_devices=3).estimate.why or "")
    small = planned(gpus(9000, total_mb=10_000), min_device_vram_mb=20_000)
    assert "asks for 20000 MB on each device" in (small.estimate.why or "")


def test_a_prompt_cache_keeps_more() -> None:
    plain, more = planned(cpu()), planned(cpu(), prompt_cache_mb=100)
    assert more.extra["kv_tokens"] - plain.extra["kv_tokens"] == 100 * MB // PER_TOKEN


def test_an_embedding_model_keeps_one_input() -> None:
    assert planned(cpu(), facts(task="embed")).extra["kv_tokens"] == 8192


def test_a_step_is_no_longer_than_a_client_should_wait() -> None:
    small = config(layers=(Layer(),), mlp=1024)
    large = config(layers=(Layer(),) * 100, hidden=4096 * 2, mlp=28_672)
    chunks = [profile.default_chunk(model, 4, on_gpu=False) for model in (small, config(), large)]
    assert chunks == sorted(chunks, reverse=True)
    assert (chunks[0], chunks[-1]) == (512, 32)
    assert profile.default_chunk(config(), 4, on_gpu=True) == 2048
    assert planned(cpu(), batch=7).extra["chunk"] == 7


def test_of_experts_only_the_chosen_ones_are_multiplied_with() -> None:
    experts = Experts(count=8, per_token=2, width=512, renormalised=True)
    model = config(experts=experts, layers=(Layer(experts=True),) * 4)
    assert parameters(model) - active_parameters(model) == 4 * 6 * 3 * 512 * 1152


@given(
    ranks=st.integers(1, 9),
    weights=st.lists(st.floats(0.2, 5), min_size=9, max_size=9),
)
def test_the_ranks_weights_add_up_to_the_model(ranks: int, weights: list[float]) -> None:
    model = config(kv_heads=9, tied=False)
    shares = partition(model.shape, ranks, weights[:ranks])
    total = sum(weight_bytes(model, share, "f32") for share in shares)
    copied = (ranks - 1) * (10 * 2 + 1) * model.hidden
    narrower = 2 * model.vocabulary * model.hidden  # tokens are looked up in bf16, as the file has them
    assert total == (parameters(model) + copied) * 4 - narrower


@given(free=st.lists(st.integers(500, 6000), min_size=1, max_size=4), slots=st.integers(1, 8), seen=st.booleans())
def test_what_is_said_to_fit_fits_on_every_device(free: list[int], slots: int, seen: bool) -> None:
    found = planned(gpus(*free) if seen else cpu(free[0]), slots=slots)
    if found.estimate.fits:
        assert all(need.need_mb <= (need.free_mb or 0) for need in found.estimate.devices)
        assert found.extra["kv_tokens"] >= found.context
    else:
        assert found.estimate.why
