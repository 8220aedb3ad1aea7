"""Static ranges under torch.distributed: two gloo processes on this machine."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from brevitas.graph.calibrate import calibration_mode

import brevitas.nn as qnn
import oracles
from granq_plugin import GranQActPerChannel, GranQActPerChannelStatic, GranQWeightPerChannel
from granq_plugin.core.static import StaticGranQ

WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def run_ranks(work, tmp_path, *args) -> list:
    """Run ``work(rank, *args)`` in two processes; what each returned, by rank. An exception in one fails the test."""
    mp.spawn(_rank, (work, str(tmp_path), args), nprocs=WORLD)
    return [torch.load(tmp_path / f"rank{r}.pt") for r in range(WORLD)]


def _rank(rank, work, folder, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save(work(rank, *args), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def batches(count: int = 3) -> list[torch.Tensor]:
    """Whole batches, of which each rank gets a half; the second half has the wider range."""
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(4, 3, 5, 5, generator=generator) for _ in range(count)]
    for i, x in enumerate(xs):
        x[2:] *= 3 + i
    return xs


def share(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(WORLD)[rank]


def collect_all(rank):
    """Ranges of every mode, of empty batches on one rank, of unsynchronized collection, and under calibration."""
    whole = rank is None
    ranges = {}
    for name, options in {
            "minmax": dict(range_mode="minmax"), "ema": dict(range_mode="ema", momentum=0.3),
            "average": dict(range_mode="ema", momentum=None), "signed": dict(signed=True),
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
    for first_batch_empty in (True, False):  # rank 0 has no sample of one batch
        act = qnn.QuantIdentity(GranQActPerChannelStatic, bit_width=4, range_mode="ema")
        for i, x in enumerate(batches()):
            if whole:
                y = act(x[2:] if i == (not first_batch_empty) else x)
            else:
                y = act(share(x, rank)[:0] if rank == 0 and i == (not first_batch_empty) else share(x, rank))
        ranges["empty", first_batch_empty] = state(act) | dict(y=y)
    return ranges


def state(act) -> dict[str, torch.Tensor]:
    collector, = (m for m in act.modules() if isinstance(m, StaticGranQ))
    return dict(
        lo=collector.running_min, hi=collector.running_max, counter=torch.tensor(collector.counter),
        frozen=torch.tensor(collector.frozen))


def test_ranges_are_those_of_the_whole_batch(tmp_path):
    """On both ranks, and equal to one process that sees the concatenated batches."""
    ranks, single = run_ranks(collect_all, tmp_path), collect_all(None)
    for name, expected in single.items():
        if name == "not_synchronized":
            continue
        for rank, ranges in enumerate(ranks):
            for key, value in expected.items():
                oracles.assert_equal(ranges[name][key], share(value, rank) if key == "y" else value)
    assert not torch.equal(ranks[0]["not_synchronized"]["hi"], ranks[1]["not_synchronized"]["hi"])


def train_ddp(rank, act, learned_scale):
    """Two steps of a small quantized net under DDP, through collecting and freezing."""
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


@pytest.mark.parametrize("act, learned_scale", [("dynamic", False), ("static", False), ("static", True)])
def test_ddp_trains_as_one_process_does(tmp_path, act, learned_scale):
    """Weights and ranges stay equal on both ranks; gradients averaged over the ranks are the whole batch's."""
    first, second = run_ranks(train_ddp, tmp_path, act, learned_scale)
    start = oracles.QuantNet(GranQActPerChannel, GranQWeightPerChannel)
    single = train_ddp(None, act, learned_scale)
    for name, value in single.items():
        oracles.assert_equal(first[name], second[name])
        if name.endswith("conv1.weight"):
            assert not torch.equal(first[name], start.state_dict()[name])
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
