"""The trained networks are what their cards say; those that are not in the package are fetched."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from lab.command_line import deciding, read_options

from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import pretrained, pretrained_networks, shipped
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
    # The weights of a twin are trained without spikes.
    wanted = deciding(adv_train.twin_of(options) if options.mode == "twin_at" else options)
    # Options that came since have their defaults, and those that went since did nothing.
    defaults = deciding(adv_train.completed(adv_train.Options()))
    stored = from_checkpoint(Path(name)).options
    assert not any(value for option, value in stored.items() if option not in defaults)
    assert {option: stored.get(option, value) for option, value in defaults.items()} == wanted


def test_they_are_small_and_in_the_package():
    files = [pretrained_file(name) for name in INSIDE]
    assert len(files) >= 4
    assert sum(file.stat().st_size for file in files) < 3_200_000
    assert len(files) == len(CARDS) or shipped.RELEASE, "where the others are downloaded from"
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
    with pytest.raises(ValueError, match="did you mean 'digits/dlif-certified'"):
        pretrained("digits/dlif-certifed")


NAME = "digits/far"
CARD = CARDS["digits/lif"]
WHOLE = pretrained_file("digits/lif").read_bytes()
FILE = f"digits-far-{CARD.sha256[:8]}.pt"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that is asked for the file of a network that is not in the package."""
    card = asdict(CARD)
    del card["name"]
    (tmp_path / "cards.json").write_text(json.dumps({NAME: card}), encoding="utf-8")
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SJ_ROBUST_ASSETS", tmp_path.as_uri())
    return tmp_path


def assert_loaded():
    weights = pretrained(NAME).state_dict()
    assert torch.equal(weights["net.first.weight"], pretrained_weights["net.first.weight"])


pretrained_weights = pretrained("digits/lif").state_dict()


def test_a_network_that_is_not_in_the_package_is_downloaded_once(mirror, monkeypatch):
    with pytest.raises(OSError, match="SJ_ROBUST_ASSETS"):
        pretrained(NAME)
    (mirror / FILE).write_bytes(WHOLE[:-1])
    with pytest.raises(ValueError, match="SHA-256"):
        pretrained(NAME)
    (mirror / FILE).write_bytes(WHOLE)
    assert_loaded()
    assert [path.name for path in (mirror / "home" / "hub" / "sj_robust").iterdir()] == [FILE]
    (mirror / FILE).unlink()
    assert_loaded()
    monkeypatch.setenv("SJ_ROBUST_ASSETS", "")
    assert_loaded()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/assets", "nowhere", ""])
def test_without_a_server_the_file_can_be_put_there_by_hand(address, mirror, monkeypatch):
    monkeypatch.setenv("SJ_ROBUST_ASSETS", address)
    with pytest.raises(OSError, match="by hand") as refused:
        pretrained(NAME)
    Path(str(refused.value).rpartition("by hand: ")[2]).write_bytes(WHOLE)
    assert_loaded()


def test_a_cache_that_cannot_be_is_named(mirror):
    (mirror / "home").write_text("in the way")
    with pytest.raises(ValueError, match="TORCH_HOME"):
        pretrained(NAME)
