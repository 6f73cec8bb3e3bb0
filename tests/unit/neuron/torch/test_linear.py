"""Products are the same however a matrix is held, of any width."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'helexa[torch]'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helexa.neuron.harness.torch.linear import Dense, Int8, Packed, make_linear, packs  # noqa: E402

WIDTHS = st.integers(1, 100)
ROWS = st.integers(1, 20)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def spread(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [Dense, Packed, Int8])
@pytest.mark.parametrize("biased", [False, True])
@settings(max_examples=30)
@given(st.integers(0, 1000), ROWS, WIDTHS, WIDTHS)
def test_a_product_is_that_of_the_matrix_with_bias_and_residual(
    kind: type, biased: bool, seed: int, n: int, inputs: int, outputs: int
) -> None:
    dtype = torch.bfloat16 if kind is Int8 else torch.float32
    if kind is Packed and not packs(dtype):
        pytest.skip("this torch does not multiply with packed matrices")
    x = spread(seed, n, inputs).to(dtype)
    weight, plus = spread(seed + 1, outputs, inputs), spread(seed + 2, n, outputs)
    bias = spread(seed + 3, outputs).to(dtype) if biased else None
    held = kind(weight, bias)
    known = x.float() @ weight.t() + (0 if bias is None else bias.float())
    got = held(x)
    assert got.dtype == dtype
    near = TOLERANCE[dtype] * max(1.0, inputs**0.5)
    assert (got.float() - known).abs().max() <= near + TOLERANCE[dtype] * known.abs().max()
    summed = held(x, plus)
    assert summed.dtype == torch.float32
    assert (summed - known - plus).abs().max() <= near + TOLERANCE[dtype] * (known.abs().max() + plus.abs().max())


@pytest.mark.parametrize(("outputs", "inputs"), [(0, 8), (8, 0)])
@pytest.mark.parametrize("int8", [False, True])
def test_a_rank_with_no_rows_or_no_columns_multiplies_too(outputs: int, inputs: int, int8: bool) -> None:
    dtype = torch.bfloat16 if int8 else torch.float32
    weight = torch.zeros(outputs, inputs)
    held = make_linear(weight if int8 else weight.to(dtype), int8=int8)
    got = held(torch.ones(3, inputs, dtype=dtype))
    assert got.shape == (3, outputs)
    assert not got.any()


def test_every_row_of_eight_bit_weights_has_a_scale_of_its_own() -> None:
    weight = torch.stack([torch.linspace(-1, 1, 64), torch.linspace(-1000, 1000, 64)])
    x = torch.eye(64, dtype=torch.bfloat16)
    got = torch.cat([Int8(weight)(row.unsqueeze(0)) for row in x]).t().float()
    assert ((got - weight).abs().amax(dim=1) / weight.abs().amax(dim=1)).max() < 0.01
