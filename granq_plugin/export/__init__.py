"""Exported files: files that say what they are, whether they compute the same, what they cost."""

from granq_plugin.export.costs import report
from granq_plugin.export.files import read_metadata
from granq_plugin.export.onnx_export import export_qcdq, export_qonnx
from granq_plugin.export.ranges_plot import plot_ranges
from granq_plugin.export.verification import verify
from granq_plugin.handlers import register_handlers

__all__ = ["export_qcdq", "export_qonnx", "plot_ranges", "read_metadata", "register_handlers", "report", "verify"]
