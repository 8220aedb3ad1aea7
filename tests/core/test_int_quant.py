"""FusedIntQuant gives what Brevitas's IntQuant gives, and steps aside where it cannot."""

import pytest
import torch
from brevitas.core.function_wrapper import FloorSte, Identity
from brevitas.core.quant import IntQuant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import oracles
from granq_plugin.core.int_quant import FusedIntQuant, has_stock_arithmetic


def pair(signed: bool = False, narrow_range: bool = False, **options) -> tuple[IntQuant, IntQuant]:
    return tuple(c(narrow_range, signed, Identity(), **options) for c in (IntQuant, FusedIntQuant))


def results(int_quant, x, scale, zero_point, bits) -> list[torch.Tensor]:
    """Value, and the gradients to x and to the scale if it wants one."""
    leaf = x.clone().requires_grad_()
    y = int_quant(scale, zero_point, torch.tensor(float(bits)), leaf)
    leaves = [leaf] + [scale] * scale.requires_grad
    return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y))]


@given(oracles.values((3, 5, 4, 4)), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans(),
       st.sampled_from([1.0, 0.3, 2.0**-10]), st.sampled_from([0.0, 3.0]), st.booleans())
@settings(max_examples=60)
def test_is_brevitas_int_quant(values, bits, signed, narrow, scale, zero_point, channels_last):
    x = torch.from_numpy(values)
    x.view(-1)[::17] = torch.nan
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.float64):
        parameters = torch.tensor(scale, dtype=dtype), torch.tensor([zero_point], dtype=dtype), bits
        expected, actual = (results(q, x.to(dtype), *parameters) for q in pair(signed, narrow and signed))
        assert actual[0].dtype == expected[0].dtype and actual[0].stride() == expected[0].stride()
        for a, e in zip(actual, expected):
            oracles.assert_equal(a, e)


@pytest.mark.usefixtures("cpp_kernel")
def test_runs_the_kernel():
    y, _ = results(pair()[1], torch.randn(2, 3, 4, 4), torch.tensor(0.1), torch.tensor(0.0), 4)
    assert "AffineQuantize" in type(y.grad_fn).__name__


@pytest.mark.parametrize("case", ["learned scale", "scale per channel", "half precision", "floor", "vector"])
def test_steps_aside(case):
    x, scale = torch.randn(2, 3, 4, 4), torch.tensor(0.1)
    options = dict(float_to_int_impl=FloorSte()) if case == "floor" else {}
    if case == "learned scale":
        scale.requires_grad_()
    elif case == "scale per channel":
        scale = torch.rand(1, 3, 1, 1) + 0.1
    elif case == "half precision":
        x = x.bfloat16()
    elif case == "vector":
        x = x.flatten()
    stock, fused = pair(**options)
    expected, actual = (results(q, x, scale, torch.tensor(0.0), 4) for q in (stock, fused))
    assert len(actual) == len(expected) and type(actual[0].grad_fn) is type(expected[0].grad_fn)
    for a, e in zip(actual, expected):
        oracles.assert_equal(a, e)


def test_is_traced_as_brevitas_operations():
    stock, fused = pair()
    scale, zero_point, bits = torch.tensor(0.1), torch.tensor(0.0), torch.tensor(4.0)
    graphs = [make_fx(lambda x: q(scale, zero_point, bits, x))(torch.randn(2, 3)).code for q in (stock, fused)]  # noqa: B023
    assert graphs[0] == graphs[1]


def test_stock_arithmetic():
    assert all(has_stock_arithmetic(q) for q in pair())
    assert not any(has_stock_arithmetic(q) for q in (*pair(float_to_int_impl=FloorSte()), *pair(quant_delay_steps=3)))
    assert not has_stock_arithmetic(torch.nn.Identity())
