"""What Brevitas's managers need to know about our proxies."""

from importlib.util import find_spec

__all__ = ["register_handlers"]


def register_handlers() -> None:
    """Append our handlers to Brevitas's managers; calling it again changes nothing. Importing ``granq_plugin`` calls it.

    ``brevitas.export``, its ``quant_inference_mode`` included, cannot be imported without onnx (the ``export`` extra): then there
    is nothing to register with.
    """
    if find_spec("onnx") is None:
        return
    from brevitas.export.inference.manager import InferenceManager

    from granq_plugin.export.inference import HANDLERS
    InferenceManager.handlers.extend(h for h in HANDLERS if h not in InferenceManager.handlers)
