"""Packed files: bits against an independent oracle, networks bit-identical, damage refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import granq_plugin as gq
from small_zoo import KINDS, SMALL, trained
from zoo.packing import pack_bits, pack_network, pack_tensors, read_packed, unpack_bits
from zoo.registry import from_bytes


@given(st.integers(1, 16).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=40))))
def test_bits_are_those_of_one_large_integer(drawn):
    bits, values = drawn
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    number = sum(v << (i * bits) for i, v in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes((len(values) * bits + 7) // 8, "little")
    assert unpack_bits(packed, bits, (len(values), )).tolist() == values


def test_bits_that_do_not_fit():
    with pytest.raises(ValueError, match="integers must be 0 to 7 for 3 bits, got 0 to 8"):
        pack_bits(torch.tensor([0, 8]), 3)
    with pytest.raises(ValueError, match="4 integers of 3 bits are 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, (2, 2))


@pytest.mark.parametrize("quantization", KINDS, ids=lambda q: q.suffix)
def test_unpacked_networks_return_the_same_logits(quantization):
    network, calibrated = trained(quantization)
    data = pack_network(network, calibrated)
    assert data == pack_network(network, calibrated)
    restored = from_bytes(dataclasses.replace(SMALL, quantization=quantization), data)
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(restored(x), network(x))
    assert not restored.training and all(not m.training for m in restored.modules())


def test_weights_take_their_bits_and_no_more():
    """A W3 ResNet-20: 270,000 weights at 3 bits are 100,626 bytes; batch normalization and scales come on top."""
    card = dataclasses.replace(SMALL, architecture_args=dict(depth=20, shortcut="A"))
    data = pack_network(gq.quantize(card.build(), 3, 3))
    assert sum(v.numel() for k, v in read_packed(data).integers.items()) == 268_336
    assert 100_626 < len(data) < 132_000


def test_one_level_more_than_the_bits_hold():
    """The paper's formula has 2^k + 1 levels for a range that is symmetric around 0."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, 0.25, 1.0], [0.0, 0.5, 1.0]])
    network = gq.quantize(model, 2, None, weight_quant=gq.GranQWeightPerKernel)
    packed = read_packed(pack_network(network))
    assert int(packed.integers["0.weight"].max()) == 4
    restored = packed.install(gq.quantize(model, 2, None, weight_quant=gq.GranQWeightPerKernel))
    x = torch.randn(5, 3)
    assert torch.equal(restored(x), network(x))


def test_float_networks(tmp_path):
    network = SMALL.build()
    restored = from_bytes(SMALL, pack_tensors(network.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(restored(x), network(x))


def test_damage_and_other_networks_are_refused():
    network, _ = trained(KINDS[0])
    data = pack_network(network)
    card = dataclasses.replace(SMALL, quantization=KINDS[0])
    for cut in (b"", data[:7], data[:200], data[:-1], b"\0" * 100):
        with pytest.raises(ValueError, match="not a file of packed weights"):
            from_bytes(card, cut)
    with pytest.raises(ValueError, match="of another network"):
        from_bytes(dataclasses.replace(card, architecture_args=dict(depth=14)), data)
    with pytest.raises(ValueError, match="of another network"):
        from_bytes(dataclasses.replace(card, num_classes=7), data)
    with pytest.raises(ValueError, match="of another network"):
        from_bytes(dataclasses.replace(card, quantization=KINDS[1]), data)
    with pytest.raises(ValueError, match="of another network"):
        from_bytes(SMALL, data)
    folded, _ = trained(KINDS[-1])
    with pytest.raises(ValueError, match="they hold no "):
        from_bytes(dataclasses.replace(SMALL, quantization=KINDS[-1]), pack_network(folded))
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    later = data.replace(b'\\"format\\": 1', b'\\"format\\": 2')
    assert later != data and "granq" in header["__metadata__"]
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        read_packed(later)
