"""The trained networks are what their cards, the README and the page of results
say.
"""

import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from lab.command_line import deciding, read_options

from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import assets, pretrained, pretrained_networks, shipped
from sj_robust.models.checkpoint import load_checkpoint
from sj_robust.models.shipped import pretrained_file
from sj_robust.models.weights import as_named_in
from sj_robust.proofs import verify

ROOT = Path(__file__).parents[2]
CARDS = pretrained_networks()
FOLDER = Path(shipped.__file__).with_name("trained")
INSIDE = [name for name in CARDS if (FOLDER / f"{name}.pt").exists()]
"""The others are downloaded."""


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


@pytest.mark.slow
def test_as_many_images_are_proved_as_the_card_says(images):
    name = "digits/dlif-certified"
    proved = verify(pretrained(name), *images, 0.1).verified
    assert f"{sum(proved) / 3.6:.1f}" == str(CARDS[name].at_least)


@pytest.mark.parametrize("name", INSIDE)
def test_a_network_is_that_of_its_card_bit_for_bit(name):
    content = pretrained_file(name).read_bytes()
    assert len(content) == CARDS[name].size
    assert sha256(content).hexdigest() == CARDS[name].sha256
    stored = load_checkpoint(pretrained_file(name))["model"]
    network = pretrained(name)
    for key, value in as_named_in(network, stored).items():
        used = network.state_dict()[key]
        assert torch.equal(used, value.to(used.dtype)), key
        if value.is_floating_point():
            assert used.dtype == torch.float32
    if "certified" in name:  # rounded before it was verified
        counters = {key for key in stored if key.endswith("num_batches_tracked")}
        assert {stored[key].dtype for key in stored.keys() - counters} == {torch.float16}


@pytest.mark.parametrize("name", INSIDE)
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
    files = [pretrained_file(name) for name in INSIDE]
    assert len(files) >= 4
    assert sum(file.stat().st_size for file in files) < 3_200_000
    assert len(files) == len(CARDS) or assets.RELEASE, "where the others are downloaded from"
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
        "no pretrained network 'digits/dlif-certifed'; choose one of digits/lif, .*; did you "
        "mean 'digits/dlif-certified'"
    )
    with pytest.raises(ValueError, match=message):
        pretrained("digits/dlif-certifed")
    read = from_checkpoint("digits/lif").model
    shipped = pretrained("digits/lif")
    assert torch.equal(read.net.first.weight, shipped.net.first.weight)


def test_pages_load_networks_that_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    named = re.findall(r'pretrained\("([^"]+)"\)', "".join(map(Path.read_text, pages)))
    assert named
    assert set(named) <= set(pretrained_networks())


@pytest.mark.parametrize(
    ("page", "datasets"),
    [
        ("README.md", "digits"),
        ("docs/results/pretrained.md", "digits|mnist|fashion_mnist|cifar10"),
    ],
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
