import re

import pytest
from attacks.misuse import MISUSE as OF_ATTACKS
from evaluation.misuse import MISUSE as OF_EVALUATIONS
from misuse_rooms import MISUSE


@pytest.mark.parametrize("row", [*MISUSE, *OF_ATTACKS, *OF_EVALUATIONS], ids=str)
def test_a_misuse_is_refused_by_the_name_of_its_argument(row):
    with pytest.raises(row.error, match=rf"(?<!\w){re.escape(row.named)}(?!\w)"):
        row.call(**row.changes)
