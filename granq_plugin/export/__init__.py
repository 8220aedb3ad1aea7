"""Exported files: handlers for Brevitas's managers, files that say what they are, whether they compute the same, what they cost."""

from importlib.util import find_spec

from granq_plugin.export.costs import report
from granq_plugin.export.files import read_metadata
from granq_plugin.export.onnx_export import export_qcdq, export_qonnx
from granq_plugin.export.ranges_plot import plot_ranges
from granq_plugin.export.verification import verify

__all__ = ["export_qcdq", "export_qonnx", "plot_ranges", "read_metadata", "register_handlers", "report", "verify"]


def register_handlers() -> None:
    """Append our handlers to Brevitas's managers; calling it again changes nothing. Importing ``granq_plugin`` calls it.

    ``brevitas.export``, its ``quant_inference_mode`` included, cannot be imported without onnx (the ``export`` extra): then there
    is nothing to register with.
    """
    if find_spec("onnx") is None:
        return
    from brevitas.export.inference.manager import InferenceManager
    from brevitas.export.onnx.qonnx.manager import QONNXManager
    from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
    from brevitas.export.torch.qcdq.manager import TorchQCDQManager

    from granq_plugin.export.handlers import QCDQ_HANDLERS, QONNX_HANDLERS, TORCH_HANDLERS
    from granq_plugin.export.inference import HANDLERS
    # the managers of the dynamo exporter share these lists
    for manager, handlers in ((InferenceManager, HANDLERS), (QONNXManager, QONNX_HANDLERS),
                              (StdQCDQONNXManager, QCDQ_HANDLERS), (TorchQCDQManager, TORCH_HANDLERS)):
        manager.handlers.extend(h for h in handlers if h not in manager.handlers)
