"""Sums of changed events, by the largest weights, by rows and by frames."""

import pytest
import torch
import torch.nn.functional as F
from proofs.event_balls import SHAPE, T, by_step, entering, extremes, frames, weights
from proofs.test_event_balls import MAPS
from torch.testing import assert_close

from sj_robust.proofs import changes
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import Flips, share_frames
from sj_robust.proofs.rules import Bounds


@pytest.mark.parametrize("name", MAPS)
def test_float32_sums_have_their_rounding_beside_changes(name):
    run = BoundedRun({}, 1)
    run.rounded = False
    run.narrow = True
    x = frames(1, *SHAPE)

    def function(z):
        source = weights()

        def in_float32(*shape):
            return source(*shape).float().double()

        return MAPS[name](by_step(z), in_float32)

    wide = entering(x, Flips(2))
    narrow = Bounds(x.float(), wide.radius.float(), run=run, changes=wide.changes)
    found = function(narrow)
    low, high = extremes(lambda z: function(z).unflatten(0, (-1, T)), x[0], Flips(2))
    assert found.radius.dtype == torch.float32
    assert found.changes is None
    assert (narrow + 0.1).changes is None
    assert (found.least.double() <= low).all()
    assert (found.most.double() >= high).all()
    rounded = function(Bounds(x.float(), torch.zeros_like(narrow.radius), run=run))
    assert (rounded.radius > 0).all()


def test_of_many_inputs_the_largest_weights_are_enough_or_all_are_looked_at(monkeypatch):
    x = frames(3, 1, 400, seed=4)
    kernel = weights()(5, 400)
    kernel[0] = kernel[0].abs() + 0.1
    largest = kernel[0].topk(150).indices
    x[0, :, largest] = 1  # which none of its largest weights can raise
    found = F.linear(entering(x, Flips(2)), kernel)
    monkeypatch.setattr(changes, "_CANDIDATES", 1000)
    whole = F.linear(entering(x, Flips(2)), kernel)
    assert torch.equal(found.most, whole.most)
    assert torch.equal(found.least, whole.least)


def test_of_many_inputs_a_single_one_may_gain_all_events():
    x = torch.zeros(1, 1, 400).double()
    kernel = weights()(5, 400)
    found = F.linear(entering(x, Flips(4, counts=True)), kernel)
    assert_close(found.most.flatten(), 4 * kernel.amax(1))
    assert_close(found.least.flatten(), 4 * kernel.amin(1))


def test_a_budget_between_two_integers_counts_the_next_change_in_part():
    x = frames(1, *SHAPE)
    ends = {}
    for budget in (0.0, 1.0, 1.25, 2.0):
        z = entering(x, Flips(budget)).flatten(0, 1)
        found = MAPS["convolution"](z, weights())
        ends[budget] = found.most
    between = 0.75 * ends[1.0] + 0.25 * ends[2.0]
    assert_close(ends[1.25], between)
    assert_close(ends[0.0], found.centre)


def test_steps_that_see_the_same_frames_are_noticed():
    x = frames(1, 2, 1, 2, 2)
    of_all_frames = weights()(3, 8)
    summed = F.linear(entering(x, Flips(1)).flatten(1), of_all_frames).changes
    assert share_frames([summed, summed])  # it is moved by several frames
    kernel = weights()(2, 1, 2, 2)
    one = F.conv2d(entering(x, Flips(1)).flatten(0, 1), kernel).changes
    assert not share_frames([one])
    assert share_frames([one, one])
