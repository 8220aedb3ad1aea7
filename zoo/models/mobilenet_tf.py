"""torchvision's MobileNetV2 as TensorFlow pads it, for weights that were trained there."""

from torch import nn

__all__ = ["mobilenet_v2_tf"]


def mobilenet_v2_tf(num_classes: int = 1000) -> nn.Module:
    """torchvision's ``mobilenet_v2``, with its parameter names, where 3x3 convolutions of stride 2 pad right and below only.

    That is TensorFlow's "SAME" for even sizes; inputs must be a multiple of 32 pixels.
    """
    from torchvision.models import mobilenet_v2
    network = mobilenet_v2(num_classes=num_classes)
    for block in network.modules():
        convolution = block._modules.get("0")
        if isinstance(convolution, nn.Conv2d) and convolution.stride == (2, 2):
            convolution.padding = (0, 0)
            block._modules = {"padding": nn.ZeroPad2d((0, 1, 0, 1)), **block._modules}  # first, and without a name in state dicts
    return network
