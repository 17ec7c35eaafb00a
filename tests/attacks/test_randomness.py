"""Seeds per sample: what is drawn for a sample follows from its seed alone."""

import pytest
import torch

from sj_robust.attacks import SampleSeeds
from sj_robust.core.randomness import _splitmix64, private_generator, rand, randn

SEEDS = SampleSeeds([11, 12, 13, 14, 15, 16, 17])
CPU = torch.device("cpu")


def test_splitmix64_equals_its_published_numbers():
    # The first outputs of the reference generator with state 0.

    step = 0x9E3779B97F4A7C15
    found = [_splitmix64(i * step % 2**64) for i in range(3)]
    assert found == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_derived_seeds_are_the_same_in_every_run():
    seeds = SampleSeeds([3, 5]).derived("apgd", 2)
    assert seeds == SampleSeeds([3206887339340167309, 2656427505460500988])


def test_other_labels_give_other_seeds():
    labels = [
        (),
        ("a",),
        ("b",),
        (1,),
        ("1",),
        (1, 2),
        (2, 1),
        ("a", 1),
        ("a", 2),
        (-1,),
    ]
    derived = []
    for label in labels:
        derived.extend(SEEDS.derived(*label).seeds)
    assert len(set(derived)) == len(labels) * len(SEEDS)
    assert min(derived) >= 0
    assert max(derived) < 2**62


def test_the_single_number_depends_on_every_seed_and_their_order():
    others = [SampleSeeds(s) for s in ([1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2], [1, 2, 3, 0], [])]
    assert len({seeds.single() for seeds in others}) == len(others)
    for seeds in others:
        assert 0 <= seeds.single() < 2**62


def test_rows_are_a_mask_or_indices():
    mask = torch.tensor([True, False, False, True, False, False, True])
    assert SEEDS.rows(mask) == SampleSeeds([11, 14, 17])
    found = SEEDS.rows(torch.tensor([3, 0]))
    assert found == SampleSeeds([14, 11])
    found = len(SEEDS.rows(torch.zeros(7, dtype=torch.bool)))
    assert found == 0
    assert SampleSeeds(torch.arange(11, 18)) == SEEDS


@pytest.mark.parametrize("draw", [rand, randn])
def test_draws_of_a_sample_do_not_depend_on_its_neighbours(draw):
    def drawn(seeds: SampleSeeds) -> torch.Tensor:
        private = private_generator(seeds, CPU)
        draws = [
            draw(
                (len(seeds), 2, 3),
                private,
                dtype=torch.float64,
                device=CPU,
            )
            for _ in range(2)
        ]
        return torch.stack(draws, 1)

    together = drawn(SEEDS)
    found = drawn(SEEDS.rows(torch.tensor([4, 1])))
    assert torch.equal(found, together[[4, 1]])
    assert (
        len(together.flatten().unique()) == together.numel()
    )  # other numbers per sample and per draw


def test_draws_have_the_moments_they_should():
    private = private_generator(SampleSeeds(range(400)), CPU)
    uniform = rand((400, 100), private, dtype=torch.float32, device=CPU)
    normal = randn((400, 100), private, dtype=torch.float32, device=CPU)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.03)
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)
