"""The zoo for torch.hub: ``torch.hub.load(REPOSITORY, "resnet20_cifar10.granq_w4a4", pretrained=True)``.

One entry point per zoo entry, and ``get_model``, which takes the name. ``model.card.preprocessing`` makes inputs of uint8 images.
"""

dependencies = ["torch", "torchvision", "brevitas", "safetensors", "onnx"]

from zoo import get_card as _get_card  # noqa: E402
from zoo import get_model  # noqa: E402
from zoo import list_models as _list_models  # noqa: E402


def _entry_point(name: str):

    def load(pretrained: bool = False, **options):
        return get_model(name, pretrained, **options)
    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"{_get_card(name).description or name}\n\nArguments: see zoo.get_model."
    return load


globals().update({name: _entry_point(name) for name in _list_models()})
