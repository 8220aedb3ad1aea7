"""What Brevitas's managers need to know about our proxies."""

from brevitas.export.inference.manager import InferenceManager

from granq_plugin.export.inference import (
    GranQDynamicInferenceHandler, GranQPerKernelWeightInferenceHandler, GranQStaticInferenceHandler)

__all__ = ["register_handlers"]


def register_handlers() -> None:
    """Append our handlers to Brevitas's managers; calling it again changes nothing. Importing ``granq_plugin`` calls it."""
    for handler in (GranQDynamicInferenceHandler, GranQStaticInferenceHandler, GranQPerKernelWeightInferenceHandler):
        if handler not in InferenceManager.handlers:
            InferenceManager.handlers.append(handler)
