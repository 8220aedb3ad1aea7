"""The model zoo: networks found by name, their data, weights and evaluation. Entries are TOML cards in ``zoo/cards``."""

from zoo.registry import Card, get_card, get_model, list_models

__all__ = ["Card", "get_card", "get_model", "list_models"]
