"""Brevitas modules built on :mod:`granq_plugin.functional`: tensor quantizers, proxies, and the per-channel QuantTensor."""
