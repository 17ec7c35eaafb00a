"""The page of the networks that work is what its command writes, and says what is so."""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import pytest
from networks_as_written import BOUNDED, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "networks.md"
_specification = importlib.util.spec_from_file_location("networks_page", PAGE.with_suffix(".py"))
generate = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(generate)
RELEASE = version("spikingjelly")
FOUND = json.loads(PAGE.with_name(f"networks_{RELEASE}.json").read_text("utf-8"))
RETURNS_TWO = {"SpikeDHS", "SpikeDHS, net(x)[0]"}
TRIED_AGAIN = [
    "loop over steps, mean",
    "potential of the last neuron returned",
    "Spikformer",
]


def test_the_page_holds_what_was_found_with_every_network_of_every_release():
    assert PAGE.read_text("utf-8") == generate.page(), "run python docs/results/networks.py"
    small = {name for name in ROWS if not name.startswith(generate.LARGE)}
    assert small <= set(FOUND) <= set(ROWS), "run python docs/results/networks.py"


def test_evaluate_and_compare_work_but_for_what_the_page_explains():
    explained = {"OTTTSpikingVGG", "SpikeDHS", "neurons written by hand, in a loop"}
    for name in FOUND.keys() - explained:
        assert FOUND[name]["evaluate"] == generate.YES, name
    of_unknown_decay = "SpikeDHS, net(x)[0]"
    for name in FOUND.keys() - explained - {of_unknown_decay}:
        assert FOUND[name]["compare"] == generate.YES, name


def test_intervals_prove_or_name_the_part_that_has_no_bounds():
    measured = json.loads(PAGE.with_name(f"measured_{RELEASE}.json").read_text("utf-8"))
    refused = {name for name, cells in measured.items() if cells["verify"].startswith("no")}
    assert refused <= {"SEWResNet, QIF", "SEWResNet, KLIF", "SNASNet, backward cells", *RETURNS_TWO}
    assert set(BOUNDED) - set(measured) <= {name for name in ROWS if name.startswith("S")}
    for name in refused - {"SNASNet, backward cells", *RETURNS_TWO}:
        assert "no bounds are known for" in measured[name]["verify"], name


def test_attacks_ran_on_every_network_of_the_zoo_or_the_reason_is_there():
    measured = json.loads(PAGE.with_name(f"measured_{RELEASE}.json").read_text("utf-8"))
    assert set(BOUNDED) <= set(measured)
    explained = {"OTTTSpikingVGG", "SpikeDHS"}
    for name, cells in measured.items():
        if name in explained:
            assert cells["fast"].startswith("no: "), name
        else:
            assert cells["fast"] in ("0 of 1", "1 of 1"), name


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED_AGAIN)
def test_a_part_of_the_page_is_found_again(name):
    if name not in ROWS:
        pytest.skip("not in this release's zoo")
    assert generate.tried(ROWS[name]) == FOUND[name]
