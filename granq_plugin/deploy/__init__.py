"""From a static model to integer accelerators: pre-scale folding, placement of quantizers, and the rules of FINN."""

from granq_plugin.deploy.folding import bake, fold
from granq_plugin.deploy.placement import prepare

__all__ = ["bake", "fold", "prepare"]
