"""Zero-shot QAT: a low-bit student learns from its float teacher on images that a generator invents (arXiv 2503.18339)."""

from granq_plugin.zero_shot.config import PRESETS, ZeroShotConfig, preset
from granq_plugin.zero_shot.generator import Generator
from granq_plugin.zero_shot.recipe import ZeroShotResult, zero_shot_qat

__all__ = ["PRESETS", "Generator", "ZeroShotConfig", "ZeroShotResult", "preset", "zero_shot_qat"]
