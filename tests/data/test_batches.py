import pytest
import torch
from torch.utils.data import TensorDataset

from sj_robust.data import ShuffledBatches, image_loader


def at_epoch(epoch, first_batch=0, **kwargs):
    batches = ShuffledBatches(23, 4, **{"seed": 5} | kwargs)
    batches.epoch, batches.first_batch = epoch, first_batch
    return list(batches)


def test_an_epoch_shows_every_image_at_most_once_and_the_next_another_order():
    first, second = at_epoch(0), at_epoch(1)
    assert [len(batch) for batch in first] == [4] * 5
    assert len({index for batch in first for index in batch}) == 20
    assert first != second
    assert first == at_epoch(0)
    assert first != at_epoch(0, seed=6)


def test_an_epoch_continues_at_any_batch():
    assert at_epoch(3)[2:] == at_epoch(3, first_batch=2)


def test_processes_share_the_same_global_batches():
    shares = [at_epoch(1, rank=rank, processes=2) for rank in range(2)]
    for whole, *parts in zip(at_epoch(1), *shares, strict=True):
        assert {len(part) for part in parts} == {2}
        assert sorted(whole) == sorted(index for part in parts for index in part)


def test_a_loader_leaves_the_global_random_state_alone():
    dataset = TensorDataset(torch.arange(23.0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    images = [x for (x,) in image_loader(dataset, ShuffledBatches(23, 4, seed=5))]
    assert torch.equal(before, torch.get_rng_state())
    assert [image.int().tolist() for image in images] == at_epoch(0)
    assert torch.cat([x for (x,) in image_loader(dataset, 5)]).tolist() == list(range(23))


def test_wrong_use():
    with pytest.raises(ValueError, match="number of training images, 23; got 24"):
        ShuffledBatches(23, 24, seed=0)
    with pytest.raises(ValueError, match="multiple of the number of processes, 3"):
        ShuffledBatches(23, 4, seed=0, processes=3)
