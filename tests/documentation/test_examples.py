"""The examples of every page run as they stand, or as a directive above them says."""

import pytest
from documentation.examples import pages_with_blocks, run_page
from documentation.pages import name_of


@pytest.mark.parametrize("page", pages_with_blocks(), ids=name_of)
def test_examples(page):
    run_page(page)
