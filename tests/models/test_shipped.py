"""The networks that come with the package are what their cards, the README and the page of results
say.
"""

import re
from pathlib import Path

import pytest
import torch
from lab.command_line import deciding, read_options

from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import pretrained, pretrained_networks
from sj_robust.models.shipped import pretrained_file

ROOT = Path(__file__).parents[2]
CARDS = pretrained_networks()


@pytest.fixture(scope="module")
def images():
    test = load_images("digits").test
    return next(iter(image_loader(test, 360)))


@pytest.mark.parametrize("name", [name for name in CARDS if name.startswith("digits/")])
def test_a_network_gets_right_what_its_card_says(name, images):
    x, y = images
    right = pretrained(name)(x).argmax(1) == y
    clean = float(right.sum()) / 3.6
    assert abs(clean - CARDS[name].clean) < 0.3, "one image, where rounding differs"


@pytest.mark.parametrize("name", CARDS)
def test_a_network_was_trained_by_the_command_of_its_card(name):
    import adv_train

    command = CARDS[name].command.replace(" recipes/", f" {ROOT}/recipes/")
    python, recipe, *words = command.split()
    assert python == "python"
    assert recipe == f"{ROOT}/recipes/adv_train.py"
    options = adv_train.completed(read_options(adv_train.Options, words))
    wanted = deciding(options)
    # Options that came since have their defaults.
    defaults = deciding(adv_train.completed(adv_train.Options()))
    assert defaults | from_checkpoint(Path(name)).options == wanted


def test_they_are_small_and_in_the_package():
    files = [pretrained_file(name) for name in CARDS]
    assert len(files) >= 4
    assert sum(file.stat().st_size for file in files) < 600_000
    expected = set(files[0].parents[1].glob("*/*"))
    assert set(files) == expected


def test_cards_tell_a_defended_network_from_an_undefended_one():
    lif = CARDS["digits/lif"]
    defended = CARDS["digits/dlif-at-mppd"]
    certified = CARDS["digits/dlif-certified"]
    assert lif.at_most < defended.at_most < certified.at_least
    assert certified.at_least <= certified.at_most <= certified.clean
    assert "of suite `standard`." in lif.verdict
    assert len(repr(lif)) < 1500
    assert "| command | python recipes/adv_train.py" in lif.table()


def test_names_are_checked():
    message = (
        "no pretrained network 'digits/dlif-certifed'; take one of digits/lif, .*; did you "
        "mean 'digits/dlif-certified'"
    )
    with pytest.raises(ValueError, match=message):
        pretrained("digits/dlif-certifed")
    read = from_checkpoint(Path("digits/lif")).model
    shipped = pretrained("digits/lif")
    assert torch.equal(read.net.first.weight, shipped.net.first.weight)


@pytest.mark.parametrize(
    ("page", "datasets"),
    [("README.md", "digits"), ("docs/results/pretrained.md", "digits|cifar10")],
)
def test_the_table_of_a_page_is_that_of_the_cards(page, datasets):
    row = rf"^\| (.+?) \| `((?:{datasets})/.+?)` \| (.+?) \| (.+?) \| (.+?) \|$"
    shown = re.findall(row, (ROOT / page).read_text(), re.M)
    expected = []
    for name, card in CARDS.items():
        if name.split("/")[0] in datasets:
            figures = [f"{value:.1f}" for value in (card.clean, card.at_most, card.at_least)]
            expected.append((card.summary, name, *figures))
    assert shown == expected
