"""The Triton kernels without a GPU: in Triton's interpreter, equal to torch's operations, and compiled to PTX."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from granq_plugin.kernels import Before, layout_of

_TRITON = """
import torch
from granq_plugin import functional as GF, kernels
import oracles
from granq_plugin.kernels import Before, triton_kernel, triton_short, triton_split
torch.manual_seed(0)
# so that small tensors take all ways
triton_kernel._LARGEST, triton_split._TILE, triton_split._LAG, triton_short._LONGEST, triton_short._TILE = 256, 64, 128, 32, 64
triton_kernel.Fastest = oracles.every_launch
cl = torch.channels_last
shapes = [((2, 1, 100), None, 1), ((2, 3, 8, 8), None, 3), ((1, 33, 3, 5), cl, 3), ((1, 3, 6, 7), cl, 3), ((2, 3, 7, 7), cl, 3),
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
for n in range(1, 5000):
    blocks = triton_kernel._powers(n)
    assert all(b & (b - 1) == 0 for b in blocks) and sorted(blocks, reverse=True) == list(blocks)
    assert n <= sum(blocks) <= 2 ** (n - 1).bit_length() and (sum(blocks) == n) >= (n.bit_count() <= 3)
assert {kernels.backend(torch.ones(2, 3, 4).to(t)) for t in (torch.float64, torch.float8_e4m3fn)} == {"eager"}
print(len(cases))
"""


_AS_ON_A_GPU = """
import numpy as np
from triton.runtime import interpreter
from granq_plugin.kernels import triton_kernel, triton_launch, triton_short, triton_split

def fma(self, x, y, z):  # the interpreter's rounds twice; here a product is exact
    return interpreter.TensorHandle((x.data.astype(np.longdouble) * y.data + z.data).astype(np.float32), z.dtype.scalar)

def launch(kernel, grid, numbers, constants):
    return triton_launch.Launch(kernel, grid, numbers, constants | dict(FAST=1))

interpreter.InterpreterBuilder.create_fma = fma
triton_kernel.Launch = triton_short.Launch = triton_split.Launch = launch
"""


_TRITON_AHEAD = """
import torch
from granq_plugin import functional as GF, kernels
import oracles
from granq_plugin.kernels import Ahead, Before, triton_frozen, triton_kernel, triton_short, triton_split
torch.manual_seed(0)
triton_kernel._LARGEST, triton_split._TILE, triton_split._LAG, triton_short._LONGEST, triton_short._TILE = 64, 64, 128, 32, 64
triton_kernel.Fastest = oracles.every_launch
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


@pytest.mark.parametrize("first", ["", _AS_ON_A_GPU], ids=["division", "corrected quotient"])
def test_triton_in_its_interpreter(interpreter, run_python, first):
    """Rows on chip, on their way while others are quantized, shared by programs, short ones; channels_last, rows of a matrix, all
    dtypes, NaN and Inf: equal to torch's operations, by division as by the correction of quotients that a GPU does."""
    assert run_python(first + _TRITON, TRITON_INTERPRET="1", GRANQ_KERNEL="triton").split()[-1] == "57"


def test_triton_of_a_batch_norm_ahead_in_its_interpreter(interpreter, run_python):
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
        forward, triton_frozen._forward = triton_frozen._forward, lambda *args: calls.append(args) or forward(*args)
        actual = kernels.affine_quantize(a, scale, zero_point, limits, axis, before)
        triton_frozen._forward = forward
        assert calls, (shape, axis)
        expected = GF.affine_quantize(before.apply(b), scale, zero_point, limits)
        oracles.assert_equal(actual, expected)
        incoming = torch.randn(shape).to(dtype)
        actual.backward(incoming), expected.backward(incoming)
        oracles.assert_equal(a.grad, b.grad)
print(len(cases))
"""


def test_triton_of_frozen_ranges_in_its_interpreter(interpreter, run_python):
    """Activations and weights, one range for each channel or for all, in rows and columns, clipped values and their gradients."""
    assert run_python(_TRITON_FROZEN, TRITON_INTERPRET="1", GRANQ_KERNEL="triton").split()[-1] == "54"


_TRITON_LAUNCHES = """
import torch
from triton.runtime import JITFunction
from benchmarks import gpu_launches
from granq_plugin import kernels
from granq_plugin.kernels import IDENTITY, Ahead, Before, triton_kernel, triton_launch
import oracles

def compared(self, *tensors):
    count = len(runs)
    call(self, *tensors)
    asked.append(len(runs) - count)
    self.by_triton(*tensors)
    assert launched[-1] == launched[-2], (self.kernel, self.constants)

launched, runs, asked = [], [], []
gpu_launches.pretend(lambda call: launched.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call]))
call, triton_launch.Launch.__call__ = triton_launch.Launch.__call__, compared
triton_kernel.Fastest = oracles.every_launch
run, JITFunction.run = JITFunction.run, lambda self, *args, **kwargs: runs.append(self) or run(self, *args, **kwargs)

def placed(shape, dtype, skipped):  # some values behind the beginning of their memory
    return torch.randn(torch.Size(shape).numel() + skipped).to(dtype)[skipped:].view(shape)

cases = [((2, 3, 8, 8), d, s) for d, s in ((torch.float32, (0, 0)), (torch.float32, (1, 0)), (torch.float32, (0, 1)),
                                           (torch.float16, (0, 0)))]
cases += [(shape, torch.float32, (0, 0)) for shape in ((2, 3, 7, 7), (1, 64, 130, 130), (1, 20, 20, 16), (1, 40, 40, 8))]
for shape, dtype, skipped in cases:
    x, residual = (placed(shape, dtype, s) for s in skipped)
    if shape[1] in (20, 40):
        x, residual = x.permute(0, 3, 1, 2), residual.permute(0, 3, 1, 2)  # channels_last
    channels = x.shape[1]
    norm = torch.ones(4, channels)
    for before, ahead in ((IDENTITY, None), *((Before(relu=True), Ahead(*norm, eps, residual)) for eps in (1e-5, 1e-3))):
        for wanted, call_it in ((set(), lambda: kernels.granq(x.requires_grad_(), 4, 1, before, ahead).value),
                                ({0.0, 15.0}, lambda: kernels.affine_quantize(x, *norm[:2], (0, 15), 1, before, ahead))):
            y = call_it()
            numbers = {a for a in launched[-1] if type(a) is float}
            assert numbers >= (wanted | {ahead.eps} if ahead else wanted)
        y.sum().backward()
del asked[:]
for bits in (4, 5, 4, 5):
    kernels.granq(x, bits, 1, before, ahead)
assert asked == [0, 1, 0, 0]  # Triton is asked once for each
print(len(launched))
"""


def test_a_kernel_is_launched_again_without_triton_with_what_it_had_at_first(run_python):
    """By a driver that launches nothing; of tensors that begin anywhere, dtypes, and numbers of a BatchNorm."""
    pytest.importorskip("triton", reason="triton is not installed")
    assert int(run_python(_TRITON_LAUNCHES).split()[-1]) > 100


def test_the_fastest_launch_is_taken_where_it_can_be_found(monkeypatch):
    """Once, and not for longer than it takes; the first one without a GPU, and while a CUDA graph is recorded."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.errors import OutOfResources

    from granq_plugin.kernels import triton_launch
    launched, timed, recording = [], [], True

    def milliseconds(launch, tensors, repeats):
        timed.append((launch, repeats))
        return {a: 2.0, b: 1.0, c: 3.0, slow: 50.0}[launch]

    def large(*tensors):
        raise OutOfResources(2, 1, "shared memory")

    a, b, c, slow = (lambda *tensors, name=name: launched.append((name, tensors)) for name in ("a", "b", "c", "slow"))
    monkeypatch.setattr(triton_launch, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    cpu, gpu = torch.ones(1), SimpleNamespace(is_cuda=True)
    launch = triton_launch.Fastest(a, b, large, c, slow)
    launch(cpu), launch(gpu)
    recording = False
    launch(cpu)
    assert launched == [("a", (cpu, )), ("a", (gpu, )), ("a", (cpu, ))] and not timed
    launch(gpu), launch(gpu)
    recording = True
    launch(gpu)
    assert [name for name, _ in launched[3:]] == ["a", "b", "c", "slow", "b", "b", "b"]
    assert timed == [(f, n) for f in (a, b, c) for n in (1, 10, 10)] + [(slow, 1)]


@pytest.mark.parametrize("shape, dtype, residual, shared_memory, programs", [
    ((64, 256, 56, 56), torch.float32, False, 232448, 528), ((64, 256, 56, 56), torch.float32, True, 232448, 396),
    ((64, 256, 56, 56), torch.float32, True, 166912, 264), ((2, 64, 56, 56), torch.float32, False, 232448, 100),
    ((64, 512, 28, 28), torch.float32, False, 232448, 528),  # though they stay on chip
    ((64, 1024, 14, 14), torch.float32, False, 232448, None),  # in several programs of a multiprocessor
    ((64, 256, 56, 56), torch.float32, False, 101376, 264), ((64, 256, 56, 56), torch.bfloat16, False, 101376, 528),
    ((64, 256, 56, 56), torch.float32, False, 0, None),  # nothing is loaded beside other work
    ((64, 250, 56, 56), torch.bfloat16, False, 232448, None),  # nor are single values of 2 bytes
    ((1, 8, 1024, 1025), torch.float32, False, 232448, None)])  # more parts of a row than programs
def test_parts_are_kept_where_their_programs_run_together(shape, dtype, residual, shared_memory, programs, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from granq_plugin.kernels import triton_kernel, triton_split
    found = []
    monkeypatch.setattr(triton_kernel, "_chip", lambda device: (132, shared_memory))
    monkeypatch.setattr(triton_split, "Launch", lambda kernel, grid, *_: found.append((kernel, *grid)))
    layout = layout_of(torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last), 1)
    triton_kernel._launch.__wrapped__(layout, dtype, torch.device("cuda"), 4, Before(), 2 * residual, 0.0, False)
    assert [f for f in found if f[0] is not triton_split._granq_split] == (
        [(triton_split._granq_kept, programs)] if programs else [])


@pytest.mark.parametrize("which, option", [(w, o) for w in ("dynamic", "frozen", "backward") for o in (False, True)]
                         + [("short", True), ("split", True), ("kept", True)])
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
              "short": triton_short._granq_short, "split": triton_split._granq_split, "kept": triton_split._granq_kept}[which]
    constants = dict(NORM=norm, CLAMP=2, MASK=True, NARROW=False, FAST=1, EVEN=option, FULL=option, ROWS=4, BLOCK=512, SECOND=256,
                     THIRD=256, STAGES=1 + 2 * option, INNER=7 * option, N=499)
    if which != "dynamic":
        constants["BLOCK"] = 1024
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
