"""What a gallery shows is true: images in their ball, predictions, and where both runs part."""

import base64

import matplotlib.image
import pytest
import torch
from attacks.moving_bars import moving_bars, spiking_model
from evaluation.reports import over_eps, report
from evaluation.test_page import Page
from spikingjelly.activation_based import neuron
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sj_robust.attacks import ThreatModel
from sj_robust.classifier import PoissonEncoder, SpikingClassifier
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import gallery
from sj_robust.evaluation.report import pictures
from sj_robust.models import pretrained
from sj_robust.perturbation import spike_traces
from sj_robust.training import Journal


@pytest.fixture(scope="module")
def model():
    return pretrained("digits/lif")


@pytest.fixture(scope="module")
def images():
    return next(iter(image_loader(load_images("digits").test, 40)))


@pytest.fixture(scope="module")
def shown(model, images):
    return gallery(model, *images, eps="0.1", count=3)


@pytest.mark.parametrize("eps", [0.1, ThreatModel("L2", 0.8)])
def test_images_lie_in_the_ball_and_are_read_as_shown(eps, model, images):
    found = gallery(model, *images, eps=eps, estimator="atan:4", count=20)
    assert found.threat == (eps if isinstance(eps, ThreatModel) else ThreatModel("Linf", eps))
    assert found.threat.contains(found.x, found.x_adv).all()
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    with torch.no_grad():
        seen = model(found.x).argmax(1)
        assert torch.equal(seen, found.predicted)
        seen = model(found.x_adv).argmax(1)
        assert torch.equal(seen, found.predicted_adv)
    assert torch.equal(found.predicted, found.labels), "only what is right is attacked"
    fooled = found.predicted_adv != found.labels
    assert fooled.any()
    assert torch.equal(fooled, fooled.sort(descending=True, stable=True).values), (
        "what fools comes first"
    )
    assert f"{int(fooled.sum())} of {len(fooled)} images" in repr(found)


def test_classes_have_their_names(model, images):
    names = [f"digit {number}" for number in range(10)]
    found = gallery(model, *images, eps=0.1, count=2, class_names=names)
    titles = [axes.get_title() for axes in found.plot().axes]
    shown = [*found.labels, *found.predicted_adv]
    assert titles[:4] == [names[int(label)] for label in shown]
    assert f"| {titles[0]} | {titles[0]} | {titles[2]} |" in found.table()


def test_an_attack_that_changes_nothing_breaks_nothing_of_a_network_that_draws():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 10), neuron.IFNode(step_mode="m"))
    model = SpikingClassifier(net, T=2, encoder=PoissonEncoder()).eval()
    x = torch.rand(40, 1, 8, 8)
    y = model(x).argmax(1)
    for draws in (None, 3):
        found = gallery(model, x, y, eps=1e-6, count=40, draws=draws)
        assert torch.equal(found.predicted, found.labels)
        assert torch.equal(found.predicted_adv, found.labels)
        assert "no spike differs" in found.verdict
    with pytest.raises(ValueError, match="the network draws random numbers"):
        gallery(model, x, y, eps=1e-6, draws=1)


def test_most_draws_decide_what_is_seen():
    noisy = Votes([[0, 0, 2], [1, 0, 2], [1, 2, 0], [1, 2, 0], [2, 0, 0]])
    y = torch.tensor([0, 0, 0])
    assert pictures._seen(noisy, torch.rand(3, 1), y, draws=5, seed=0).tolist() == [1, 0, 0]
    noisy.forwards = 0
    assert pictures._seen(noisy, torch.rand(3, 1), y, draws=2, seed=0).tolist() == [0, 0, 2]


class Votes(nn.Module):
    """Says in one forward after the other what it is told."""

    def __init__(self, votes):
        super().__init__()
        self.votes = votes
        self.forwards = 0

    def forward(self, images):
        said = torch.tensor(self.votes[self.forwards])
        self.forwards += 1
        return nn.functional.one_hot(said, 3).float()


def test_event_frames_stay_events():
    x, y = moving_bars(6, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = spiking_model().eval()
    with torch.no_grad():
        y = net(x).argmax(1)
    found = gallery(net, x, y, eps=10, count=2)
    assert found.threat.norm == "L0"
    seen = int((found.x_adv != found.x).flatten(1).sum(1).max())
    assert seen <= 10
    seen = set(found.x_adv.unique().tolist())
    assert seen <= {0.0, 1.0}
    assert len(found.plot().axes) == 6


def test_what_cannot_be_shown(model, images):
    x, _ = images
    with pytest.raises(ValueError, match="misclassifies all of these 40 images"):
        gallery(model, x, (model(x).argmax(1) + 1) % 10, eps=0.1)
    plain = gallery(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, torch.arange(40) % 10, eps=0.1
    )
    assert list(plain.figures()) == ["gallery"]
    with pytest.raises(ValueError, match="which must be 'images' for a network without neurons"):
        plain.plot("spikes")


def two_layers():
    """Threshold 1, no leak, weights 1: a layer passes on what it sums up."""
    net = nn.Sequential(
        neuron.IFNode(step_mode="m"), nn.Linear(2, 2, bias=False), neuron.IFNode(step_mode="m")
    )
    net[1].weight.data.copy_(0.5 * torch.eye(2))
    return net


def test_runs_part_at_the_first_spike_that_differs():
    x = torch.tensor([[0.5, 0.5], [0.2, 0.2], [0.3, 0.5]])  # spikes at steps 1 and 3, never, at 3
    x_adv = torch.tensor(
        [[0.5, 0.3], [0.2, 0.2], [0.4, 0.5]]
    )  # one neuron at 3 alone; as before; at 2
    found = spike_traces(two_layers(), x, x_adv, T=4)
    seen = [found.parting(sample) for sample in range(3)]
    assert seen == [("0", 1), None, ("0", 2)]
    assert "first diverge in layer 0 at step 1 (1 of 3 pairs)" in repr(found)
    assert "| 0 | 0.0 | 16.7 | 16.7 | 16.7 |" in found.table()
    for which in ("spikes", "potential"):
        titles = [axes.get_title(loc="left") for axes in found.plot(which).axes]
        assert titles == ["0\ndiverges at step 1", "2"]
        seen = [axes.get_title(loc="left") for axes in found.plot(which, sample=1).axes]
        assert seen == [
            "0",
            "2",
        ]
    (raster,) = found.plot(sample=2).axes[0].images
    drawn = raster.get_array().data.tolist()
    # Of both neurons, a clean and a perturbed half per step; 1 is clean only, 2 perturbed only.
    assert drawn == [[0, 0, 0, 0, 0, 2, 1, 0], [0, 0, 3, 3, 0, 0, 3, 3]]
    for wrong in ({"which": "all"}, {"sample": 3}):
        with pytest.raises(ValueError, match="must be"):
            found.plot(**wrong)


def test_a_notebook_shows_the_images_and_their_table(shown, monkeypatch):
    text = shown._repr_html_()
    _, _, picture = text.partition('src="data:image/png;base64,')
    assert base64.b64decode(picture.partition('"')[0]).startswith(b"\x89PNG")
    assert "<table><tr><th>spikes diverge in</th>" in text
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    assert "<img" not in shown._repr_html_()


@pytest.mark.slow
def test_the_page_holds_the_pictures_folded(shown, tmp_path):
    report(curve=over_eps()).page(tmp_path / "report.html", shown)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert text.count('<svg role="img"') == 6
    assert "<details><summary>Images under attack</summary><figure>" in text
    assert len(text) < 600_000


@pytest.mark.slow
def test_they_are_written_as_files_and_for_tensorboard(shown, tmp_path):
    names = report(curve=over_eps()).write(tmp_path, shown)
    expected = []
    for name in ("gallery", "spikes", "membrane"):
        expected += [f"{name}.png", f"{name}.pdf"]
    assert list(names[-6:]) == expected
    assert matplotlib.image.imread(tmp_path / "gallery.png").std() > 0.1
    Journal(tmp_path).show_gallery("mine", shown, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "mine")).Reload()
    assert events.Tags()["images"] == ["attack/gallery", "attack/spikes", "attack/membrane"]
    expected = []
    for name in shown.traces:
        expected += [f"potential/{name}", f"mppd/{name}"]
    assert events.Tags()["histograms"] == expected
    assert events.Histograms("mppd/stages.0.node")[0].step == 3
