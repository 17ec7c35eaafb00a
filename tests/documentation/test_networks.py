"""The page of the networks that work is what its command writes, and says what is so."""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import pytest
from networks_as_written import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "networks.md"
_specification = importlib.util.spec_from_file_location("networks_page", PAGE.with_suffix(".py"))
generate = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(generate)
FOUND = json.loads(PAGE.with_name(f"networks_{version('spikingjelly')}.json").read_text("utf-8"))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED_AGAIN)
def test_a_part_of_the_page_is_found_again(name):
    if name not in ROWS:
        pytest.skip("not in this release's zoo")
    assert generate.tried(ROWS[name]) == FOUND[name]
