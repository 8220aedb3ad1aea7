"""Frozen weights: bit-identical outputs, integers times a scale, and refusals."""

import brevitas.nn as qnn
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import granq_plugin as gq
from granq_plugin.freeze import freeze_weights, frozen_layers, use_frozen_quantizers, weights_quantized_once

REGIMES = {"per-output-channel": gq.GranQWeightPerChannel, "symmetric": gq.GranQWeightPerChannelSymmetric,
           "mse": gq.GranQWeightPerChannel.let(range_mode="mse"),
           "per-kernel": gq.GranQWeightPerKernel}


def network(weight_quant, bits=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(100, 5)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0  # a dead channel
        model[0].weight[2] = model[0].weight[2].abs() + 1  # a range that does not contain 0
        model[3].weight[0] *= 1e-9
    return gq.quantize(model, bits, 4, weight_quant=weight_quant)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("bits", [2, 3, 16])
def test_outputs_are_bit_identical_and_weights_integers(regime, bits):
    model, x = network(REGIMES[regime], bits), torch.randn(2, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = freeze_weights(model)
    with torch.no_grad():
        assert torch.equal(frozen(x), model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # a copy
    floats = [n for n, m in frozen.named_modules() if getattr(m, "disable_quant", False)]
    assert floats == (["5.weight_quant"] if regime == "per-kernel" else [])
    assert len(frozen_layers(frozen)) == 5 - len(floats)
    for name, layer in frozen_layers(frozen).items():
        quantizer = layer.weight_quant.tensor_quant
        integers = quantizer.to_int(layer.weight)
        assert torch.equal(quantizer.dequantize(integers), layer.weight), name
        assert quantizer.lowest <= integers.min() and integers.max() <= quantizer.lowest + 2**bits, name
        if regime != "per-kernel":
            assert torch.equal(layer.quant_weight().int().long(), integers), name


@pytest.mark.parametrize("regime", REGIMES)
def test_a_frozen_state_dict_is_loaded_into_a_fresh_network(regime):
    frozen, x = freeze_weights(network(REGIMES[regime])), torch.randn(2, 3, 8, 8)
    fresh = network(REGIMES[regime], seed=1)
    use_frozen_quantizers(fresh, frozenset({"5"} if regime == "per-kernel" else ()))
    with pytest.raises(RuntimeError, match="no scale yet"):
        fresh(x)
    fresh.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), frozen(x))
    assert frozen_layers(fresh).keys() == frozen_layers(frozen).keys()


def test_scales_stay_when_the_weight_moves():
    frozen = freeze_weights(network(gq.GranQWeightPerChannel)).train()
    scale = frozen[0].weight_quant.scale().clone()
    frozen(torch.randn(2, 3, 8, 8)).sum().backward()
    assert frozen[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        frozen[0].weight[3, 0, 0, 0] = 9.0
    assert torch.equal(frozen[0].weight_quant.scale(), scale)
    assert frozen[0].quant_weight().value.max() < 9


@pytest.mark.parametrize("regime", REGIMES)
def test_frozen_networks_are_exported(tmp_path, regime):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime (export extra) is not installed")
    from granq_plugin.export import export_qcdq
    model, x = network(REGIMES[regime]), torch.randn(2, 3, 8, 8)
    session = onnxruntime.InferenceSession(export_qcdq(freeze_weights(model), x, tmp_path / "m.onnx"))
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x), atol=1e-5)


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(ValueError, match="no GranQ weight quantizer"):
        freeze_weights(nn.Linear(2, 2))
    model = network(gq.GranQWeightPerChannel)
    with pytest.raises(ValueError, match="no GranQ weight quantizer to freeze, or is frozen already"):
        freeze_weights(freeze_weights(model))
    parametrize.register_parametrization(model[3], "weight", nn.Identity())
    with pytest.raises(ValueError, match="cannot freeze '3': its weight is computed"):
        freeze_weights(model, inplace=True)
    model = network(gq.GranQWeightPerChannel)
    model[5].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="cannot freeze '5': its weight must be finite"):
        freeze_weights(model)
    shared = qnn.QuantLinear(3, 3, bias=False, weight_quant=gq.GranQWeightPerChannel)
    other = qnn.QuantLinear(3, 3, bias=False, weight_quant=shared.weight_quant)
    with pytest.raises(ValueError, match="also another weight's"):
        freeze_weights(nn.Sequential(shared, other))


@pytest.mark.parametrize("regime", REGIMES)
def test_weights_are_quantized_once(regime, monkeypatch):
    """The same outputs; afterwards, and after an error, layers are as they were. Training, and hooks, see every forward."""
    model, x = network(REGIMES[regime]).eval(), torch.randn(2, 3, 8, 8)
    kind, calls = type(model[0].weight_quant.tensor_quant), []
    monkeypatch.setattr(kind, "forward", lambda self, w, f=kind.forward: calls.append(self) or f(self, w))

    def forwards(count=3):
        calls.clear()
        with torch.no_grad(), weights_quantized_once(model):
            return [model(x) for _ in range(count)]

    with torch.no_grad():
        expected = model(x)
    assert all(torch.equal(y, expected) for y in forwards()) and len(calls) == 5
    model[0].train()
    hook = model[3].weight_quant.register_forward_hook(lambda *args: None)
    forwards()
    assert len(calls) == 3 + 2 * 3
    hook.remove()
    model.eval()
    with pytest.raises(RuntimeError), weights_quantized_once(model):
        model(x[:, :2])
    with weights_quantized_once(model):
        del model[0].quant_weight  # as another thread's end may
    with torch.no_grad():
        model[0].weight *= 2
    assert not torch.equal(forwards(1)[0], expected)
    assert not any("quant_weight" in vars(m) for m in model.modules())
    model(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("regime", REGIMES)
def test_tied_weights(regime):
    """Frozen once for both layers; refused where they would become different ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()).eval()
    model[2].weight = model[0].weight
    quantized, x = gq.quantize(model, 2, 4, weight_quant=REGIMES[regime]), torch.randn(3, 6)
    assert quantized[2].weight is quantized[0].weight
    with torch.no_grad():
        assert torch.equal(freeze_weights(quantized)(x), quantized(x))
    with pytest.raises(ValueError, match="cannot freeze '2': its weight is also that of '0', which quantizes it to other values"):
        freeze_weights(gq.quantize(model, 2, 4, weight_quant=REGIMES[regime], first_layer_bit_width=5))


def test_a_weight_that_something_else_has_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.relu, self.out = nn.Embedding(7, 4), nn.ReLU(), nn.Linear(4, 7)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.relu(self.embedding(x)))
    with pytest.raises(ValueError, match="cannot freeze 'out': its weight is also that of 'embedding', which stays float"):
        freeze_weights(gq.quantize(Tied(), 3, 3))
