"""A network of one's own in one call: what it takes, what it leaves as it was, and what a stop
leaves behind.
"""

from contextlib import contextmanager

import pytest
import torch
from evaluation.suite_run import Net, classifier, images
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unchanged import unchanged

import sj_robust
from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import own_network
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.subject import Subject

T = 3
FEW = 6
NORMAL = {"mean": [0.3], "std": [0.5]}


def lif(mode):
    net = nn.Sequential(
        layer.Flatten(),
        layer.Linear(16, 8),
        neuron.LIFNode(detach_reset=True, v_threshold=0.1),
        layer.Linear(8, 3),
    )
    functional.set_step_mode(net, mode)
    return net


class Frames(nn.Module):
    """Takes [T, N, 2, 4, 4] and counts the events of each column."""

    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode(step_mode="m")

    def forward(self, x_seq):
        return self.node(x_seq.sum((2, 3)))


@pytest.fixture
def asked(monkeypatch):
    """What the evaluation is asked for, in place of it."""
    calls = []

    def recorded(subject, batches, request):
        labels = torch.cat([batch[1] for batch in batches])
        with torch.no_grad():
            logits = torch.cat([subject.model(batch[0]) for batch in batches])
        calls.append((subject, logits, labels, request))

    monkeypatch.setattr(own_network, "assess", recorded)
    return calls


def test_every_form_of_network_becomes_the_same_function(asked):
    torch.manual_seed(0)
    x, y = images(FEW)
    multi, single = lif("m"), lif("s")
    single.load_state_dict(multi.state_dict())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    wanted = SpikingClassifier(multi, T, **NORMAL).eval()(x)
    for net, options, logits in (
        (multi, {"T": T} | NORMAL, wanted),
        (single, {"T": T} | NORMAL, wanted),
        (SpikingClassifier(multi, T, **NORMAL), {}, wanted),
        (plain, NORMAL, plain((x - 0.3) / 0.5)),
        (plain, {}, plain(x)),
    ):
        sj_robust.evaluate(net, x, y, eps=0.1, progress=False, **options)
        torch.testing.assert_close(asked[-1][1], logits)
    assert {call[0].architecture for call in asked} == {"Sequential"}
    assert asked[-1][0].model is plain


def test_every_form_of_images_is_the_same_evaluation(asked):
    x, y = images(FEW)
    net = classifier()
    data = TensorDataset(x, y)
    for given in ((x, y), (data,), (DataLoader(data, 4),), ([(x[:2], y[:2]), (x[2:], y[2:])],)):
        options = {"batch_size": 5, "seed": 4, "rounds": 2, "progress": False}
        sj_robust.evaluate(net, *given, eps="8/255", **options)
        _, logits, labels, request = asked[-1]
        assert labels.tolist() == y.tolist()
        torch.testing.assert_close(logits, net.eval()(x))
        assert request.threat == ThreatModel("Linf", 8 / 255)
        assert (request.suite, request.classes, request.seed) == ("standard", 3, 4)
        assert request.rounds == 2


def test_event_frames_are_known_by_their_shape(asked):
    frames = (torch.rand(FEW, T, 2, 4, 4) > 0.5).float()
    sj_robust.evaluate(Frames(), frames, torch.arange(FEW) % 4, eps=5, T=T, progress=False)
    subject, logits, _, request = asked[-1]
    torch.testing.assert_close(logits, Frames()(frames.transpose(0, 1)).mean(0))
    assert type(subject.model).__name__ == "SpikingEventClassifier"
    assert (request.threat, request.suite) == (ThreatModel("L0", 5), "events")


def test_wrong_use_says_what_to_do():
    x, y = images(FEW)
    for arguments, options, message in (
        ((classifier(), x, y), {"T": 4}, "T must be the classifier's 3 or None, got 4"),
        ((classifier(), x, y), {"mean": [0.5]}, "has its own mean and std"),
        ((classifier(), x, y), {"rounds": 2, "suite": "paper"}, "suite 'paper' is run once"),
        (
            (Frames(), torch.ones(2, T, 2, 4, 4), y[:2]),
            {"T": T, "std": [1.0], "eps": 5},
            "event frames are not normalised",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sj_robust.evaluate(*arguments, **{"eps": 0.1, "progress": False} | options)


@pytest.mark.parametrize(
    ("eps", "radii", "threat"),
    [
        ("8/255", (), ThreatModel("Linf", 8 / 255)),
        ([0.2, "0.1", 0.2], (0.1, 0.2), ThreatModel("Linf", 0.2)),
        ([ThreatModel("L2", 0.5), ThreatModel("L2", 0.2)], (0.2, 0.5), ThreatModel("L2", 0.5)),
    ],
)
def test_what_is_given_reaches_the_request(eps, radii, threat, asked):
    sj_robust.evaluate(lif("m"), *images(FEW), eps=eps, T=T, progress=False, **NORMAL)
    request = asked[-1][3]
    given = {"T": T, "mean": (0.3,), "std": (0.5,), "decay": {}, "gain": {}}
    assert request.configuration == given
    assert (request.threat, request.radii) == (threat, radii)


class Quiet(neuron.LIFNode):
    def neuronal_charge(self, x):
        self.v = 0.9 * self.v + 0.5 * x


def test_what_is_said_of_neurons_stands_in_the_report(asked):
    net = nn.Sequential(nn.Flatten(2), Quiet(step_mode="m"))
    given = {"decay": {Quiet: 0.9}, "gain": {Quiet: 0.5}, "T": T, "eps": 0.1, "progress": False}
    sj_robust.evaluate(net, *images(FEW), **given)
    configuration = asked[-1][3].configuration
    assert (configuration["decay"], configuration["gain"]) == ({"Quiet": 0.9}, {"Quiet": 0.5})


@pytest.mark.parametrize("eps", [["8/255", 0.1, 0.01], torch.tensor([0.01, 0.1, 8 / 255])])
def test_of_several_radii_the_largest_is_attacked(asked, eps):
    sj_robust.evaluate(lif("m"), *images(FEW), eps=eps, T=T, progress=False)
    request = asked[-1][3]
    assert (request.threat, request.radii) == (ThreatModel("Linf", 0.1), (0.01, 8 / 255, 0.1))


@pytest.mark.slow
def test_a_stop_leaves_the_network_as_it_was_and_the_next_call_goes_on(tmp_path, monkeypatch):
    x, y = images(FEW)
    net = Net()
    net.parts[2].eval()
    arguments = {"eps": 0.1, "T": T, "suite": "paper", "name": "mine"}
    stopped_at = []

    @contextmanager
    def stopping(progress):
        def step(position):
            stopped_at.append(position.member)
            if position.done == 3:
                raise KeyboardInterrupt

        yield Watch(on_step=step)

    with monkeypatch.context() as patch, unchanged(net):
        patch.setattr(own_network, "_shown", stopping)
        with pytest.raises(KeyboardInterrupt) as stopped:
            sj_robust.evaluate(net, x, y, folder=tmp_path / "kept", **arguments)
    assert "resumes from" in stopped.value.__notes__[0]
    done = (tmp_path / "kept" / "suite" / "batch-000000.jsonl").read_bytes()
    report = sj_robust.evaluate(net, x, y, folder=tmp_path / "kept", progress=False, **arguments)
    assert (tmp_path / "kept" / "suite" / "batch-000000.jsonl").read_bytes().startswith(done)
    assert (report.name, report.architecture) == ("mine", "Net")
    subject = Subject("mine", SpikingClassifier(net, T).eval(), "Net")
    whole = assess(subject, [(x, y)], Request("paper", ThreatModel("Linf", 0.1), "images", 3))
    for one, other in zip(report.rows, whole.rows, strict=True):
        assert (one.member, one.fell) == (other.member, other.fell)
    assert report.findings == whole.findings
