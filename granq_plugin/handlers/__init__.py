"""What our proxies become under Brevitas's own export managers and its ``quant_inference_mode``."""

from importlib.util import find_spec

__all__ = ["register_handlers"]


def register_handlers() -> None:
    """Append our handlers to Brevitas's managers; calling it again changes nothing. Importing ``granq_plugin.quantizers`` calls it:
    a model without our quantizers needs no handlers.

    ``brevitas.export``, its ``quant_inference_mode`` included, cannot be imported without onnx (the ``export`` extra): then there
    is nothing to register with.
    """
    if find_spec("onnx") is None:
        return
    from brevitas.export.inference.manager import InferenceManager
    from brevitas.export.onnx.qonnx.manager import QONNXManager
    from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
    from brevitas.export.torch.qcdq.manager import TorchQCDQManager

    from granq_plugin.handlers.export import QCDQ_HANDLERS, QONNX_HANDLERS, TORCH_HANDLERS
    from granq_plugin.handlers.inference import HANDLERS
    # the managers of the dynamo exporter share these lists
    for manager, handlers in ((InferenceManager, HANDLERS), (QONNXManager, QONNX_HANDLERS),
                              (StdQCDQONNXManager, QCDQ_HANDLERS), (TorchQCDQManager, TORCH_HANDLERS)):
        manager.handlers.extend(h for h in handlers if h not in manager.handlers)
