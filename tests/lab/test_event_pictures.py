"""Pictures of event frames: what breaks a sample alone, and files that can be looked at."""

from dataclasses import replace

import pytest
import torch
from lab.figures.event_drawings import animate_events, draw_events
from lab.figures.events import EventPictures, breaking_alone
from PIL import Image
from proofs.event_balls import SHAPE, all_of, frames, tiny

from sj_robust.proofs.changes import Flips
from sj_robust.proofs.moves import MovedEvents


@pytest.mark.parametrize(
    "ball", [Flips(2), Flips(2, True), MovedEvents(2, 1), MovedEvents(2, 2, True)]
)
def test_what_breaks_a_sample_alone(ball):
    broken = 0
    for seed in (6, 7, 17, 23):
        model = tiny(seed)
        for sample in frames(3, *SHAPE, seed=seed).float():
            label = model(sample[None]).argmax()
            every = all_of(replace(ball, budget=1), sample)
            touched = every[model(every).argmax(1) != label] - sample
            # a move is told by the event that it takes away
            expected = (touched < 0 if isinstance(ball, MovedEvents) else touched != 0).any(0)
            found = breaking_alone(model, sample, label, ball)
            assert torch.equal(found, expected)
            broken += int(found.sum())
    assert broken > 0


def test_counts_can_be_told_in_the_strip_and_the_animation(tmp_path):
    data = EventPictures(
        network="mine",
        threat="at most 3 events added or removed",
        shape=[2, 2, 4, 4],
        label=1,
        seen=[1, 0],
        clean=[[0, 0, 1, 1, 4.0], [0, 1, 2, 2, 1.0]],
        attacked=[[0, 0, 1, 1, 2.0], [0, 1, 2, 2, 2.0]],
        breaking=[[0, 0, 1, 1, 1.0]],
    )
    figure = draw_events(data)
    attacked = figure.axes[2]
    assert [text.get_text() for text in attacked.texts] == ["2"]  # two of four events are gone
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-1] == "breaks it alone"
    clean = figure.axes[0].images[0].get_array()
    assert clean[1, 1].sum() < clean[2, 2].sum()  # four events are darker than one
    animate_events(data, tmp_path / "attack.gif")
    with Image.open(tmp_path / "attack.gif") as animation:
        assert animation.n_frames == 2
        assert animation.width > 600
