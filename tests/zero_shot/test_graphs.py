"""What a step needs so that a GPU can record it: that it reads no value back and brings none from the host."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import granq_plugin as gq
from granq_plugin.zero_shot import preset
from granq_plugin.zero_shot.training import Training
from networks import teacher_network


class Readings(TorchDispatchMode):
    """Counts operations that would make a GPU and its host wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.seen[name] += 1
        return out


@pytest.mark.parametrize("act_quant", [gq.GranQActPerChannel, gq.GranQActPerChannelStatic.let(learned_scale=True)])
@pytest.mark.parametrize("weight_quant", [gq.GranQWeightPerKernel, gq.GranQWeightPerChannelSymmetric.let(range_mode="mse")])
@pytest.mark.parametrize("settings", [dict(feature_loss="features", low_pass=3.0), dict(feature_loss="attention", bf16=True)])
def test_a_step_reads_no_value_back(act_quant, weight_quant, settings):
    torch.manual_seed(0)
    teacher = teacher_network().eval().requires_grad_(False)
    student = gq.quantize(teacher, 3, 3, act_quant=act_quant, weight_quant=weight_quant)
    config = preset("cifar10", image_size=8, batch_size=4, epochs=6, iterations=1, warmup_epochs=1, range_epochs=1, memory_size=8,
                    replay_steps=1, **settings)
    training, readings, steps = Training(student, teacher, config, None), Readings(), []

    def run(name, step, *inputs):
        steps.append(name)
        with readings:
            return step(*inputs)

    for _ in range(3):
        training.step()
    training._run = run
    training.step()
    assert sorted(steps) == ["both", "student"]
    assert not readings.seen


def test_the_counter_counts():
    with Readings() as readings:
        assert float(torch.ones(()).sum()) == 1
    assert readings.seen == {"_local_scalar_dense": 1}
