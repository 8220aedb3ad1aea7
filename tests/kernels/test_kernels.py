"""The kernels give the bits of torch's operations, and step aside wherever something looks at those operations."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import oracles
from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic, kernels
from granq_plugin import functional as GF
from granq_plugin.kernels import Ahead, Before, native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BEFORE = st.sampled_from([
    Before(), Before(relu=True), Before(relu=True, max_val=6.0), Before(min_val=-0.5, max_val=0.7), Before(min_val=0.2),
    Before(relu=True, min_val=0.2), Before(max_val=-0.1), Before(min_val=1.0, max_val=-1.0)])
needs_compiler = pytest.mark.skipif(
    kernels.why_not_compiled() is not None, reason=f"the kernel cannot be built: {kernels.why_not_compiled()}")


@pytest.fixture(autouse=True)
def _not_forced(monkeypatch):
    monkeypatch.delenv("GRANQ_KERNEL", raising=False)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As oracles.assert_equal, and signs of zero and memory format too."""
    oracles.assert_equal(actual, expected)
    assert actual.stride() == expected.stride()
    differs = torch.signbit(actual) != torch.signbit(expected)
    assert not (differs & ~actual.isnan()).any()


def is_fused(x: torch.Tensor, channel_axis: int, ahead: Ahead) -> bool:
    return kernels._is_fused(x, channel_axis, ahead, *kernels._choose(x, channel_axis))


@st.composite
def tensors(draw, dtypes=DTYPES):
    """``(x, incoming gradient)`` of any layout the kernels know: rows shorter and longer than a vector, few and many channels."""
    spatial = draw(st.sampled_from([(), (1, ), (7, ), (300, ), (1, 1), (3, 3), (8, 8), (7, 9), (2, 3, 4)]))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 17, 40])), *spatial)
    x = torch.from_numpy(draw(oracles.values(shape)))
    poison = draw(st.sampled_from([None, None, float("nan"), float("inf"), -float("inf"), -0.0]))
    if poison is not None:
        x.view(-1)[::draw(st.sampled_from([1, 5, 1000]))] = poison
    x = x.to(draw(st.sampled_from(dtypes)))
    if len(shape) > 3 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return x, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def compare(compiled, eager, leaves: tuple, incoming: torch.Tensor) -> None:
    """Outputs and the gradients of all leaves, bit for bit."""
    results = []
    for function in (compiled, eager):
        fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        outputs = function(*fresh)
        outputs = outputs if isinstance(outputs, tuple) else (outputs, )
        results.append((outputs, torch.autograd.grad(outputs[0], fresh, incoming)))
    for a, b in zip(results[0][0], results[1][0]):
        assert_same_bits(a, b)
    for a, b in zip(results[0][1], results[1][1]):
        oracles.assert_equal(a, b)


@needs_compiler
class TestCompiled:

    @given(tensors(), oracles.BIT_WIDTHS, BEFORE)
    @settings(max_examples=150)
    def test_granq(self, drawn, bit_width, before):
        x, incoming = drawn
        assert kernels.backend(x) == "compiled"
        compare(lambda t: kernels.granq(t, bit_width, 1, before), lambda t: GF.granq(before.apply(t), bit_width), (x, ), incoming)
        with torch.no_grad():
            assert_same_bits(kernels.granq(x, bit_width, 1, before).value, GF.granq(before.apply(x), bit_width).value)

    @given(tensors(), st.sampled_from([2, 3, 4, 8]), BEFORE, st.booleans(), st.booleans())
    @settings(max_examples=150)
    def test_affine_quantize_is_brevitas_int_quant(self, drawn, bit_width, before, signed, narrow):
        x, incoming = drawn
        narrow = narrow and signed
        axes = [d for d in range(x.dim()) if d != 1]
        ends = torch.randn(2, *(1 if d in axes else n for d, n in enumerate(x.shape))).to(
            torch.promote_types(x.dtype, torch.float32)).sort(0).values
        scale, zero_point = GF.affine_params(*ends, bit_width, signed)
        limits = GF.integer_limits(bit_width, signed, narrow)
        int_quant = IntQuant(narrow_range=narrow, signed=signed, input_view_impl=Identity())

        def stock(t):
            return int_quant(scale, zero_point, torch.tensor(float(bit_width)), before.apply(t)).to(t.dtype)

        compare(lambda t: kernels.affine_quantize(t, scale, zero_point, limits, 1, before), stock, (x, ), incoming)
        compare(lambda t: GF.affine_quantize(before.apply(t), scale, zero_point, limits), stock, (x, ), incoming)
        if torch.isfinite(x).all():
            integers = GF.quantize_to_integers(before.apply(x), scale, zero_point, bit_width, signed, narrow)
            assert integers.dtype == (torch.int8 if signed else torch.uint8)
            value = kernels.affine_quantize(x, scale, zero_point, limits, 1, before)
            oracles.assert_equal(((integers - zero_point) * scale).to(x.dtype), value)

    @given(tensors([torch.float32, torch.bfloat16, torch.float16]), oracles.BIT_WIDTHS, BEFORE, st.booleans(), st.booleans(),
           st.sampled_from([None, (1, 14)]))
    @settings(max_examples=150)
    def test_batch_norm_and_addition_ahead(self, drawn, bit_width, before, affine, residual, static):
        """Values, scales and the gradients of input, weight, bias and residual are those of torch's operations, bit for bit."""
        x, incoming = drawn
        if x.dim() < 3:
            return
        channels = x.shape[1]
        mean, var, *affine_parameters = torch.randn(4 if affine else 2, channels)
        others = (*affine_parameters, *([torch.randn_like(x)] if residual else []))

        def function(step):
            def run(x, *others):
                weight, bias = others[:2] if affine else (None, None)
                ahead = Ahead(mean, var.square() + 0.1, weight, bias, 1e-5, others[-1] if residual else None)
                return step(x, ahead)
            return run

        if static is None:
            fused = function(lambda x, ahead: kernels.granq(x, bit_width, 1, before, ahead))
            eager = function(lambda x, ahead: GF.granq(before.apply(ahead.apply(x)), bit_width))
        else:
            ends = torch.randn(2, 1, channels, *[1] * (x.dim() - 2)).sort(0).values
            scale, zero_point = GF.affine_params(*ends, 4, False)
            fused = function(lambda x, ahead: kernels.affine_quantize(x, scale, zero_point, static, 1, before, ahead))
            eager = function(lambda x, ahead: GF.affine_quantize(before.apply(ahead.apply(x)), scale, zero_point, static))
        compare(fused, eager, (x, *others), incoming)
        with torch.no_grad():
            first = [r[0] if isinstance(r, tuple) else r for r in (fused(x, *others), eager(x, *others))]
            assert_same_bits(*first)

    def test_what_batch_norm_ahead_falls_back_to(self, monkeypatch):
        """The operations of torch: of other layouts and types, without a kernel, where torch's BatchNorm has other bits."""
        def same(x, ahead):
            oracles.assert_equal(kernels.granq(x, 3, 1, Before(relu=True), ahead).value, GF.granq(ahead.apply(x).relu(), 3).value)

        x = torch.randn(2, 3, 8, 8)
        ahead = Ahead(torch.randn(3), torch.rand(3) + 0.1, torch.randn(3), torch.randn(3), 1e-5)
        assert is_fused(x, 1, ahead) and is_fused(x, -3, ahead)
        transposed, double = x.transpose(2, 3).contiguous().transpose(2, 3), Ahead(*(t.double() for t in ahead[:4]), 1e-5)
        for y, other in ((x, ahead._replace(residual=transposed)), (x, ahead._replace(residual=torch.randn(1))),
                         (x[..., ::2], ahead), (x.double(), double), (x, ahead._replace(weight=torch.randn(6)[::2])),
                         (x, ahead._replace(residual=x.double()))):
            assert not is_fused(y, 1, other)
            same(y, other)
        scale, zero_point = torch.full((1, ), 0.1), torch.zeros(1)
        oracles.assert_equal(kernels.affine_quantize(x, scale, zero_point, (0, 7), 1, Before(), ahead),
                             GF.affine_quantize(ahead.apply(x), scale, zero_point, (0, 7)))
        monkeypatch.setattr(kernels, "_computes_batch_norm", lambda *a: False)
        assert not is_fused(x, 1, ahead)
        monkeypatch.undo()
        monkeypatch.setenv("GRANQ_KERNEL", "eager")
        assert not is_fused(x, 1, ahead)
        same(x, ahead)

    def test_a_batch_norm_of_other_bits_is_found_out(self, monkeypatch):
        """One unit in the last place of every fourth output is enough."""
        apply = Ahead.apply

        def off(self, x):
            y = apply(self, x)
            return torch.where(torch.arange(y.numel()).view_as(y) % 4 == 0, torch.nextafter(y, y + 1), y)

        monkeypatch.setattr(Ahead, "apply", off)
        kernels._computes_batch_norm.cache_clear()
        try:
            assert not kernels._computes_batch_norm(torch.float32, torch.contiguous_format)
        finally:
            kernels._computes_batch_norm.cache_clear()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [17, 64, 300])
    def test_levels_that_are_looked_up(self, dtype, n):
        """All levels, the one too many of a range symmetric around 0, the sign of zero where the offset is -0, offsets that drown
        the levels, one value only."""
        ramp = torch.linspace(0, 1, n)
        x = torch.stack([ramp, ramp - 0.5, 3 * ramp - 1.5, ramp - 0.01, ramp - 1e-6, -ramp, ramp + 1000, ramp - 1e6, 0 * ramp,
                         0 * ramp + 7, ramp * 1e-9, ramp * 1e30, ramp.neg() * 1e38, (ramp - 0.01).round(decimals=1)])
        x = torch.stack([x, x.flip(1)]).to(dtype)
        for bit_width in range(1, 8):
            for before in (Before(), Before(relu=True), Before(min_val=-0.25, max_val=0.75)):
                compare(lambda t: kernels.granq(t, bit_width, 1, before), lambda t: GF.granq(before.apply(t), bit_width),  # noqa: B023
                        (x, ), torch.ones_like(x))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("width", [256, 257])
    def test_large_tensors(self, memory_format, width):
        """Of 16 MB and more: written past the cache, where a row or the channels are whole lines."""
        x, incoming = (torch.randn(4, 16, 256, width).contiguous(memory_format=memory_format) for _ in range(2))
        scale, zero_point = GF.affine_params(*GF.channel_range(x, per_sample=False), 4)
        before = Before(relu=True)
        compare(lambda t: kernels.granq(t, 4, 1, before), lambda t: GF.granq(t.relu(), 4), (x, ), incoming)
        compare(lambda t: kernels.affine_quantize(t, scale, zero_point, (0, 15), 1, before),
                lambda t: GF.affine_quantize(t.relu(), scale, zero_point, (0, 15)), (x, ), incoming)

    def test_gradient_of_granq_alone_is_the_incoming_tensor(self):
        """No copy is made."""
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        incoming = torch.randn(2, 3, 8, 8)
        assert torch.autograd.grad(kernels.granq(x, 4).value, x, incoming)[0].data_ptr() == incoming.data_ptr()

    def test_second_derivative(self):
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        results = []
        for y in (kernels.granq(x, 4, 1, Before(relu=True)).value, GF.granq(x.relu(), 4).value):
            grad, = torch.autograd.grad((y**3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.sum(), x)[0])
        oracles.assert_equal(*results)

    def both_kernels(self, channels):
        scale, zero_point = torch.rand(1, channels, 1, 1) + 0.1, torch.full((1, channels, 1, 1), 3.0)
        before = Before(relu=True)
        yield (lambda t: kernels.granq(t, 4, 1, before).value), (lambda t: GF.granq(t.relu(), 4).value)
        yield (lambda t: kernels.affine_quantize(t, scale, zero_point, (0, 9), 1, before),
               lambda t: GF.affine_quantize(t.relu(), scale, zero_point, (0, 9)))

    def test_batches_of_gradients(self):
        """As of a vectorized Jacobian; NaN where nothing passes stays out."""
        x, incoming = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 3, 5, 5)
        incoming[0] = float("nan")
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for functions in self.both_kernels(3):
                leaf = x.contiguous(memory_format=memory_format).requires_grad_()
                results = [torch.autograd.grad(f(leaf), leaf, incoming, is_grads_batched=True)[0] for f in functions]
                oracles.assert_equal(*results)

    def test_negated_views(self):
        """Whose memory holds the opposite: gradients, scales and what is added."""
        x = torch.randn(2, 3, 5, 5)
        incoming, residual = torch._neg_view(torch.randn_like(x)), torch._neg_view(torch.randn_like(x))
        for functions in self.both_kernels(3):
            compare(*functions, (x, ), incoming)
        scale, zero_point = torch._neg_view(torch.tensor([-0.5, -1, -2])), torch._neg_view(torch.zeros(3))
        oracles.assert_equal(kernels.affine_quantize(x, scale.view(1, 3, 1, 1), zero_point.view(1, 3, 1, 1), (0, 9)),
                             GF.affine_quantize(x, scale.view(1, 3, 1, 1), zero_point.view(1, 3, 1, 1), (0, 9)))
        ahead = Ahead(torch.randn(3), torch.rand(3) + 0.1, torch._neg_view(torch.randn(3)), None, 1e-5)
        for a in (ahead, ahead._replace(weight=torch.randn(3), residual=residual)):
            oracles.assert_equal(kernels.granq(x, 3, 1, Before(), a).value, GF.granq(a.apply(x), 3).value)

    def test_another_default_device_and_type(self):
        """Decide nothing: in a new process, since answers are kept."""
        code = ("import torch; from granq_plugin import kernels; from granq_plugin import functional as GF\n"
                "from granq_plugin.kernels import Ahead, Before\n"
                "x, r = torch.randn(2, 2, 3, 4, 4); x.requires_grad_(); s, z = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)\n"
                "a = Ahead(torch.randn(3), torch.rand(3) + 0.1, None, None, 1e-5, r)\n"
                "torch.set_default_dtype(torch.float64)\n"
                "for b in (Before(relu=True), Before(min_val=-0.5, max_val=0.5)):\n"
                "    expected = [GF.granq(b.apply(x, a), 4), GF.affine_quantize(b.apply(x), s, z, (0, 3))]\n"
                "    with torch.device('meta'):\n"
                "        actual = [kernels.granq(x, 4, 1, b, a), kernels.affine_quantize(x, s, z, (0, 3), 1, b)]\n"
                "        actual[1].sum().backward()\n"
                "    print(all(map(torch.equal, actual[0], expected[0])), torch.equal(actual[1], expected[1]))\n")
        assert run_python(code).split() == ["True"] * 4

    def test_any_number_of_threads(self):
        x = torch.randn(8, 24, 33, 33)
        expected = GF.granq(x, 4).value
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for t in (x, x.contiguous(memory_format=torch.channels_last)):
                    oracles.assert_equal(kernels.granq(t, 4).value, expected)
        finally:
            torch.set_num_threads(threads)


class TestSteppingAside:

    def test_forward_mode_differentiation(self):
        """A kernel would drop the tangent."""
        x = torch.randn(2, 3, 4, 4)
        assert kernels.backend(x) == "compiled"
        with forward_ad.dual_level():
            assert kernels.backend(x) == "eager"
        assert kernels.backend(x) == "compiled"

    def test_layouts_of_no_kernel(self):
        x = torch.randn(2, 4, 6, 8)
        for t, axis in ((x[..., ::2], 1), (x, 2), (torch.zeros(0, 3, 2, 2), 1), (x.to("meta"), 1), (x.to_sparse(), 1)):
            assert kernels.backend(t, axis) == "eager"
        oracles.assert_equal(kernels.granq(x[..., ::2], 3).value, GF.granq(x[..., ::2], 3).value)
        oracles.assert_equal(kernels.granq(x, 3, 2).value, GF.granq(x, 3, 2).value)

    def test_observers_see_torch_operations(self):
        x = torch.randn(2, 3, 4, 4)
        graph = make_fx(lambda t: kernels.granq(t, 3).value)(x)
        assert any("round" in str(n.target) for n in graph.graph.nodes)
        with warnings.catch_warnings():  # of the check for an empty batch, which becomes a constant
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda t: kernels.granq(t, 3).value, x)
        oracles.assert_equal(traced(2 * x), GF.granq(2 * x, 3).value)
        mapped = torch.func.vmap(lambda t: kernels.granq(t, 3).value)(torch.stack([x, 2 * x]))
        oracles.assert_equal(mapped[1], GF.granq(2 * x, 3).value)
        program = torch.export.export(qnn.QuantReLU(GranQActPerChannel, bit_width=3).eval(), (x, ))
        assert any("round" in str(n.target) for n in program.graph.nodes)

    @pytest.mark.parametrize("quantizer", [GranQActPerChannel, GranQActPerChannelStatic])
    @pytest.mark.parametrize("limit", [None, 0.5])
    def test_hooks_see_what_lies_between(self, quantizer, limit):
        options = {} if limit is None else dict(max_val=limit)
        act = qnn.QuantReLU(quantizer, bit_width=3, **options)
        x = torch.randn(2, 3, 4, 4)
        for _ in range(2):
            act(x)
        act.eval()
        if quantizer is GranQActPerChannelStatic:
            act.act_quant.fused_activation_quant_proxy.tensor_quant.init_scale()
        expected, seen = act(x), []
        twin = copy.deepcopy(act)
        twin.act_quant.fused_activation_quant_proxy.activation_impl.register_forward_hook(lambda m, a, y: seen.append(y))
        oracles.assert_equal(twin(x), expected)
        oracles.assert_equal(seen[0], torch.relu(x))

    def test_static_integers(self):
        act = qnn.QuantReLU(GranQActPerChannelStatic, bit_width=4)
        quantizer, x = act.act_quant.fused_activation_quant_proxy.tensor_quant, torch.randn(2, 3, 4, 4)
        with pytest.raises(RuntimeError, match="not frozen"):
            quantizer.quantize_to_integers(x)
        act(x)
        quantizer.init_scale()
        integers = quantizer.quantize_to_integers(torch.relu(2 * x))
        assert integers.dtype == torch.uint8 and integers.max() == 15
        oracles.assert_equal((integers - act.act_quant.zero_point()) * act.act_quant.scale(), act.eval()(2 * x))
        with pytest.raises(ValueError, match="1 NaN or Inf"):
            quantizer.quantize_to_integers(torch.full((1, 3, 1, 1), 1.0).index_fill(1, torch.tensor([0]), float("nan")))


class TestForcing:

    def test_bad_name(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "fast")
        with pytest.raises(ValueError, match="one of eager, compiled, triton, got 'fast'"):
            kernels.granq(torch.randn(1, 2, 3), 4)

    def test_eager(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "eager")
        assert kernels.backend(torch.randn(1, 2, 3)) == "eager"

    def test_triton_without_gpu(self, monkeypatch):
        monkeypatch.setenv("GRANQ_KERNEL", "triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match="GRANQ_KERNEL=triton, but: Triton runs on a GPU, and x is on cpu"):
            kernels.granq(torch.randn(1, 2, 3), 4)

    @pytest.mark.parametrize("broken", ["compiler", "flags", "folder", "shared", "home"])
    def test_without_a_kernel(self, monkeypatch, tmp_path, broken):
        """Eager results, and a reason that can be asked for; forced, an error that gives it."""
        folder, reason = tmp_path / "cache", {
            "compiler": "no C\\+\\+ compiler", "flags": "failed", "folder": "Error", "shared": "other users",
            "home": "home"}[broken]
        if broken == "compiler":
            monkeypatch.setenv("PATH", str(tmp_path))
        elif broken == "flags":
            monkeypatch.setattr(native, "FLAGS", ("--no-such-flag", ))
        elif broken == "folder":
            folder.write_text("a file")
        elif broken == "shared":
            (folder / "granq-plugin").mkdir(parents=True)
            (folder / "granq-plugin").chmod(0o777)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        if broken == "home":  # as Path.home says it
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home directory"))))
        native._built.cache_clear()
        try:
            x = torch.randn(2, 3, 4, 4)
            assert kernels.backend(x) == "eager"
            oracles.assert_equal(kernels.granq(x, 4).value, oracles.granq_tensor(x, 4))
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(kernels.why_not_compiled())
            monkeypatch.setenv("GRANQ_KERNEL", "compiled")
            with pytest.raises(RuntimeError, match=f"GRANQ_KERNEL=compiled, but: .*{reason}"):
                kernels.granq(x, 4)
        finally:
            native._built.cache_clear()


def run_python(code: str, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)) | env,
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@needs_compiler
def test_nothing_is_built_or_imported_before_use(tmp_path):
    """A fresh cache: empty after the import, a library of the user's own after the first forward."""
    out = run_python(
        "import sys, torch, granq_plugin, os; from granq_plugin import kernels\n"
        "print(os.path.exists(os.environ['XDG_CACHE_HOME'] + '/granq-plugin'), 'triton' in sys.modules and "
        "'granq_plugin.kernels.triton_kernel' in sys.modules)\n"
        "print(kernels.backend(torch.randn(1, 2, 40)))", XDG_CACHE_HOME=str(tmp_path))
    assert out.split() == ["False", "False", "compiled"]
    folder = tmp_path / "granq-plugin"
    assert folder.stat().st_mode & 0o777 == 0o700 and [p.suffix for p in folder.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_process():
    """After a parallel run in the parent, whose threads the child does not have."""
    out = run_python(
        "import os, torch; from granq_plugin import functional as GF, kernels\n"
        "torch.set_num_threads(2); x = torch.randn(8, 16, 64, 64); expected = GF.granq(x, 4).value\n"
        "assert torch.equal(kernels.granq(x, 4).value, expected)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    value = kernels.granq(x, 4).value\n"
        "    torch.set_num_threads(1)  # as torch's own parallel operations need after a fork\n"
        "    os._exit(0 if torch.equal(value, expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))")
    assert out.split() == ["0"]


_TRITON = """
import torch
from granq_plugin import functional as GF, kernels
import oracles
from granq_plugin.kernels import Before, triton_kernel, triton_short, triton_split
torch.manual_seed(0)
# so that small tensors take all ways
triton_kernel._LARGEST, triton_split._TILE, triton_split._LAG, triton_short._LONGEST, triton_short._TILE = 256, 64, 128, 32, 64
cl = torch.channels_last
shapes = [((2, 1, 100), None, 1), ((2, 3, 8, 8), None, 3), ((1, 33, 3, 5), cl, 3), ((1, 3, 6, 7), cl, 3),
          ((1, 2, 300), None, "split"), ((1, 5, 6, 6), cl, "split"), ((2, 3, 5, 5), None, "short"), ((3, 7), None, "short")]
cases = [(s, f, way, d, b, p) for s, f, way in shapes
         for d in ((torch.float32, torch.bfloat16, torch.float16) if s == (3, 7) else (torch.float32, torch.bfloat16))
         for b, p in ((Before(True, None, 0.9), None), (Before(True), float("nan")), (Before(), float("-inf")))]
for shape, memory_format, way, dtype, before, poison in cases:
    layout = kernels.layout_of(torch.empty(shape, memory_format=memory_format or torch.contiguous_format), 1)
    tile = triton_kernel._tile(layout, 4, 1, 2**18)
    short = layout.outer == 1 and triton_short.suits(layout.inner)
    assert way == ("short" if short else "split" if tile is None else tile.stages), (shape, way)
    x = torch.randn(shape)
    if poison is not None:
        x.view(-1)[3] = poison
    x = x.to(dtype).contiguous(memory_format=memory_format or torch.contiguous_format)
    assert kernels.backend(x) == "triton"
    a, b = (x.clone().requires_grad_() for _ in range(2))
    actual, expected = kernels.granq(a, 4, 1, before), GF.granq(before.apply(b), 4)
    for p, q in zip(actual, expected):
        oracles.assert_equal(p, q)
    incoming = torch.randn(shape).to(dtype)
    actual.value.backward(incoming), expected.value.backward(incoming)
    oracles.assert_equal(a.grad, b.grad)
assert {kernels.backend(torch.ones(2, 3, 4).to(t)) for t in (torch.float64, torch.float8_e4m3fn)} == {"eager"}
print(len(cases))
"""


_TRITON_AHEAD = """
import torch
from granq_plugin import functional as GF, kernels
import oracles
from granq_plugin.kernels import Ahead, Before, triton_frozen, triton_kernel, triton_short, triton_split
torch.manual_seed(0)
triton_kernel._LARGEST, triton_split._TILE, triton_split._LAG, triton_short._LONGEST, triton_short._TILE = 64, 64, 128, 32, 64
triton_frozen._TILE, triton_frozen._BLOCKS = 32, (32, 16)
cl, count = torch.channels_last, 0
before = Before(True, None, 2.0)
for shape, memory_format in (((2, 3, 5, 5), None), ((1, 33, 2, 2), cl), ((1, 2, 9, 10), None), ((2, 3, 4, 8), None)):
    for dtype in (torch.float32, torch.bfloat16):
        for residual in (False, True):
            for affine in (False, True):
                x, r, incoming = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format or torch.contiguous_format)
                                  for _ in range(3))
                # powers of two, so that BatchNorm is exact in whatever order it is computed
                mean, bias = torch.randint(-3, 4, (2, shape[1])) / 4
                weight = 2.0 ** torch.randint(-2, 3, (shape[1], )) * torch.tensor([1.0, -1.0])[torch.randint(2, (shape[1], ))]
                var = 4.0 ** torch.randint(-1, 2, (shape[1], ))
                ends = torch.rand(1, shape[1], 1, 1)
                scale, zero_point = GF.affine_params(-ends, 3 * ends, 3, False)
                results = []
                for fused in (True, False):
                    leaves = [x.clone().requires_grad_()] + [t.clone().requires_grad_() for t in (weight, bias) if affine]
                    ahead = Ahead(mean, var, *(leaves[1:] if affine else (None, None)), 1e-30, r if residual else None)
                    if fused:
                        a = kernels.granq(leaves[0], 4, 1, before, ahead)
                        b = kernels.affine_quantize(leaves[0], scale, zero_point, (0, 7), 1, before, ahead)
                    else:
                        a = GF.granq(before.apply(ahead.apply(leaves[0])), 4)
                        b = GF.affine_quantize(before.apply(ahead.apply(leaves[0])), scale, zero_point, (0, 7))
                    grads = [torch.autograd.grad(y, leaves, incoming) for y in (a.value, b)]
                    results.append([*a, b, *grads[0], *grads[1]])
                for p, q in zip(*results):
                    oracles.assert_equal(p, q)
                count += 1
print(count)
"""


@pytest.fixture
def interpreter():
    pytest.importorskip("triton", "3.5", reason="Triton 3.5 is not installed (older interpreters fail on numpy 2.4)")


def test_triton_in_its_interpreter(interpreter):
    """Rows on chip, on their way while others are quantized, shared by programs, short ones; channels_last, rows of a matrix, all
    dtypes, NaN and Inf: equal to torch's operations."""
    assert run_python(_TRITON, TRITON_INTERPRET="1", GRANQ_KERNEL="triton").split()[-1] == "51"


def test_triton_of_a_batch_norm_ahead_in_its_interpreter(interpreter):
    """With and without an addition, weight and bias; long rows, channels_last, rounding to half precision; gradients."""
    assert run_python(_TRITON_AHEAD, TRITON_INTERPRET="1", GRANQ_KERNEL="triton").split()[-1] == "32"


_TRITON_FROZEN = """
import torch
from granq_plugin import functional as GF, kernels
import oracles
from granq_plugin.kernels import Before, triton_frozen
torch.manual_seed(0)
triton_frozen._TILE, triton_frozen._BLOCKS = 32, (32, 16)  # so that small tensors take several tiles
cl, weights = torch.channels_last, [((6, 3, 3, 3), None, 0), ((4, 6, 3, 3), None, 1), ((5, 7), None, 0)]
cases = [(s, f, a, d, b) for s, f, a in [((2, 3, 5, 5), None, 1), ((2, 33, 3, 5), cl, 1), ((3, 7), None, 1), *weights]
         for d in (torch.float32, torch.bfloat16, torch.float16) for b in (Before(True, None, 0.9), Before(True), Before())]
for shape, memory_format, axis, dtype, before in cases:
    for per_channel in (True, False):
        x = torch.randn(shape)
        x.view(-1)[3:6] = torch.tensor([float("nan"), float("inf"), 0.0])
        x = x.to(dtype).contiguous(memory_format=memory_format or torch.contiguous_format)
        ends = torch.rand([n if per_channel and d == axis else 1 for d, n in enumerate(shape)])
        signed = before == Before()
        scale, zero_point = GF.affine_params(-ends if signed else 0.1 - ends, ends, 3, signed)
        limits = GF.integer_limits(3, signed)
        assert kernels.backend(x) == "triton"
        a, b = (x.clone().requires_grad_() for _ in range(2))
        calls = []
        launch, triton_frozen._launch = triton_frozen._launch, lambda layout: calls.append(layout) or launch(layout)
        actual = kernels.affine_quantize(a, scale, zero_point, limits, axis, before)
        triton_frozen._launch = launch
        assert calls, (shape, axis)
        expected = GF.affine_quantize(before.apply(b), scale, zero_point, limits)
        oracles.assert_equal(actual, expected)
        incoming = torch.randn(shape).to(dtype)
        actual.backward(incoming), expected.backward(incoming)
        oracles.assert_equal(a.grad, b.grad)
print(len(cases))
"""


def test_triton_of_frozen_ranges_in_its_interpreter(interpreter):
    """Activations and weights, one range for each channel or for all, in rows and columns, clipped values and their gradients."""
    assert run_python(_TRITON_FROZEN, TRITON_INTERPRET="1", GRANQ_KERNEL="triton").split()[-1] == "54"


@pytest.mark.parametrize("which, option", [(w, o) for w in ("dynamic", "frozen", "backward") for o in (False, True)]
                         + [("short", True), ("split", True)])
@pytest.mark.parametrize("norm", [0, 2])
def test_triton_compiles_for_a_gpu_without_fused_operations(which, option, norm):
    """To PTX, which needs no GPU: divisions round correctly and nothing is contracted but what is meant to be."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from granq_plugin.kernels import triton_frozen, triton_kernel, triton_short, triton_split
    numbers = ("eps", "half_levels", "overflow", "smallest", "lowest", "highest", "low", "high", "above", "below", "largest")
    pointers = {"mask_ptr": "*i8", "most_ptr": "*u32", "negated_ptr": "*u32", "done_ptr": "*i32", "ticket_ptr": "*i32"}
    kernel = {"dynamic": triton_kernel._granq, "frozen": triton_frozen._frozen, "backward": triton_frozen._frozen_backward,
              "short": triton_short._granq_short, "split": triton_split._granq_split}[which]
    constants = dict(NORM=norm, CLAMP=2, MASK=True, NARROW=False, FAST=1, EVEN=option, ROWS=4, BLOCK=1024, STAGES=1 + 2 * option,
                     INNER=7 * option, N=999)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else "fp32" if name in numbers else
                 pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    ptx = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32),
                         options=dict(enable_fp_fusion=False)).asm["ptx"]
    values = 4 * 1024 // 128  # of each of a program's 128 threads
    meant = 0 if which in ("frozen", "backward") else 4 * values  # corrections of quotients
    if "NORM" in constants and norm:
        meant += values
        assert f"sqrt.rn{flushes()}.f32" in ptx
    assert f"div.rn{flushes()}.f32" in ptx and "div.full" not in ptx and "approx" not in ptx
    count = ptx.count("fma.rn.f32")
    assert count == ptx.count("fma") and meant <= count <= meant + 4 * values * bool(norm)  # and shifts of channels


def flushes() -> str:
    """To 0, what lies below the normal numbers."""
    import triton
    return "" if Version(triton.__version__) >= Version("3.6") else ".ftz"


class TestInNetworks:

    @needs_compiler
    def test_memory_of_the_backward(self):
        """ReLU + GranQ keep a bit of each value: nothing of the size of the tensor is saved."""
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            y = qnn.QuantReLU(GranQActPerChannel, bit_width=4)(x)
        assert not saved and y.grad_fn.mask.numel() * 8 == x.numel()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_step_of_training_is_the_same_without_kernels(self, monkeypatch, memory_format):
        grads = []
        for name in ("eager", ""):
            monkeypatch.setenv("GRANQ_KERNEL", name)
            torch.manual_seed(0)
            net = nn.Sequential(
                qnn.QuantConv2d(3, 8, 3, weight_quant=None), nn.BatchNorm2d(8), qnn.QuantReLU(GranQActPerChannel, bit_width=3),
                qnn.QuantReLU(GranQActPerChannelStatic, bit_width=3, collect_stats_steps=1)).to(memory_format=memory_format)
            x = torch.randn(4, 3, 9, 9).contiguous(memory_format=memory_format)
            for _ in range(3):
                net.zero_grad()
                net(x).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads):
            oracles.assert_equal(a, b)
