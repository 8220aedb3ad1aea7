"""What Triton compiles for a GPU, run without one (tests/ptx.py): equal to torch's operations, gradients included."""

import pytest

_PROGRAM = """
import random
import torch
from benchmarks import gpu_launches
import oracles
import ptx
from granq_plugin import functional as GF, kernels
from granq_plugin.kernels import Ahead, Before, triton_kernel, triton_launch, triton_split

def run(self, *tensors):
    call(self, *tensors)
    ptx.execute(self, tensors, turns if "done_ptr" in self.kernel.arg_names else None)
    names.add(self.kernel.fn.__name__)

gpu_launches.pretend()
triton_kernel._chip = lambda device: (2, 2**20)  # two multiprocessors, so that a program has several tiles
triton_split._TOGETHER, triton_kernel.Fastest = 16, oracles.every_launch
call, triton_launch.Launch.__call__ = triton_launch.Launch.__call__, run
torch.manual_seed(0)
names, cl, plain, turns, launch = set(), torch.channels_last, torch.contiguous_format, None, triton_split.launches
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
before = Before(relu=True, max_val=2.0)
shapes = [
    ((2, 40, 28, 28), cl, f32, 0), ((1, 33, 28, 28), cl, f32, 2), ((1, 64, 20, 20), cl, bf16, 1), ((1, 40, 14, 14), cl, f32, 1),
    ((2, 33, 7, 7), cl, f32, 2), ((1, 64, 7, 7), cl, f16, 0), ((2, 16, 15, 15), cl, f32, 2), ((1, 40, 36, 36), cl, f32, 2),
    ((1, 80, 36, 36), cl, bf16, 0), ((3, 2, 112, 112), plain, f32, 0), ((1, 2, 130, 130), plain, f32, 2),
    ((1, 3, 100, 100), plain, f16, 0), ((2, 9, 8, 8), plain, f32, 1), ((3, 11, 7, 7), plain, f32, 2), ((5, 7), plain, bf16, 0)]

def check(shape, memory_format, dtype, norm):
    def draw():
        return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    c, x, incoming, ahead = shape[1], draw(), draw(), None
    x[0, 0].view(-1)[0] = float("nan") if norm == 0 and len(shape) == 4 and memory_format == plain else 0.5
    x[-1, -1] = 0.25  # a dead channel
    x[..., -1, :] *= 3  # the last of the programs that share a row has its largest value
    if norm:  # powers of two, exact in whatever order
        ahead = Ahead(torch.randint(-3, 4, (c, )) / 4, 4.0 ** torch.randint(-1, 2, (c, )), 2.0 ** torch.randint(-2, 3, (c, )),
                      torch.randint(-3, 4, (c, )) / 4, 1e-30, draw() if norm == 2 else None)
    ends = torch.rand([c if d == 1 else 1 for d in range(len(shape))])
    scale, zero_point = GF.affine_params(-ends, 3 * ends, 3, False)
    results = []
    for of in (kernels, GF):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        if of is kernels:
            a = kernels.granq(leaf, 4, 1, before, ahead)
            b = kernels.affine_quantize(leaf, scale, zero_point, (0, 7), 1, before, ahead)
        else:
            a = GF.granq(before.apply(leaf, ahead), 4)
            b = GF.affine_quantize(before.apply(leaf, ahead), scale, zero_point, (0, 7))
        results.append([*a, b, *(torch.autograd.grad(y, leaf, incoming)[0] for y in (a.value, b))])
    for p, q in zip(*results):
        oracles.assert_equal(p.detach(), q.detach())

try:
    for case in shapes:
        check(*case)
    # programs at a time, warps apart, in small tiles; they wait for each other, or lose patience
    turns, before, triton_split._TILE, triton_kernel._tile = random.Random(0), Before(relu=True), 512, lambda *args: None
    for patience, case in ((3, ((1, 33, 9, 7), cl, f32, 0)), (2**30, ((1, 33, 9, 7), cl, f32, 2)),
                           (2**30, ((1, 70, 5, 4), cl, bf16, 0)), (50, ((1, 1, 30, 40), plain, f32, 1))):
        triton_split.launches = lambda *args, patience, p=patience, **kwargs: launch(*args, patience=p, **kwargs)
        triton_kernel._launch.cache_clear()
        check(*case)
    print(*sorted(names), len(shapes))
except NotImplementedError as e:
    print("unknown", e)
"""


def test_compiled_kernels_compute_what_torch_does(run_python):
    """All kernels: blocks on chip, on their way while others are quantized, short rows, rows shared by programs (kept or read
    twice), frozen ranges and their backward; three dtypes, both memory formats, BatchNorm and addition ahead."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = run_python(_PROGRAM)
    if done.startswith("unknown"):
        pytest.skip(f"this Triton has an instruction that tests/ptx.py does not know: {done}")
    assert done.split() == ["_frozen", "_frozen_backward", "_granq", "_granq_kept", "_granq_short", "_granq_split", "15"]
