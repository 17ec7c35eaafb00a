"""Members that begin from what earlier ones made: which images they get, also after a kill."""

import logging
from functools import partial

import pytest
import torch
from covering import mostly_slow
from evaluation import suite_run
from evaluation.suite_run import EPS, THREAT

from sj_robust.attacks import ThreatModel, gaussian, pgd, spike_search
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation import Member
from sj_robust.evaluation.run import loop
from sj_robust.evaluation.run.member import crafted


class StopError(Exception):
    pass


class Seen(logging.Filterer):
    """Starts that came by; like a logger, it is no part of what an attack is."""

    def __init__(self):
        super().__init__()
        self.starts = []


def from_the_first(model, x, y, *, starts, generator, seen):
    """Returns the first start, and keeps all of them."""
    seen.starts.append(starts)
    return starts[0] if len(starts) else x


def members(seen):
    def step(eps):
        return partial(pgd, eps=eps, step_size=eps / 3, steps=3)

    wider = ThreatModel("Linf", 2 * EPS)
    begins = partial(from_the_first, seen=seen)
    return [
        Member("early", begins, threat=THREAT, takes_starts=True),
        Member("noise", partial(gaussian, std=EPS), group=""),
        Member("weak", step(EPS / 4), threat=ThreatModel("Linf", EPS / 4)),
        Member("far", step(2 * EPS), group="", threat=wider),
        Member("pgd", step(EPS), threat=THREAT),
        Member("other", step(EPS), group="control", threat=THREAT),
        Member("search", begins, threat=THREAT, takes_starts=True),
        Member("last", step(EPS), threat=THREAT, seed=1),
    ]


def test_a_search_over_spikes_that_nothing_precedes_finds_starts_of_its_own():
    model, (x, y) = suite_run.classifier(), suite_run.images()
    first = Member(
        "search",
        partial(spike_search, eps=EPS, forwards=100),
        threat=THREAT,
        takes_starts=True,
    )
    alone = crafted(model, x, y, first, seeds=SampleSeeds(range(len(y)))).x_adv
    assert (alone != x).any()


def test_it_gets_what_its_group_made_within_its_threat_and_clean_images_where_none_was_made():
    seen = Seen()
    x, y = suite_run.images()
    outcome = suite_run.outcome_of(size=20, suite=members(seen))
    rows = {row.member: row for row in outcome.rows}
    early, search = seen.starts
    assert early.shape == (0, len(rows["early"].seen), 1, 4, 4)
    left = list(rows["search"].seen)
    weak, near = search  # that of the early search is left to itself
    seeds = SampleSeeds(range(20)).derived("image", 3)
    for images, member in ((weak, members(Seen())[2]), (near, members(Seen())[4])):
        met = list(rows[member.name].seen)
        made = x.clone()
        made[met] = crafted(
            suite_run.classifier(), x[met], y[met], member, seeds=seeds.rows(torch.tensor(met))
        ).x_adv
        assert torch.equal(images, made[left])
    assert 0 < len(left) < 20


@pytest.fixture(scope="module")
def whole():
    """A run that nothing stops: what it finds, and the starts that came by."""
    seen = Seen()
    outcome = suite_run.outcome_of(size=10, suite=members(seen))
    return suite_run.without_times(outcome), seen.starts


STEPS = range(1, 9 * 2 + 1)
"""Two batches of eight members and the clean images."""


# quick: behind the first search, before and behind the second, and in the other batch
@pytest.mark.parametrize("step", mostly_slow(STEPS, quick=[2, 7, 8, 16]))
def test_stopped_anywhere_it_goes_on_with_the_same_starts(tmp_path, whole, step):
    def stops(position):
        if position.done == step:
            raise StopError

    expected, starts = whole
    seen = Seen()
    suite = {"size": 10, "suite": members(seen)}
    with pytest.raises(StopError):
        suite_run.outcome_of(tmp_path, on_step=stops, **suite)
    resumed = suite_run.outcome_of(tmp_path, **suite)
    assert suite_run.without_times(resumed) == expected
    assert len(seen.starts) == len(starts)
    assert all(map(torch.equal, seen.starts, starts))
    assert not list(tmp_path.glob("*.pt")), "a batch that is done needs no images"


def test_images_are_written_before_the_step_and_only_where_somebody_takes_them(
    tmp_path, monkeypatch
):
    order = []
    keep, append = loop.BatchLog.keep, loop.BatchLog.append

    def kept(log, number, images):
        keep(log, number, images)
        order.append(len(list(tmp_path.glob("*-step-*.pt"))))

    def appended(log, step):
        order.append(step.member)
        append(log, step)

    monkeypatch.setattr(loop.BatchLog, "keep", kept)
    monkeypatch.setattr(loop.BatchLog, "append", appended)
    suite_run.outcome_of(tmp_path, size=20, suite=members(Seen()))
    wanted = ["clean", 1, "early", 2, "weak", 3, "pgd", "search", "last"]
    assert order == [*wanted, "clean", "noise", "far", "clean", "other"]
    order.clear()
    suite_run.outcome_of(tmp_path / "other", size=20)
    assert not [one for one in order if isinstance(one, int)]


def test_outside_an_evaluation_it_begins_from_what_it_is_given():
    x, y = suite_run.images(3)
    member = members(Seen())[0]
    seeds = SampleSeeds(range(3))
    given = (x + EPS / 2).clamp(0, 1)[None]
    model = suite_run.classifier()
    assert torch.equal(crafted(model, x, y, member, seeds=seeds, starts=given).x_adv, given[0])
    assert torch.equal(crafted(model, x, y, member, seeds=seeds).x_adv, x)
