"""Worst case over attacks and estimators: who attacks what, what counts, and what stays as it
was.
"""

from functools import partial

import pytest
import torch
from attacks.table import linear_model
from torch import nn

from sj_robust.attacks import SampleSeeds, ThreatModel, fgsm, pgd
from sj_robust.evaluation import Member, worst_case
from sj_robust.evaluation.run.member import crafted, fooled

EPS = 0.1
LINF = ThreatModel("Linf", EPS)
LINEAR = linear_model(36)


def seeds(n, start=0):
    return SampleSeeds(range(start, start + n))


def pgd_member(name="pgd", *, attack=(), **options):
    return Member(
        name,
        partial(pgd, **{"eps": EPS, "step_size": EPS / 3, "steps": 4} | dict(attack)),
        **options,
    )


class TestWorstCase:
    def test_a_later_member_attacks_only_what_stands_in_its_group(self, margins):
        model, x, y = margins
        groups = [("suite", 0.1), ("suite", 0.2), ("control", 0.1), ("", 0.3)]
        members = [
            Member(f"{group}{eps}", partial(fgsm, eps=eps), group=group) for group, eps in groups
        ]
        result = worst_case(model, x, y, members, seeds=seeds(5))
        seen = [row.seen for row in result.attacks]
        assert seen == [(0, 1, 2, 3), (1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]
        assert [row.fell for row in result.attacks] == [(0,), (1,), (0,), (0, 1, 2)]
        assert result.outcome == (0, 1, 3, -1, -2)
        assert result.standing("clean") == {0, 1, 2, 3}
        assert result.everything.accuracy == 1 / 5
        assert result.standing("suite0.2") == {2, 3}
        assert result.standing("control") == {1, 2, 3}
        with pytest.raises(KeyError, match="no figure 'nobody' in this report; it has suite0.1"):
            result.standing("nobody")

    def test_a_member_with_nothing_left_is_not_called(self, margins):
        members = [
            Member("everything", partial(fgsm, eps=0.4)),
            Member("not called", lambda *_, **__: 1 / 0),
        ]
        result = worst_case(*margins, members, seeds=seeds(5))
        assert result.attacks[1].seen == ()
        assert result.everything.accuracy == 0

    def test_never_above_the_best_single_member(self, digits):
        model, x, y = digits
        margin = {"loss": lambda z, t: -z.gather(1, t[:, None]).flatten()}
        members = [
            pgd_member(threat=LINF),
            pgd_member("pgd/r1", seed=1),
            pgd_member("margin", attack=margin),
        ]
        single = [worst_case(model, x, y, [m], threat=LINF).standing("everything") for m in members]
        together = worst_case(model, x, y, members, threat=LINF)
        # Each member's images are its own, whatever ran before.
        assert together.standing("everything") == frozenset.intersection(*single)
        assert 0 < together.everything.correct < together.clean.correct
        assert together.everything.correct <= min(map(len, single))
        assert (together.attacks[0].eps, together.attacks[1].eps) == (EPS, None)
        assert together.attacks[0].largest == pytest.approx(EPS)

    def test_seeds_decide_it_and_neither_batch_size_nor_the_other_samples(self, digits):
        model, x, y = digits
        members = [
            pgd_member("a", attack={"steps": 1}),
            pgd_member("b", attack={"restarts": 2}, seed=1),
        ]

        def fell(result):
            return [row.fell for row in result.rows]

        together, again, other = (
            worst_case(model, x, y, members, seeds=seeds(40, start)) for start in (0, 0, 100)
        )
        assert fell(together) == fell(again)
        assert fell(together) != fell(other)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        for rows in order.split(7):
            part = worst_case(model, x[rows], y[rows], members, seeds=seeds(40).rows(rows))
            expected = tuple(together.outcome[row] for row in rows.tolist())
            assert part.outcome == expected
            images = [
                crafted(model, x[few], y[few], members[0], seeds=seeds(40).rows(few)).x_adv
                for few in (rows, torch.arange(40))
            ]
            torch.testing.assert_close(images[0], images[1][rows], rtol=0, atol=1e-12)

    def test_no_members(self, digits):
        model, x, y = digits
        clean = worst_case(model, x, y, [])
        expected = float((model(x).argmax(1) == y).double().mean())
        assert clean.everything.accuracy == expected


class TestCraft:
    def test_restarts_and_names_have_their_own_random_starts(self, digits):
        model, x, y = digits
        one = {"attack": {"steps": 1}}
        members = [pgd_member("a", **one), pgd_member("a", seed=1, **one), pgd_member("b", **one)]
        images = [crafted(model, x, y, member, seeds=seeds(40)).x_adv for member in members]
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])
        expected = crafted(model, x, y, members[0], seeds=seeds(40)).x_adv
        assert torch.equal(images[0], expected)

    def test_an_attack_in_place_does_not_reach_the_callers_images(self, batch):
        x, y = batch
        before = x.clone()

        in_place = Member("zero", lambda model, x, y, *, generator: x.zero_())
        assert (crafted(LINEAR, x, y, in_place, seeds=seeds(7)).x_adv == 0).all()
        assert torch.equal(x, before)


class TestFools:
    class Coin(nn.Module):
        """Class 0 with the probability in the first pixel; draws from torch's global generator."""

        def forward(self, x):
            heads = torch.rand(len(x)) < x[:, 0]
            return torch.stack([heads.double(), (~heads).double()], 1)

    def test_a_stochastic_network_has_to_be_wrong_in_more_than_half_of_the_draws(self):
        x = torch.full((4000, 1), 0.7)
        y = torch.zeros(4000, dtype=torch.int64)
        for draws, expected in ((1, 0.3), (2, 0.09), (3, 0.216), (9, 0.0988)):
            wrong, again, other = (
                fooled(self.Coin(), x, y, draws=draws, seeds=seeds(4000, s)) for s in (0, 0, 1)
            )
            found = float(wrong.double().mean())
            assert found == pytest.approx(expected, abs=0.03)
            assert torch.equal(wrong, again)
            assert not torch.equal(wrong, other)

    def test_a_lucky_draw_of_the_attack_does_not_count(self):
        x = torch.full((2000, 1), 0.9)
        y = torch.zeros(2000, dtype=torch.int64)
        member = Member("idle", lambda model, x, y, *, generator: x)
        hits = []
        for draws in (1, 4):
            found = worst_case(self.Coin(), x, y, [member], threat=LINF, draws=draws)
            hits.append(len(found.attacks[0].fell) / 2000)
        assert hits[0] == pytest.approx(0.09, abs=0.03)  # right at first, wrong when scored
        assert hits[1] < 0.005

    def test_a_network_is_asked_until_every_image_is_decided(self):
        sizes = []

        def model(x):
            sizes.append(len(x))
            return x

        assert not fooled(model, torch.eye(2), torch.arange(2), draws=3, seeds=seeds(2)).any()
        assert sizes == [2, 2]

    def test_agrees_with_argmax_of_the_network_in_evaluation_mode(self, model, batch):
        x, y = batch
        wrong = fooled(model.train(), x, y, draws=2, seeds=seeds(7))
        for module in model.modules():
            assert module.training
        expected = model.eval()(x).argmax(1) != y
        assert torch.equal(wrong, expected)
