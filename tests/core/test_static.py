"""GranQActPerChannelStatic: what is collected, how it freezes, how it loads, how a learned scale trains."""

import copy
import math

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brevitas.graph.calibrate import calibration_mode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracles
from granq_plugin import GranQActPerChannelStatic
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.core.static import StaticGranQ


def identity(**options) -> qnn.QuantIdentity:
    return qnn.QuantIdentity(GranQActPerChannelStatic, **options)


def relu(**options) -> qnn.QuantReLU:
    return qnn.QuantReLU(GranQActPerChannelStatic, **options)


def quantizer(act) -> StaticGranQ:
    return act.act_quant.fused_activation_quant_proxy.tensor_quant


def collector(act) -> CollectedRange:
    return quantizer(act).scaling_impl


def frozen(act, x) -> nn.Module:
    """The activation, its ranges taken from one batch."""
    with calibration_mode(act):
        act(x)
    return act.eval()


def with_ranges_of(act, x: torch.Tensor, axis: int = 1, signed: bool = False, narrow: bool = False) -> torch.Tensor:
    """What numpy makes of x with the ranges that ``act`` has collected."""
    c = collector(act)
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    lo, hi = (r.numpy().reshape(shape) for r in (c.running_min, c.running_max))
    bit_width = quantizer(act).bit_width
    return torch.from_numpy(oracles.affine_quantize(x.detach().numpy(), lo, hi, bit_width, signed, narrow))


@st.composite
def batches(draw):
    """``(batches, channel_axis)``: two to four batches of one shape but for the batch size."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = draw(st.integers(1, len(shape)))
    count = draw(st.integers(2, 4))
    return [draw(oracles.values([draw(st.integers(1, 3))] + shape, axis)) for _ in range(count)], axis


class TestCollecting:

    @given(batches(), oracles.BIT_WIDTHS)
    def test_minmax_is_the_range_of_all_batches(self, drawn, bit_width):
        xs, axis = drawn
        act = identity(range_mode="minmax", channel_axis=axis, bit_width=bit_width)
        for x in xs:
            act(torch.from_numpy(x))
        for actual, expected in zip((collector(act).running_min, collector(act).running_max),
                                    oracles.ranges(np.concatenate(xs), axis)):
            oracles.assert_equal(actual, expected)
        y = act.eval()(torch.from_numpy(xs[0]))
        oracles.assert_equal(y, with_ranges_of(act, torch.from_numpy(xs[0]), axis))

    @given(batches(), st.floats(0.01, 1))
    def test_ema_is_the_moving_average_of_ranges(self, drawn, momentum):
        xs, axis = drawn
        act = identity(range_mode="ema", momentum=momentum, channel_axis=axis)
        for x in xs:
            act(torch.from_numpy(x))
        for end, actual in enumerate((collector(act).running_min, collector(act).running_max)):
            ends = np.stack([oracles.ranges(x.astype(np.float64), axis)[end] for x in xs])
            expected = ends[0]
            for e in ends[1:]:
                expected = (1 - momentum) * expected + momentum * e
            tolerance = 1e-6 * np.abs(ends).max(0)  # of float32, on what was averaged
            assert (np.abs(actual.numpy() - expected) <= tolerance).all()

    @pytest.mark.parametrize("symmetric", [False, True])
    @given(batches(), st.integers(2, 8))
    def test_mse_averages_the_shares_of_least_error(self, symmetric, drawn, bit_width):
        """Of each batch and channel: of the shares 1, 0.9 ... 0.2 of its range one that is as good as the one numpy finds."""
        xs, axis = drawn
        act = identity(range_mode="mse", channel_axis=axis, bit_width=bit_width, signed=symmetric, narrow_range=symmetric)
        others = tuple(d for d in range(xs[0].ndim) if d != axis % xs[0].ndim)
        ends = []
        for x in xs:
            alone = identity(range_mode="mse", channel_axis=axis, bit_width=bit_width, signed=symmetric, narrow_range=symmetric)
            alone(torch.from_numpy(x))
            act(torch.from_numpy(x))
            lo, hi = (end.numpy() for end in collector(alone).ends())
            errors = []
            for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
                tried = [np.float32(share) * end for end in oracles.ranges(x, axis)]
                y = oracles.affine_quantize(x, *tried, bit_width, symmetric, symmetric)
                errors.append(((y.astype(np.float64) - x)**2).sum(others, keepdims=True))
            actual = oracles.affine_quantize(x, lo, hi, bit_width, symmetric, symmetric)
            actual = ((actual.astype(np.float64) - x)**2).sum(others, keepdims=True)
            np.testing.assert_allclose(actual, np.min(errors, 0), rtol=1e-4, atol=1e-30)
            ends.append((lo, hi))
        for running, of_batches in zip(collector(act).ends(), zip(*ends)):
            expected = of_batches[0].astype(np.float64)
            for end in of_batches[1:]:
                expected = 0.9 * expected + 0.1 * end
            assert (np.abs(running.numpy() - expected) <= 1e-6 * np.abs(of_batches).max(0) + 3e-45).all()  # two least numbers

    @given(batches(), st.sampled_from(["ema", "minmax"]))
    def test_calibration_mode_averages_or_unites(self, drawn, range_mode):
        xs, axis = drawn
        act = identity(range_mode=range_mode, channel_axis=axis, collect_stats_steps=1)
        with calibration_mode(act):
            for x in xs:
                oracles.assert_equal(act(torch.from_numpy(x)), x)  # observed, not quantized
        assert collector(act).frozen
        for end, actual in enumerate((collector(act).running_min, collector(act).running_max)):
            ends = np.stack([oracles.ranges(x, axis)[end] for x in xs])
            if range_mode == "minmax":
                oracles.assert_equal(actual, (ends.min(0), ends.max(0))[end])
            else:
                mean = ends.astype(np.float64).mean(0)
                assert (np.abs(actual.numpy() - mean) <= 1e-6 * np.abs(ends).max(0)).all()

    def test_freezes_at_collect_stats_steps(self):
        act, c = identity(collect_stats_steps=2, range_mode="minmax"), None
        c = collector(act)
        for magnitude, expected in ((1, 1), (2, 2), (4, 2), (8, 2)):
            act(magnitude * torch.tensor([[[-1.0, 1.0]]]))
            assert c.running_max.item() == expected and c.running_min.item() == -expected
        assert c.frozen and c.counter == 2

    def test_evaluation_mode_collects_nothing(self):
        act = identity(range_mode="minmax")
        act(torch.ones(1, 2, 3))
        act.eval()(torch.full((1, 2, 3), 5.0))
        assert collector(act).running_max.max() == 1 and collector(act).counter == 1

    def test_training_output_uses_the_ranges_so_far(self):
        act = identity(range_mode="minmax", bit_width=3)
        for magnitude in (4, 1):
            x = magnitude * torch.randn(2, 3, 4, 4)
            oracles.assert_equal(act(x), with_ranges_of(act, x))

    def test_frozen_ranges_clamp(self):
        act = frozen(identity(bit_width=4), torch.tensor([[[-1.0, 2.0]]]))
        scale, zero_point = 3 / 15, 5
        expected = torch.tensor([[[-zero_point * scale, (15 - zero_point) * scale]]])
        torch.testing.assert_close(act(torch.tensor([[[-100.0, 100.0]]])), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("shift", [-5, 0, 5])
    def test_range_contains_zero(self, shift):
        """So that zero (padding) is exact, whatever the data."""
        act = frozen(identity(bit_width=3), torch.randn(2, 3, 4, 4) + shift)
        zero_point = act.act_quant.zero_point()
        assert zero_point.min() >= 0 and zero_point.max() <= 7
        assert not act(torch.zeros(1, 3, 2, 2)).any()

    def test_unsigned_with_zero_point_zero_after_relu(self):
        act = frozen(relu(bit_width=3), torch.randn(2, 3, 4, 4))
        assert not act.act_quant.zero_point().any() and act.act_quant.is_signed is False

    def test_asymmetric_without_relu(self):
        act = frozen(identity(bit_width=3), torch.randn(2, 3, 4, 4))
        assert (act.act_quant.zero_point() > 0).all() and act.act_quant.is_signed is False

    @pytest.mark.parametrize("narrow_range", [False, True])
    @given(data=st.data(), bit_width=st.integers(2, 16))
    def test_signed_is_symmetric(self, narrow_range, data, bit_width):
        x = torch.from_numpy(data.draw(oracles.values((2, 3, 4, 2))))
        act = frozen(identity(bit_width=bit_width, signed=True, narrow_range=narrow_range), x)
        assert act.act_quant.is_signed is True and not act.act_quant.zero_point().any()
        oracles.assert_equal(act(2 * x), with_ranges_of(act, 2 * x, signed=True, narrow=narrow_range))

    def test_limits_come_before_the_ranges(self):
        x = 10 * torch.randn(2, 3, 5, 5)
        for act, function in (
                (relu(max_val=6.0), F.relu6), (qnn.QuantHardTanh(GranQActPerChannelStatic), F.hardtanh),
                (qnn.QuantHardTanh(GranQActPerChannelStatic, min_val=-3.0, max_val=2.0), lambda t: t.clamp(-3, 2)),
                (qnn.QuantSigmoid(GranQActPerChannelStatic), torch.sigmoid),
                (qnn.QuantTanh(GranQActPerChannelStatic), torch.tanh)):
            frozen(act, x)
            assert collector(act).running_max.max() == function(x).max()
            oracles.assert_equal(act(x), with_ranges_of(act, function(x)))

    @pytest.mark.parametrize("bit_width", [1, 2, 3, 4, 5, 6, 7, 8, 16])
    def test_input_and_output_quantizers_of_a_layer(self, bit_width):
        conv = qnn.QuantConv2d(
            4, 6, 3, weight_quant=None, input_quant=GranQActPerChannelStatic, input_bit_width=bit_width,
            output_quant=GranQActPerChannelStatic, output_bit_width=bit_width)
        x = torch.randn(2, 4, 6, 6)
        frozen(conv, x)
        quantized = [None, None]
        for i, value in enumerate((x, F.conv2d(x, conv.weight, conv.bias))):  # calibration sees the float network
            lo, hi = oracles.ranges(value.detach().numpy(), 1)
            value = value if i == 0 else F.conv2d(quantized[0], conv.weight, conv.bias)
            quantized[i] = torch.from_numpy(oracles.affine_quantize(value.detach().numpy(), lo, hi, bit_width))
        oracles.assert_equal(conv(x), quantized[1])

    def test_rows_and_single_samples(self):
        """[B, F]: one range per feature; a single unbatched sample [F] then uses the same ones."""
        act, x = relu(bit_width=3), torch.randn(6, 5)
        frozen(act, x)
        assert collector(act).running_max.shape == (1, 5)
        oracles.assert_equal(act(x), with_ranges_of(act, torch.relu(x)))
        oracles.assert_equal(act(x[2]), act(x)[2])

    def test_ranges_of_images_serve_rows(self):
        act = frozen(relu(bit_width=3), torch.randn(2, 5, 4, 4))
        x = torch.randn(3, 5)
        oracles.assert_equal(act(x), with_ranges_of(act, torch.relu(x)))

    def test_empty_batch_changes_nothing(self):
        act = identity()
        with pytest.raises(RuntimeError, match="no ranges yet"):
            act(torch.empty(0, 3, 4, 4))
        act(torch.randn(2, 3, 4, 4))
        before = copy.deepcopy(act.state_dict())
        assert act(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
        for name, value in act.state_dict().items():
            oracles.assert_equal(value, before[name])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        """A module cast to another dtype collects, quantizes in it, and stays near the float32 module."""
        x = torch.randn(4, 3, 6, 6)
        act, reference = identity(bit_width=4).to(dtype), identity(bit_width=4)
        for _ in range(2):
            act(x.to(dtype)), reference(x)
        y = act.eval()(x.to(dtype))
        assert y.dtype == dtype
        step = reference.eval().act_quant.scale()
        assert ((y.float() - reference(x)).abs() <= 1.01 * step + 0.03).all()
        assert ((y.float() - reference(x)).abs() < 0.05).float().mean() > 0.9

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_input_of_a_float32_module(self, dtype):
        x = torch.randn(4, 3, 6, 6).to(dtype)
        act = frozen(identity(bit_width=4), x)
        assert collector(act).running_max.dtype == torch.float32
        oracles.assert_equal(act(x), with_ranges_of(act, x.float()).to(dtype))

    def test_gradient_passes_inside_and_stops_outside_of_the_range(self):
        act = frozen(identity(bit_width=4, signed=True), torch.tensor([[[-1.0, 1.0]]]))
        x = torch.tensor([[[-3.0, -0.7, 0.2, 0.9, 1.5]]], requires_grad=True)
        act(x).sum().backward()
        oracles.assert_equal(x.grad, torch.tensor([[[0.0, 1.0, 1.0, 1.0, 0.0]]]))


class TestErrors:

    @pytest.mark.parametrize("options, message", [
        (dict(range_mode="median"), "range_mode must be one of ema, minmax, mse, got 'median'"),
        (dict(momentum=0), "momentum .*got 0"), (dict(momentum=1.5), "momentum .*got 1.5"),
        (dict(momentum=math.nan), "momentum .*got nan"),
        (dict(collect_stats_steps=0), "collect_stats_steps must be at least 1, got 0"),
        (dict(narrow_range=True), "narrow_range=True needs signed=True"),
        (dict(signed=True, bit_width=1), "at least 2, got 1"), (dict(bit_width=0), "1 to 16, got 0")])
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            identity(**options)

    def test_evaluation_without_ranges(self):
        act = identity().eval()
        with pytest.raises(RuntimeError, match="no ranges yet: run at least one batch"):
            act(torch.randn(1, 2, 3))
        for ask in (act.act_quant.scale, act.act_quant.zero_point):
            with pytest.raises(RuntimeError, match="no ranges yet"):
                ask()
        assert act.act_quant.bit_width() == 8

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("range_mode", ["ema", "minmax"])
    def test_calibration_data_that_is_not_finite(self, bad, range_mode):
        act = identity(range_mode=range_mode)
        x = torch.randn(2, 3, 4)
        x[1, 2, 3] = bad
        with pytest.raises(ValueError, match="1 of 3 channel ranges are NaN or Inf"), calibration_mode(act):
            act(x)
            act(torch.randn(2, 3, 4))

    def test_check_finite_names_the_batch_at_once(self):
        act = identity(check_finite=True)
        with pytest.raises(ValueError, match="6 NaN or Inf values of 6"):
            act(torch.full((1, 2, 3), math.nan))

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_another_number_of_channels_while_collecting(self, channels):
        act = identity()
        act(torch.randn(2, 3, 4, 4))
        with pytest.raises(ValueError, match=f"collected for 3 channels, got an input with {channels}"):
            act(torch.randn(2, channels, 4, 4))

    @pytest.mark.parametrize("collected, given_channels", [(3, 2), (3, 4), (3, 1), (1, 3)])
    def test_another_number_of_channels_when_frozen(self, collected, given_channels):
        """One channel in place of three, or three in place of one, would broadcast without a word."""
        act = frozen(identity(), torch.randn(2, collected, 4, 4))
        with pytest.raises((ValueError, RuntimeError), match=rf"\b{collected}\b.*\b{given_channels}\b|"
                           rf"\b{given_channels}\b.*\b{collected}\b"):
            act(torch.randn(2, given_channels, 4, 4))

    def test_integer_tensor(self):
        act = frozen(identity(), torch.randn(2, 3, 4))
        with pytest.raises(TypeError, match="got torch.int64"):
            act(torch.arange(24).view(2, 3, 4))

    def test_calibration_without_a_batch_leaves_it_uncalibrated(self):
        act = identity()
        with calibration_mode(act):
            pass
        assert not collector(act).frozen and not collector(act).has_ranges


class TestState:

    @pytest.mark.parametrize("range_mode, momentum", [("ema", 0.1), ("ema", None), ("minmax", 0.1), ("mse", 0.1)])
    @pytest.mark.parametrize("learned_scale", [False, True])
    def test_resumes_in_the_middle_of_collecting(self, range_mode, momentum, learned_scale):
        options = dict(
            range_mode=range_mode, momentum=momentum, collect_stats_steps=4, learned_scale=learned_scale, bit_width=3)
        xs = [torch.randn(2, 3, 4, 4) for _ in range(6)]
        act, resumed = identity(**options), identity(**options)
        for x in xs[:2]:
            act(x)
        resumed.load_state_dict(copy.deepcopy(act.state_dict()))
        for x in xs[2:]:
            oracles.assert_equal(resumed(x), act(x))
        assert collector(resumed).frozen and collector(act).frozen
        assert_same_state(resumed, act)

    @pytest.mark.parametrize("learned_scale", [False, True])
    @pytest.mark.parametrize("target_used_before", [False, True])
    def test_frozen_round_trip(self, tmp_path, learned_scale, target_used_before):
        """Through a file, into a module that never saw a batch, or into one of other ranges and channels."""
        x = torch.randn(2, 3, 4, 4)
        act, loaded = identity(learned_scale=learned_scale), identity(learned_scale=learned_scale)
        frozen(act, x)
        if target_used_before:
            loaded(torch.randn(1, 7, 2, 2))
        torch.save(act.state_dict(), tmp_path / "state.pt")
        loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        loaded.eval()
        oracles.assert_equal(loaded(x), act(x))
        assert_same_state(loaded, act)
        loaded.train()(100 * x)
        assert_same_state(loaded, act)  # frozen is frozen

    def test_loading_does_not_tie_the_two(self):
        act, loaded = identity(range_mode="minmax"), identity(range_mode="minmax")
        act(torch.ones(1, 2, 3))
        loaded.load_state_dict(act.state_dict())
        loaded(torch.full((1, 2, 3), 9.0))
        assert collector(act).running_max.max() == 1

    def test_uncalibrated_state_loads(self):
        act = identity()
        act.load_state_dict(identity().state_dict())
        assert not collector(act).has_ranges

    def test_missing_and_mismatching_keys_are_reported(self):
        act = identity()
        state = frozen(identity(), torch.randn(2, 3, 4)).state_dict()
        prefix = next(k for k in state if k.endswith("running_min"))[:-len("running_min")]
        with pytest.raises(RuntimeError, match="Missing key.*running_max"):
            act.load_state_dict({k: v for k, v in state.items() if not k.endswith("running_max")})
        with pytest.raises(RuntimeError, match="size mismatch for .*running_max"):
            act.load_state_dict({**state, prefix + "running_max": torch.ones(1, 4, 1)})

    def test_learned_scale_of_another_shape_is_reported(self):
        """As a size mismatch of other parameters is; not as a broadcasting error at the first forward."""
        state = frozen(identity(learned_scale=True), torch.randn(2, 3, 4)).state_dict()
        name = next(k for k in state if k.endswith("learned_scale"))
        act = identity(learned_scale=True)
        with pytest.raises((RuntimeError, ValueError), match="learned_scale|channels"):
            act.load_state_dict({**state, name: torch.ones(1, 4, 1)})
            act.eval()(torch.randn(2, 3, 4))

    @pytest.mark.parametrize("learned_scale", [False, True])
    def test_deepcopy(self, learned_scale):
        act = frozen(identity(learned_scale=learned_scale), torch.randn(2, 3, 4))
        twin, x = copy.deepcopy(act), torch.randn(2, 3, 4)
        oracles.assert_equal(twin(x), act(x))
        collector(twin).running_max.mul_(2)
        assert not torch.equal(collector(twin).running_max, collector(act).running_max)

    def test_torch_compile_of_a_frozen_one_is_bit_exact(self, exact_compiler):
        act, x = relu(bit_width=4, max_val=6.0), 4 * torch.randn(2, 3, 9, 7)
        frozen(act, x)
        oracles.assert_equal(torch.compile(act, fullgraph=True)(x), act(x))

    def test_autocast(self):
        conv, act = nn.Conv2d(3, 4, 3), relu(bit_width=4)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(torch.randn(2, 3, 6, 6))
            out = act(y)
        assert out.dtype == torch.bfloat16 and collector(act).running_max.dtype == torch.float32
        oracles.assert_equal(out, with_ranges_of(act, torch.relu(y.float())).bfloat16())


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b) and a
    for name in a:
        oracles.assert_equal(a[name], b[name])


class TestKeptGrid:
    """Scale and zero point of frozen ranges are not computed again, and never stale."""

    def test_is_kept(self):
        x = torch.randn(2, 3, 4, 4)
        act = frozen(relu(bit_width=4, return_quant_tensor=True), x).eval()
        first = act(x)
        assert act(2 * x).scale is first.scale and act.train()(x).zero_point is first.zero_point

    @pytest.mark.parametrize("change", ["load", "write", "half", "double", "another shape", "write to the scale", "learned"])
    def test_is_not_stale(self, change):
        x, other = torch.randn(2, 3, 4, 4), 3 * torch.randn(2, 3, 4, 4)
        act = frozen(identity(bit_width=4, return_quant_tensor=True), x).eval()
        before = act(x)
        if change == "load":
            act.load_state_dict(frozen(identity(bit_width=4), other).state_dict())
        elif change == "write":
            collector(act).running_max.mul_(2)
        elif change == "half":
            act.half()
        elif change == "double":
            act.double()
        elif change == "another shape":
            x = x[..., 0]
        elif change == "write to the scale":
            before.scale.mul_(2)
        else:
            quantizer(act).learned_scale = nn.Parameter(torch.full((1, 3, 1, 1), 0.25))
        fresh = copy.deepcopy(act)
        quantizer(fresh)._grid = None
        for got, expected in zip(act(x)[:3], fresh(x)[:3]):
            oracles.assert_equal(got, expected)
        assert change in ("write to the scale", "another shape") or not torch.equal(act(x).scale, before.scale)

    def test_of_inference_mode_serves_training(self):
        x = torch.randn(2, 3, 4, 4)
        act = frozen(identity(bit_width=4), x)
        with torch.inference_mode():
            expected = act(x)
        leaf = x.clone().requires_grad_()
        y = act(leaf)
        y.sum().backward()
        oracles.assert_equal(y, expected)
        assert not quantizer(act)._grid.scale.is_inference()

    def test_copies_have_their_own(self):
        x = torch.randn(2, 3, 4, 4)
        act = frozen(identity(bit_width=4), x)
        act(x)
        twin = copy.deepcopy(act)
        collector(twin).running_max.mul_(2)
        assert not torch.equal(twin(x), act(x))
        oracles.assert_equal(act(x), frozen(identity(bit_width=4), x)(x))


class TestLearnedScale:

    @given(oracles.SEEDS, st.integers(1, 8), st.booleans())
    def test_gradient_is_that_of_the_formula(self, seed, bit_width, signed):
        """y = (clamp(round(x / s + z)) - z) * s with straight-through rounding: per element
        dy/ds = q - z - x / s inside the range, q - z where clamped; dy/dx = 1 inside, 0 where clamped."""
        bit_width += signed
        rng = np.random.default_rng(seed)
        x, incoming = (rng.standard_normal((3, 4, 5)).astype(np.float32) for _ in range(2))
        act = frozen(identity(bit_width=bit_width, signed=signed, learned_scale=True), torch.from_numpy(x / 2))
        scale, zero_point = oracles.affine_params(*oracles.ranges(x / 2, 1), bit_width, signed)
        leaf = torch.from_numpy(x).requires_grad_()
        y = act(leaf)
        y.backward(torch.from_numpy(incoming))
        q = oracles.integers(x, scale, zero_point, bit_width, signed)
        inside = np.rint(x / scale + zero_point) == q
        oracles.assert_equal(y, (q - zero_point) * scale)
        expected = incoming * (q - zero_point - inside * x / scale)
        np.testing.assert_allclose(
            quantizer(act).learned_scale.grad.numpy(), expected.sum((0, 2), keepdims=True), rtol=1e-5,
            atol=1e-6 * np.abs(incoming).sum() * np.abs(q - zero_point).max())
        np.testing.assert_allclose(leaf.grad.numpy(), np.where(inside, incoming, 0), rtol=1e-6, atol=1e-6)

    def test_starts_from_the_ranges(self):
        x = torch.randn(2, 3, 4, 4)
        learned, plain = (frozen(identity(bit_width=3, learned_scale=on), x) for on in (True, False))
        oracles.assert_equal(learned(x), plain(x))
        oracles.assert_equal(learned.act_quant.scale(), plain.act_quant.scale())

    def test_sgd_brings_the_scale_to_the_data(self):
        """Data grows after freezing: training the scale lowers the error."""
        act = frozen(identity(bit_width=3, learned_scale=True), torch.randn(4, 3, 5, 5)).train()
        x, before = 3 * torch.randn(4, 3, 5, 5), act.act_quant.scale().detach().clone()
        optimizer = torch.optim.SGD(act.parameters(), lr=0.05)
        errors = []
        for _ in range(50):
            error = (act(x) - x).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        assert (act.act_quant.scale() > before).all()
        assert errors[-1] < errors[0] / 2

    @pytest.mark.parametrize("make_optimizer", [
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, lr=0.01)], ids=["SGD", "Nesterov", "Adam"])
    def test_optimizer_made_before_the_first_batch(self, make_optimizer):
        """The usual order: build, make the optimizer, train through collecting and freezing. The scale then learns.

        The parameter has no elements before ranges are known and gets its shape in between, which neither the gradient
        accumulators of a graph that is still referenced (``loss`` of the last step) nor momentum buffers may notice.
        """
        act = identity(bit_width=3, learned_scale=True, collect_stats_steps=2)
        gain = nn.Parameter(torch.ones(1))  # what a layer before it would be
        optimizer = make_optimizer([gain, *act.parameters()])
        scales = []
        for _ in range(5):
            x = torch.randn(4, 3, 5, 5)
            loss = (act(gain * x) - 2 * x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scales.append(act.act_quant.scale().detach().clone())
        assert collector(act).frozen
        assert not torch.equal(scales[-1], scales[-2])

    @settings(max_examples=20)
    @given(st.floats(-10, 10, width=32))
    def test_stays_positive(self, value):
        act = frozen(identity(bit_width=3, learned_scale=True), torch.randn(2, 3, 4))
        quantizer(act).learned_scale.data.fill_(value)
        scale = act.act_quant.scale()
        assert (scale > 0).all()
        if abs(value) > 1e-6:  # a step of the optimizer across zero flips the sign, it does not collapse the scale
            oracles.assert_equal(scale, torch.full_like(scale, abs(value)))
        assert act(torch.randn(2, 3, 4)).isfinite().all()

    def test_is_the_only_parameter_and_only_if_asked_for(self):
        assert [n.rsplit(".", 1)[-1] for n, _ in identity(learned_scale=True).named_parameters()] == ["learned_scale"]
        assert not list(identity().parameters())
