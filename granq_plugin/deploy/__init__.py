"""From a static model to integer accelerators: pre-scale folding, placement of quantizers, and the rules of FINN."""

from granq_plugin.deploy.folding import bake, fold

__all__ = ["bake", "fold"]
