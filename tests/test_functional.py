"""granq_plugin.functional against numpy, bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracles
from granq_plugin import functional as GF

HALVES = (torch.float16, torch.bfloat16)


def all_finite(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype, ascending."""
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()].float().sort().values.to(dtype)


class TestGranqIsThePapersFormula:

    @given(oracles.activations(), oracles.BIT_WIDTHS)
    def test_forward(self, drawn, bit_width):
        x, axis = drawn
        for actual, expected in zip(GF.granq(torch.from_numpy(x), bit_width, axis), oracles.granq(x, bit_width, axis)):
            oracles.assert_equal(actual, expected)

    @given(oracles.activations(np.float64), oracles.BIT_WIDTHS)
    def test_float64(self, drawn, bit_width):
        x, axis = drawn
        for actual, expected in zip(GF.granq(torch.from_numpy(x), bit_width, axis), oracles.granq(x, bit_width, axis)):
            oracles.assert_equal(actual, expected)

    @given(oracles.activations(), oracles.BIT_WIDTHS, oracles.SEEDS)
    def test_gradient_is_exactly_the_incoming_one(self, drawn, bit_width, seed):
        x = torch.from_numpy(drawn[0]).requires_grad_()
        incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        GF.granq(x, bit_width, drawn[1]).value.backward(incoming)
        oracles.assert_equal(x.grad, incoming)

    @given(oracles.activations(), oracles.BIT_WIDTHS)
    def test_scale_and_zero_point_are_detached(self, drawn, bit_width):
        result = GF.granq(torch.from_numpy(drawn[0]).requires_grad_(), bit_width, drawn[1])
        assert result.value.requires_grad and not result.scale.requires_grad and not result.zero_point.requires_grad

    @given(oracles.activations(), st.integers(1, 12))
    def test_every_channel_has_at_most_two_to_the_k_levels_and_one_for_a_tie(self, drawn, bit_width):
        x, axis = torch.from_numpy(drawn[0]), drawn[1]
        value = GF.granq(x, bit_width, axis).value
        rows = value.reshape(1, -1) if x.dim() == 1 else value if x.dim() == 2 else value.movedim(axis, 1).flatten(0, 1)
        for row in rows:
            assert row.unique().numel() <= 2**bit_width + 1

    def test_reciprocal_times_number_is_not_division(self):
        """The trap that the oracle avoids is real: true division gives other values for some inputs."""
        x = torch.rand(64, 64, 8, 8, dtype=torch.float32)
        lo, hi = GF.channel_range(x)
        divided = 15 / (hi - lo).double()
        assert not torch.equal(GF.inverse_scale(lo, hi, 4)[0], divided.float())

    def test_own_range_of_every_sample_and_channel(self):
        """Each (sample, channel) plane alone gives the same bits as within the batch."""
        x = torch.randn(3, 4, 5, 6) * torch.logspace(-3, 3, 12).view(3, 4, 1, 1)
        value = GF.granq(x, 3).value
        for b in range(3):
            for c in range(4):
                oracles.assert_equal(GF.granq(x[b:b + 1, c:c + 1], 3).value, value[b:b + 1, c:c + 1])

    @pytest.mark.parametrize("shape, axis, scale_shape", [
        ((2, 3, 4, 5), 1, (2, 3, 1, 1)), ((2, 3, 4, 5), -1, (2, 1, 1, 5)), ((2, 3, 4), 2, (2, 1, 4)),
        ((2, 7), 1, (2, 1)), ((7, ), 1, (1, )), ((2, 3, 1, 1), 1, (2, 3, 1, 1))])
    def test_scale_shape(self, shape, axis, scale_shape):
        result = GF.granq(torch.randn(shape), 4, axis)
        assert result.scale.shape == result.zero_point.shape == scale_shape

    def test_docstring_example(self):
        x = torch.tensor([[[0.0, 0.4, 1.0], [0.0, 4.0, 10.0]]])
        oracles.assert_equal(GF.granq(x, 1).value, torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 10.0]]]))

    @given(hnp.arrays(np.float32, st.tuples(*[st.integers(1, 3)] * 3), elements=st.floats(
        width=32, allow_nan=False, allow_infinity=False)), oracles.BIT_WIDTHS)
    @example(np.array([[[-3.4e38, 0, 3.4e38]]], np.float32), 1)
    @example(np.array([[[3.4e38, 3.4e38]]], np.float32), 16)
    @example(np.array([[[1e-45, 0]]], np.float32), 16)
    def test_no_finite_input_becomes_nan(self, x, bit_width):
        result = GF.granq(torch.from_numpy(x), bit_width)
        assert not result.value.isnan().any()
        assert (result.scale > 0).all() and result.zero_point.isfinite().all()

    @given(hnp.arrays(np.float32, (1, 2, 4), elements=st.floats(-2.0**125, 2.0**125, width=32)), oracles.BIT_WIDTHS)
    def test_equals_the_formula_on_drawn_floats_wherever_that_cannot_overflow(self, x, bit_width):
        span = np.maximum(x.max(2) - x.min(2), 1e-8).astype(np.float64)
        assume((np.abs(x).max(2).astype(np.float64) * (2.0**bit_width - 1) / span < 2.0**126).all())
        oracles.assert_equal(GF.granq(torch.from_numpy(x), bit_width).value, oracles.granq(x, bit_width)[0])


class TestShapesAndLayouts:

    @pytest.mark.parametrize("shape, scale_shape", [
        ((0, 3, 4, 4), (0, 3, 1, 1)), ((2, 3, 0, 4), (2, 3, 1, 1)), ((2, 0, 4), (2, 0, 1)), ((0, 5), (0, 1)),
        ((0, ), (1, ))])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_empty(self, shape, scale_shape, dtype):
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        value, scale, zero_point = GF.granq(x, 4)
        assert value.shape == shape and value.dtype == dtype
        assert scale.shape == zero_point.shape == scale_shape
        assert scale.dtype == torch.promote_types(dtype, torch.float32)
        value.sum().backward()
        assert x.grad.shape == shape

    @pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided", "flipped_axes"])
    def test_layout_does_not_change_values(self, layout):
        x = torch.randn(3, 4, 6, 5)
        x = dict(
            channels_last=lambda: x.to(memory_format=torch.channels_last), transposed=lambda: x.transpose(2, 3),
            expanded=lambda: x[:, :1].expand(3, 4, 6, 5), strided=lambda: x[::2, 1:, ::3, ::2],
            flipped_axes=lambda: x.permute(3, 2, 1, 0))[layout]().requires_grad_()
        before = x.detach().clone()
        value = GF.granq(x, 4).value
        oracles.assert_equal(value, oracles.granq_tensor(before.contiguous(), 4))
        oracles.assert_equal(x, before)  # never in place
        incoming = torch.randn(x.shape)
        oracles.assert_equal(torch.autograd.grad(value, x, incoming)[0], incoming)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize("shape, memory_format", [
        ((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)])
    def test_memory_format_is_kept(self, dtype, shape, memory_format):
        x = torch.randn(shape).to(dtype, memory_format=memory_format)
        assert GF.granq(x, 4).value.is_contiguous(memory_format=memory_format)
        assert GF.granq(x.contiguous(), 4).value.is_contiguous()

    @given(oracles.activations())
    def test_channel_axis_is_a_matter_of_naming(self, drawn):
        x, axis = torch.from_numpy(drawn[0]), drawn[1]
        assume(x.dim() > 2)
        oracles.assert_equal(GF.granq(x, 4, axis).value, GF.granq(x.movedim(axis, 1), 4).value.movedim(1, axis))

    def test_vmap(self):
        x = torch.randn(5, 2, 3, 4, 4)
        value, scale, zero_point = torch.func.vmap(lambda t: GF.granq(t, 3))(x)
        for i in range(5):
            for mapped, alone in zip((value[i], scale[i], zero_point[i]), GF.granq(x[i], 3)):
                oracles.assert_equal(mapped, alone)

    def test_vmap_of_the_gradient(self):
        x, incoming = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 4)
        grads = torch.func.vmap(torch.func.grad(lambda t, g: (GF.granq(t, 3).value * g).sum()))(x, incoming)
        oracles.assert_equal(grads, incoming)


class TestHalfPrecision:

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("bit_width", [1, 3, 4, 8, 16])
    @pytest.mark.parametrize("order", ["one channel", "sorted channels", "shuffled channels", "magnitude channels"])
    def test_all_finite_values(self, dtype, bit_width, order):
        x = all_finite(dtype)
        if order == "shuffled channels":
            x = x[torch.randperm(x.numel())]
        elif order == "magnitude channels":
            x = x[x.float().abs().argsort(stable=True)]
        x = x.view(1, 1, -1) if order == "one channel" else x.view(1, -1, 256)
        value, scale, zero_point = GF.granq(x, bit_width)
        assert value.dtype == dtype and scale.dtype == zero_point.dtype == torch.float32
        assert value.isfinite().all()
        # where ranges come near the largest float32 the formula itself overflows: there only the error is bounded
        ordinary = (x.float().abs().amax(2) < 2.0**100).expand(1, -1)
        oracles.assert_equal(value[ordinary], oracles.granq_tensor(x, bit_width)[ordinary])
        assert ordinary.any() or (dtype == torch.bfloat16 and order in ("one channel", "shuffled channels"))
        wide = x[~ordinary].double()
        step = (wide.amax(1) - wide.amin(1)).clamp_min(1e-8) / (2**bit_width - 1)
        tolerance = 0.5001 * step[:, None] + 2 * torch.finfo(dtype).eps * wide.abs().amax(1, keepdim=True)
        if bit_width <= 8:  # beyond, float32 products no longer resolve a step
            assert ((value[~ordinary].double() - wide).abs() <= tolerance).all()

    @pytest.mark.parametrize("dtype", HALVES)
    @given(data=st.data(), bit_width=oracles.BIT_WIDTHS)
    def test_is_the_float32_formula_rounded(self, dtype, data, bit_width):
        drawn, axis = data.draw(oracles.activations())
        limit = min(torch.finfo(dtype).max, 1e20)
        x = torch.from_numpy(drawn).clamp(-limit, limit).to(dtype)
        oracles.assert_equal(GF.granq(x, bit_width, axis).value, oracles.granq_tensor(x, bit_width, axis))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_gradient_keeps_dtype_and_value(self, dtype):
        x = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
        incoming = torch.randn(2, 3, 4, 4).to(dtype)
        GF.granq(x, 4).value.backward(incoming)
        oracles.assert_equal(x.grad, incoming)

    def test_dead_float16_channel_is_no_nan(self):
        """1e-8 underflows in float16: the formula evaluated in float16 is NaN here."""
        x = torch.full((1, 2, 3, 3), 0.25, dtype=torch.float16)
        oracles.assert_equal(GF.granq(x, 3).value, x)


class TestBadInput:

    @given(oracles.SEEDS, st.sampled_from([math.nan, math.inf, -math.inf]), oracles.BIT_WIDTHS,
           st.sampled_from([torch.float32, torch.float64, *HALVES]))
    def test_poisons_its_own_channel_and_no_other(self, seed, bad, bit_width, dtype):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal((3, 4, 2, 5))).to(dtype)
        clean = GF.granq(x, bit_width)
        b, c, h, w = (rng.integers(n) for n in x.shape)
        x[b, c, h, w] = bad
        dirty = GF.granq(x, bit_width)
        poisoned = torch.zeros(3, 4, dtype=torch.bool)
        poisoned[b, c] = True
        assert dirty.value[poisoned].isnan().all()
        for before, after in zip(clean, dirty):
            oracles.assert_equal(after[~poisoned], before[~poisoned])

    def test_poisons_its_own_row(self):
        x = torch.randn(3, 7)
        x[1, 2] = math.nan
        assert torch.equal(GF.granq(x, 4).value.isnan().any(1), torch.tensor([False, True, False]))

    def test_check_finite_counts(self):
        x = torch.randn(2, 3, 4)
        GF.check_finite(x)
        x[0, 0, 0], x[1, 2, 3], x[1, 1, 1] = math.nan, math.inf, -math.inf
        with pytest.raises(ValueError, match="3 NaN or Inf values of 24"):
            GF.check_finite(x)

    @pytest.mark.parametrize("bit_width", [0, -1, 2.5, 17, math.nan, math.inf, torch.tensor(0.0), np.float32(1.5)])
    def test_bit_width_out_of_range(self, bit_width):
        with pytest.raises(ValueError, match=r"whole number from 1 to 16, got ") as e:
            GF.granq(torch.randn(1, 2, 3), bit_width)
        assert repr(bit_width.item() if isinstance(bit_width, torch.Tensor) else bit_width) in str(e.value)

    @pytest.mark.parametrize("bit_width", [True, "four", None, [4], torch.ones(2)])
    def test_bit_width_of_wrong_type(self, bit_width):
        with pytest.raises(TypeError, match=r"whole number from 1 to 16, got ") as e:
            GF.granq(torch.randn(1, 2, 3), bit_width)
        assert repr(bit_width) in str(e.value)

    @pytest.mark.parametrize("bit_width", [4, 4.0, np.int64(4), np.float32(4), torch.tensor(4.0), torch.tensor([4])])
    def test_bit_width_as_brevitas_keeps_it(self, bit_width):
        checked = GF.check_bit_width(bit_width)
        assert checked == 4 and type(checked) is int

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
    @pytest.mark.parametrize("shape", [(1, 2, 3), (0, 2, 3)])
    def test_wrong_dtype_is_named(self, dtype, shape):
        with pytest.raises(TypeError, match=str(dtype)):
            GF.granq(torch.zeros(shape, dtype=dtype), 4)

    def test_not_a_tensor(self):
        with pytest.raises(TypeError, match="got ndarray"):
            GF.granq(np.zeros((1, 2, 3)), 4)

    @pytest.mark.parametrize("shape, axis", [
        ((2, 3, 4), 0), ((2, 3, 4), 3), ((2, 3, 4), -3), ((2, 3, 4), -4), ((2, 3), 2), ((0, 3, 4), 0), ((), 1)])
    def test_bad_channel_axis_is_named(self, shape, axis):
        with pytest.raises(ValueError, match=f"channel_axis={axis} .*{len(shape)}-D"):
            GF.granq(torch.zeros(shape), 4, axis)


class TestChannelRange:

    @given(oracles.activations())
    def test_over_the_batch(self, drawn):
        x, axis = drawn
        assume(x.ndim > 1)
        expected = oracles.ranges(x, axis % x.ndim)
        for actual, end in zip(GF.channel_range(torch.from_numpy(x), axis, per_sample=False), expected):
            oracles.assert_equal(actual, end)

    def test_one_unbatched_sample_has_one_range_per_feature(self):
        x = torch.randn(5)
        for end in GF.channel_range(x, per_sample=False):
            oracles.assert_equal(end, x)


@st.composite
def range_ends(draw):
    """Ends of ranges as a collector may give them: not always around 0, many orders of magnitude, lo == hi too."""
    end = st.floats(-2.0**100, 2.0**100, width=32) | st.floats(-10, 10, width=32) | st.just(0.0)
    pairs = draw(st.lists(st.tuples(end, end), min_size=1, max_size=6))
    ends = np.sort(np.array(pairs, np.float32), axis=1)
    return ends[:, :1].copy(), ends[:, 1:].copy()


class TestAffineParams:

    @given(range_ends(), oracles.BIT_WIDTHS)
    def test_asymmetric(self, ends, bit_width):
        for actual, expected in zip(
                GF.affine_params(*map(torch.from_numpy, ends), bit_width), oracles.affine_params(*ends, bit_width)):
            oracles.assert_equal(actual, expected)

    @given(range_ends(), st.integers(2, 16))
    def test_symmetric(self, ends, bit_width):
        scale, zero_point = GF.affine_params(*map(torch.from_numpy, ends), bit_width, signed=True)
        oracles.assert_equal(scale, oracles.affine_params(*ends, bit_width, signed=True)[0])
        assert not zero_point.any()

    @given(range_ends(), oracles.BIT_WIDTHS)
    def test_zero_point_is_an_integer_of_the_grid(self, ends, bit_width):
        """So zero is exactly representable, and QONNX and QCDQ accept it."""
        _, zero_point = GF.affine_params(*map(torch.from_numpy, ends), bit_width)
        assert torch.equal(zero_point, zero_point.round())
        assert zero_point.min() >= 0 and zero_point.max() <= 2**bit_width - 1
        assert not torch.signbit(zero_point).any()

    @given(range_ends(), oracles.BIT_WIDTHS)
    def test_zero_point_is_zero_without_negative_values(self, ends, bit_width):
        lo, hi = (torch.from_numpy(np.abs(e)) for e in ends)
        assert not GF.affine_params(torch.minimum(lo, hi), torch.maximum(lo, hi), bit_width)[1].any()

    @given(range_ends(), oracles.BIT_WIDTHS, oracles.SEEDS)
    def test_error_is_at_most_half_a_step_inside_the_range(self, ends, bit_width, seed):
        """The ends included, although the zero point is rounded; up to float32 rounding of the scale."""
        lo, hi = (torch.from_numpy(e) for e in ends)
        scale, zero_point = (t.double() for t in GF.affine_params(lo, hi, bit_width))
        lo, hi = lo.clamp_max(0).double(), hi.clamp_min(0).double()
        inside = torch.rand(lo.shape[0], 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = torch.cat([lo, hi, lo + (hi - lo) * inside], dim=1)
        q = (x / scale + zero_point).round().clamp(0, 2**bit_width - 1)
        error = ((q - zero_point) * scale - x).abs()
        assert (error <= scale * (0.5 + 2**bit_width * 2.0**-22)).all()

    @given(range_ends(), st.integers(2, 16))
    def test_symmetric_range_end_is_the_largest_integer(self, ends, bit_width):
        lo, hi = (torch.from_numpy(e) for e in ends)
        scale, _ = GF.affine_params(lo, hi, bit_width, signed=True)
        magnitude = torch.maximum(-lo, hi).clamp_min(1e-8)
        assert torch.equal((magnitude / scale).round(), torch.full_like(lo, 2**(bit_width - 1) - 1))

    def test_dead_channel_divides_by_no_zero(self):
        for signed in (False, True):
            scale, zero_point = GF.affine_params(torch.zeros(3), torch.zeros(3), 16, signed)
            assert (scale > 0).all() and not zero_point.any()

    def test_huge_range_does_not_overflow(self):
        limit = torch.tensor([torch.finfo(torch.float32).max])
        scale, zero_point = GF.affine_params(-limit, limit, 8)
        assert scale.isfinite().all() and zero_point.item() in (127, 128)

    def test_symmetric_needs_two_bits(self):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            GF.affine_params(torch.zeros(1), torch.ones(1), 1, signed=True)
