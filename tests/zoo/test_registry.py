"""Cards: found by name, built, and rejected by name when malformed."""

import pytest

import zoo
from zoo.registry import Card

GOOD = """
architecture = "zoo.models.cifar_resnet:resnet20"
dataset = "cifar10"
num_classes = 10
[preprocessing]
image_size = 32
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


def test_every_card_builds_a_network_with_its_number_of_classes():
    names = zoo.list_models()
    assert "resnet20_cifar10" in names
    for name in names:
        card = zoo.get_card(name)
        assert list(card.build().parameters())[-1].shape == (card.num_classes, )


def test_patterns_and_unknown_names():
    assert zoo.list_models("resnet20*") == [n for n in zoo.list_models() if n.startswith("resnet20")] != []
    assert zoo.list_models("nothing*") == []
    with pytest.raises(ValueError, match="no zoo entry 'resnet2_cifar10'; did you mean: resnet20_cifar10"):
        zoo.get_card("resnet2_cifar10")


@pytest.mark.parametrize("text, message", [
    (GOOD.replace('dataset = "cifar10"', ""), "dataset"),
    (GOOD + "size = 3", "size"),
    ("colour = 1\n" + GOOD, "colour"),
    (GOOD.replace("[preprocessing]", "[preprocessing"), "Expected"),
    ("name = 3", "unknown entry name"),
])
def test_malformed_cards_are_named(text, message):
    assert Card.from_toml("good", GOOD).preprocessing.image_size == 32
    with pytest.raises(ValueError, match=f"zoo card 'bad' is malformed.*{message}"):
        Card.from_toml("bad", text)
