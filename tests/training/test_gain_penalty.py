"""The gains of every epoch in the log of a run."""

import pytest
from accelerate.state import AcceleratorState
from training import small_run

from sj_robust.stability import l2_gain, peak_gain
from sj_robust.training import Journal


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)


class Keeping(Journal):
    def __init__(self):
        super().__init__(None)
        self.scalars = []

    def on_epoch(self, record, scalars, warning):
        self.scalars.append(scalars)


def test_gains_are_logged_every_epoch_and_move_with_training(tmp_path):
    journal = Keeping()
    _, classifier = small_run.run(tmp_path / "run", journal=journal, epochs=2)
    values = [scalars["l2_gain/parts.1"] for scalars in journal.scalars]
    assert len(values) == 2
    assert values[0] != values[1]
    node = classifier.net.parts[1]
    assert values[1] == pytest.approx(float(l2_gain(node.decay, 3, node.input_gain)), rel=1e-9)
    assert journal.scalars[1]["peak_gain/parts.1"] == pytest.approx(
        float(peak_gain(node.decay, 3, node.input_gain)), rel=1e-9
    )
