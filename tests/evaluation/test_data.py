"""Images of an evaluation: read once, checked and hashed once, whatever a loader does later."""

import pytest
import torch
from evaluation import suite_run
from evaluation.suite_run import classifier, images
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sj_robust.evaluation.run import data as data_file
from sj_robust.evaluation.run.data import Data, given_data


class Changing:
    """A loader whose second batch is another one in every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        x, y = images(12)
        yield x[:6], y[:6]
        yield x[6:] / self.passes, y[6:]


def reused():
    """Batches that all lie in one tensor, as some loaders make them."""
    x, y = images(12)
    buffer = torch.empty(4, *x.shape[1:])
    for start in range(0, 12, 4):
        yield buffer.copy_(x[start : start + 4]), y[start : start + 4]


def same_images(data, x, y):
    found = data.tensors(torch.device("cpu"))
    return torch.equal(found[0], x) and torch.equal(found[1], y)


def test_a_loader_that_changes_is_read_once_and_counts_as_it_was():
    x, y = images(12)
    loader = Changing()
    suite = suite_run.members()[:4]
    changing = suite_run.suite_outcome(classifier(), loader, suite)
    assert loader.passes == 1
    steady = suite_run.suite_outcome(classifier(), [(x[:6], y[:6]), (x[6:], y[6:])], suite)
    assert suite_run.without_times(changing) == suite_run.without_times(steady)


@pytest.mark.parametrize("limit", [2**40, 3000, 0])
def test_images_are_copied_into_memory_or_a_file(monkeypatch, limit):
    monkeypatch.setattr(data_file, "_IN_MEMORY", limit)
    x, y = images(12)
    assert same_images(Data.of(reused()), x, y)
    for dtype in (torch.float64, torch.bfloat16):
        given = x.to(dtype)
        data = Data.of([(given[:5], y[:5]), (given[5:], y[5:])])
        assert data.sizes == (5, 7)
        assert data.labels == tuple(y.tolist())
        assert same_images(data, x.to(dtype), y)
        given.zero_()
        assert same_images(data, x.to(dtype), y)
        few = data.first(7)
        assert few.sizes == (5, 2)
        assert same_images(few, x[:7].to(dtype), y[:7])
        assert few.fingerprint == Data.of([(x[:7].to(dtype), y[:7])]).fingerprint


def test_whatever_holds_the_images_gives_the_same_data():
    x, y = images(12)
    forms = (
        (x, y),
        (TensorDataset(x, y), None),
        (DataLoader(TensorDataset(x, y), 5), None),
        ([(x[:3], y[:3]), (x[3:], y[3:])], None),
        (iter([(x, y, "more")]), None),
    )
    found = len({given_data(*form, 5).fingerprint for form in forms})
    assert found == 1
    assert given_data(x, y, 5).sizes == given_data(TensorDataset(x, y), None, 5).sizes == (5, 5, 2)


def test_empty_batches_are_left_out():
    x, y = images(12)
    wanted = Data.of([(x, y)])
    empty = (x[:0], y[:0])
    shapeless = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    for given in ([empty, (x, y)], [(x, y), empty], [shapeless, (x, y), shapeless]):
        data = Data.of(given)
        assert data.sizes == (12,)
        assert data.fingerprint == wanted.fingerprint
        assert same_images(data, x, y)
    with pytest.raises(ValueError, match="x must contain at least one image, got none"):
        Data.of([empty])


UNFIT = {
    "a smaller image": (
        lambda x: x[..., :-1],
        ValueError,
        r"batch 3 of x .*\[1, 4, 4\].*\[1, 4, 3\]",
    ),
    "more channels": (
        lambda x: x.repeat(1, 3, 1, 1),
        ValueError,
        r"batch 3 of x .*got \[3, 4, 4\]",
    ),
    "another precision": (
        lambda x: x.double(),
        ValueError,
        r"batch 3 of x .*float32.*got .*float64",
    ),
    "sparse": (lambda x: x.to_sparse(), TypeError, r"must be a dense tensor, got .*sparse_coo"),
    "no values": (lambda x: x.to("meta"), ValueError, r"must hold values, got .*meta"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_batch_that_does_not_fit_is_refused_where_it_is_read(what):
    change, error, text = UNFIT[what]
    x, y = images(12)
    other = change(x[8:])
    labels = y[8:].to(other.device)
    with pytest.raises(error, match=text):
        Data.of([(x[:4], y[:4]), (x[4:8], y[4:8]), (other, labels)])


class MixedSizes(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(1, 4, 4 + (index == 3)), index % 3


@pytest.mark.parametrize("given", [MixedSizes(), DataLoader(MixedSizes(), 4)])
def test_images_of_several_sizes_are_refused_by_name(given):
    with pytest.raises(ValueError, match=r"^x .* x\[3\]"):
        given_data(given, None, 5)


def test_a_resumed_run_of_other_images_is_told_about_loaders(tmp_path):
    def batches(seed):
        x, y = images(12)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        return [(x[order], y[order])]

    suite = suite_run.members()[:1]
    net = classifier()
    suite_run.suite_outcome(net, batches(0), suite, folder=tmp_path)
    with pytest.raises(ValueError, match=r"data changed.*shuffle=False"):
        suite_run.suite_outcome(net, batches(1), suite, folder=tmp_path)
