"""Zero-shot QAT: a low-bit student learns from its float teacher on images that a generator invents (arXiv 2503.18339)."""

from typing import TYPE_CHECKING

from granq_plugin.lazy import lazy_names
from granq_plugin.zero_shot.config import PRESETS, ZeroShotConfig, preset

if TYPE_CHECKING:  # for editors and type checkers
    from granq_plugin.zero_shot.generator import Generator
    from granq_plugin.zero_shot.recipe import ZeroShotResult, zero_shot_qat

__all__ = ["PRESETS", "Generator", "ZeroShotConfig", "ZeroShotResult", "preset", "zero_shot_qat"]

# settings are read (granq qat --help-config) without torch
__getattr__, __dir__ = lazy_names(__name__, {
    "Generator": "granq_plugin.zero_shot.generator",
    "ZeroShotResult": "granq_plugin.zero_shot.recipe",
    "zero_shot_qat": "granq_plugin.zero_shot.recipe",
})
