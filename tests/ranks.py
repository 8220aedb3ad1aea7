"""What the processes of distributed tests run; a module of its own, so that a spawned process can import it."""

import datetime

import brevitas.nn as qnn
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from brevitas.graph.calibrate import calibration_mode

import oracles
from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic, GranQWeightPerChannel, quantize
from granq_plugin.core.ranges import CollectedRange
from granq_plugin.zero_shot import preset, zero_shot_qat
from granq_plugin.zero_shot.generator import Generator
from networks import teacher_network
from zoo.card import Preprocessing
from zoo.data import ImageSet
from zoo.evaluate import evaluate

WORLD = 2
TRAININGS = [("dynamic", False), ("static", False), ("static", True)]
"""Activation quantizer, learned scale."""
ZERO_SHOT = [("dynamic", 1), ("dynamic", 2), ("static", 1)]
"""Activation quantizer, micro-batches."""


def run_ranks(folder, function) -> list:
    """Call a function of this module on two ranks; what each returned, by rank. An exception in one is raised here."""
    mp.spawn(_rank, (str(folder), function), nprocs=WORLD)
    return [torch.load(folder / f"rank{r}.pt") for r in range(WORLD)]


def _rank(rank: int, folder: str, function) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=300))  # a busy machine
    try:
        torch.save(function(rank), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def everything(rank: int | None) -> dict:
    """On one rank, or (None) in a single process that sees whole batches."""
    return dict(ranges=collect_all(rank), zero_shot={t: zero_shot(*t) for t in ZERO_SHOT}) | {
        t: train(rank, *t) for t in TRAININGS} | dict(sample=sample(rank))


def batches(count: int = 3) -> list[torch.Tensor]:
    """Whole batches, of which each rank gets a half; the second half has the wider range."""
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(4, 3, 5, 5, generator=generator) for _ in range(count)]
    for i, x in enumerate(xs):
        x[2:] *= 3 + i
    return xs


def share(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(WORLD)[rank]


def collect_all(rank: int | None) -> dict:
    """Ranges of every mode, of empty batches on one rank, of unsynchronized collection, and under calibration."""
    whole = rank is None
    ranges = {}
    for name, options in {
            "minmax": dict(range_mode="minmax"), "ema": dict(range_mode="ema", momentum=0.3),
            "average": dict(range_mode="ema", momentum=None), "signed": dict(signed=True), "mse": dict(range_mode="mse"),
            "not_synchronized": dict(range_mode="minmax", sync_ranges=False)}.items():
        act = qnn.QuantIdentity(GranQActPerChannelStatic, bit_width=4, **options)
        for x in batches():
            y = act(x if whole else share(x, rank))
        ranges[name] = state(act) | dict(y=y)
    act = qnn.QuantIdentity(GranQActPerChannelStatic, bit_width=4)
    with calibration_mode(act):
        for x in batches():
            act(x if whole else share(x, rank))
    ranges["calibration"] = state(act)
    for empty, which in enumerate(("first", "second")):  # rank 0 has no sample of one batch
        act = qnn.QuantIdentity(GranQActPerChannelStatic, bit_width=4, range_mode="ema")
        for i, x in enumerate(batches()):
            if whole:
                y = act(x[2:] if i == empty else x)
            else:
                y = act(share(x, rank)[:0] if rank == 0 and i == empty else share(x, rank))
        ranges["empty", which] = state(act) | dict(y=y)
    return ranges


def state(act) -> dict[str, torch.Tensor]:
    collector, = (m for m in act.modules() if isinstance(m, CollectedRange))
    return dict(
        lo=collector.running_min, hi=collector.running_max, counter=torch.tensor(collector.counter),
        frozen=torch.tensor(collector.frozen))


def train(rank: int | None, act: str, learned_scale: bool) -> dict[str, torch.Tensor]:
    """The state of a small quantized net after three steps, under DDP on a rank, through collecting and freezing."""
    options = dict(collect_stats_steps=1, learned_scale=learned_scale) if act == "static" else {}
    quant = GranQActPerChannelStatic if act == "static" else GranQActPerChannel
    torch.manual_seed(0)
    net = oracles.QuantNet(quant, GranQWeightPerChannel, **options).train()
    net.bn1.eval()
    xs = batches()
    if learned_scale:  # the parameter takes its shape in calibration, before DDP wraps it
        with torch.no_grad(), calibration_mode(net):
            net(xs[0] if rank is None else share(xs[0], rank))
        net.train()
        net.bn1.eval()
    model = net if rank is None else torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in xs:
        optimizer.zero_grad()
        model(x if rank is None else share(x, rank)).square().mean().backward()
        optimizer.step()
    return dict(net.state_dict())


def zero_shot(act: str, accumulation_steps: int) -> dict[str, torch.Tensor]:
    """Zero-shot QAT over the ranks there are, in float64; what it leaves."""
    torch.manual_seed(0)
    teacher = teacher_network().double()
    quant = GranQActPerChannelStatic if act == "static" else GranQActPerChannel
    student = quantize(teacher, 3, 3, act_quant=quant)
    config = preset(
        "cifar10", image_size=8, batch_size=8, epochs=3, iterations=3, warmup_epochs=1, student_lr=1e-2, memory_size=20,
        replay_steps=1, accumulation_steps=accumulation_steps, image_gain=1.5, image_shift=1, image_flip=True)
    result = zero_shot_qat(student, teacher, config, evaluate=lambda network: float(network(torch.ones(1, 3, 8, 8).double()).sum()))
    metrics = [[v for k, v in row.items() if k != "images_per_second"] for row in result.metrics]
    generator = {f"generator.{k}": v for k, v in result.generator.state_dict().items()}
    return dict(student.state_dict()) | generator | dict(images=result.images, metrics=torch.tensor(metrics))


def sample(rank: int | None) -> torch.Tensor | None:
    """Of a generator, on the first rank, while the other one leaves."""
    torch.manual_seed(0)
    return None if rank else Generator(8, 10).sample(20)


def count(rank: int | None) -> tuple[int, int, int]:
    """Correct, correct among five, and total, of 23 images in batches of 5; on one rank they are shared."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 2, 2), dtype=torch.uint8, generator=rng)
    data = ImageSet(images, torch.randint(0, 8, (23, ), generator=rng), "memory")
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    result = evaluate(network, data, Preprocessing(2, (0.1, 0.2, 0.3), (0.5, 0.4, 0.2)), 5, distributed=rank is not None)
    return result.correct, result.correct5, result.total
