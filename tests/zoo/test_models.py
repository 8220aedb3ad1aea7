"""The CIFAR ResNets against the published counts."""

import pytest
import torch

from zoo.models.cifar_resnet import CifarResNet, PaddingShortcut, convolution_shortcuts, resnet20


@pytest.mark.parametrize("depth, parameters", [(20, 269_722), (32, 464_154), (56, 853_018)])  # He et al., table 6, option A
def test_parameters_with_padding_shortcuts(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth, shortcut="A").parameters()) == parameters


def test_convolution_shortcuts_and_output_shape():
    model = resnet20(num_classes=100).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert model.layer2[0].shortcut[0].weight.shape == (32, 16, 1, 1)


def test_padding_shortcut_places_channels_in_the_middle():
    block = resnet20(shortcut="A").layer2[0]
    x = torch.randn(1, 16, 4, 4)
    y = block.shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_shortcuts_are_exact_and_can_be_trained(dtype):
    model = resnet20(shortcut="A").to(dtype).eval()
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    deployable = convolution_shortcuts(model)
    assert torch.equal(deployable(x), model(x))
    assert deployable.state_dict().keys() == resnet20(shortcut="B").state_dict().keys()
    assert any(isinstance(m, PaddingShortcut) for m in model.modules())  # a copy
    deployable.train()(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in deployable.parameters())
    assert all(torch.isfinite(b).all() for b in deployable.buffers())
    assert convolution_shortcuts(model, inplace=True) is model and model.layer2[0].shortcut[0].stride == (2, 2)
    with pytest.raises(ValueError, match="no padding shortcut"):
        convolution_shortcuts(model)


def test_bad_arguments():
    with pytest.raises(ValueError, match="6n \\+ 2 .*got 21"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="'A' or 'B', got 'C'"):
        resnet20(shortcut="C")
