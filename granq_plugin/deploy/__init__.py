"""From a static model to integer accelerators: pre-scale folding, placement of quantizers, and the rules of FINN."""

from granq_plugin.deploy.finn import FinnReport, RuleResult, check_finn
from granq_plugin.deploy.finn_export import export_finn
from granq_plugin.deploy.folding import bake, fold
from granq_plugin.deploy.placement import prepare
from granq_plugin.deploy.ties import ClearedLayer, clear_ties

__all__ = [
    "ClearedLayer",
    "FinnReport",
    "RuleResult",
    "bake",
    "check_finn",
    "clear_ties",
    "export_finn",
    "fold",
    "prepare",
]
