import os
import signal
from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from sj_robust.data import ShuffledBatches, image_loader


def at_epoch(epoch, first_batch=0, **kwargs):
    options = {"seed": 5} | kwargs
    batches = ShuffledBatches(23, 4, **options)
    batches.epoch = epoch
    batches.first_batch = first_batch
    return list(batches)


def test_an_epoch_shows_every_image_at_most_once_and_the_next_another_order():
    first = at_epoch(0)
    assert [len(batch) for batch in first] == [4] * 5
    assert len(set(chain(*first))) == 20
    assert first == at_epoch(0)
    assert first != at_epoch(1)
    assert first != at_epoch(0, seed=6)


def test_processes_share_the_same_global_batches_from_any_of_them_on():
    first = at_epoch(1, rank=0, processes=2)
    second = at_epoch(1, rank=1, processes=2)
    for whole, part, other in zip(at_epoch(1), first, second, strict=True):
        assert len(part) == 2
        assert len(other) == 2
        assert sorted(whole) == sorted(part + other)
    assert at_epoch(3)[2:] == at_epoch(3, first_batch=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_indices_of_any_batch(rank):
    whole = at_epoch(7, rank=rank, processes=2)
    batches = ShuffledBatches(23, 4, seed=5, rank=rank, processes=2)
    assert batches.indices(7, 3) == whole[3]
    assert batches.indices(7, 0) == whole[0]
    following = at_epoch(8, rank=rank, processes=2)
    assert batches.indices(8, 0) == following[0]
    batches.epoch = 7
    walk = iter(batches)
    first = next(walk)
    batches.indices(2, 1)  # asking for another epoch in between moves nothing
    assert [first, *walk] == whole
    with pytest.raises(IndexError, match="batch"):
        batches.indices(0, 5)


class Fatal(Dataset):
    """Its first image ends the process that loads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Wrong(Fatal):
    def __getitem__(self, index):
        raise RuntimeError("a mistake of one's own")


def test_a_killed_worker_is_an_error_that_says_so():
    with pytest.raises(ChildProcessError, match="workers"):
        list(image_loader(Fatal(), 2, workers=1))
    with pytest.raises(RuntimeError, match="a mistake of one's own"):
        list(image_loader(Wrong(), 2, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_follows_the_batches_and_leaves_the_global_random_state_alone(workers):
    dataset = TensorDataset(torch.arange(23.0))
    before = torch.get_rng_state()
    batches = ShuffledBatches(23, 4, seed=5)
    loader = image_loader(dataset, batches, workers=workers)
    for epoch, first_batch in ((0, 0), (1, 3), (2, 0)):
        batches.epoch = epoch
        batches.first_batch = first_batch
        seen = [x.int().tolist() for (x,) in loader]
        assert seen == at_epoch(epoch, first_batch)
        (x,) = next(iter(loader))
        assert len(x) == 4  # an epoch that is left early does not leak into the next
    in_order = [x for (x,) in image_loader(dataset, 5, workers)]
    assert torch.cat(in_order).tolist() == list(range(23))
    assert torch.equal(before, torch.get_rng_state())
