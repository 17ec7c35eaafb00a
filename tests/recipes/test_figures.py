"""Figures: their numbers by hand, the same picture from the file again, and what the command says
of mistakes.
"""

from dataclasses import asdict
from shlex import split

import figures
import numpy as np
import pytest
import torch
from lab.command_line import read_options
from lab.figures.data import InputGains, input_gains, one_neuron, training_curves
from lab.figures.draw import load_figure
from matplotlib.image import imread
from oracle import dlif_forward
from perturbation.by_hand import eps_by_hand

from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.subject import Subject, from_checkpoint
from sj_robust.models import NetworkSpec, build_network
from sj_robust.perturbation.intensity import IntensityCorrelation
from sj_robust.training import save_checkpoint
from sj_robust.training.journal import EpochRecord

HISTORY = [
    EpochRecord(
        epoch,
        {"total": 2.0, "mppd": 0.3 / epoch},
        {"clean": 0.5, "fgsm": 0.2, "pgd": 0.1 * epoch},
        0.1,
    )
    for epoch in (1, 2, 3)
]
LIF = {"decay": 0.9, "v_threshold": 1.0, "v_reset": 0.0}
QUICK = split("--images 40 --eps 0.1 64/255 --steps 2 --resamples 3")


def checkpoint(folder, neuron="dlif", history=()):
    """A network as adv_train leaves it, but not trained."""
    spec = NetworkSpec(neuron=neuron, channels=(4, 4), T=3)
    torch.manual_seed(0)
    net = build_network(spec)
    folder.mkdir(parents=True)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    description = {"network": asdict(spec), "options": {"dataset": "digits"}}
    content = {
        "description": description,
        "model": state,
        "history": [asdict(record) for record in history],
    }
    for name in ("best.pt", "last.pt"):
        save_checkpoint(folder / name, content)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with one network."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint(folder / "dlif_at", history=HISTORY)
    curves = {"dlif at": [asdict(record) for record in HISTORY]}
    clean = Row("clean", "clean", (0,), (), variant="dlif at")
    report = Report("lif", "digits", "training", (0,), (clean,), curves=curves)
    report.save(folder / "report.json")
    return folder


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """Every figure of the run."""
    output = tmp_path_factory.mktemp("figures")
    figures.main([str(run), "--output", str(output), *QUICK])
    return output


@pytest.mark.parametrize("name", ["constant", "gaussian"])
def test_figure_1_is_the_recursion_by_hand(name):
    data = one_neuron(seed=5)
    assert data.settings == {
        "decay": 0.9,
        "v_threshold": 1.0,
        "current": 0.3,
        "shift": 0.1,
        "std": 0.3,
        "steps": 30,
        "seed": 5,
    }
    generator = torch.Generator().manual_seed(5)
    noise = (0.3 * torch.randn(30, 1, generator=generator, dtype=torch.float64)).flatten().tolist()
    x = np.full(30, 0.3)
    x_perturbed = x + np.array([0.1] * 30 if name == "constant" else noise)
    runs = [dlif_forward(a, np.ones(30), np.zeros(()), **LIF) for a in (x, x_perturbed)]
    (_, s, v), (_, s_perturbed, v_perturbed) = runs
    steps = np.arange(1, 31)
    expected = {
        "v": v,
        "v_perturbed": v_perturbed,
        "spike": s,
        "spike_perturbed": s_perturbed,
        "full": v - v_perturbed,
        "simplified": eps_by_hand(x, x_perturbed, 0.9, np.ones(30)).numpy(),
        "std": abs(s - s_perturbed).cumsum() / steps,
        "tasad": abs(s.cumsum() - s_perturbed.cumsum()) / steps,
    }
    assert (s != s_perturbed).any()
    assert data.cases[name].keys() == expected.keys()
    for series, values in expected.items():
        assert data.cases[name][series] == pytest.approx(values, abs=1e-12), series


@pytest.mark.slow
def test_one_command_draws_everything_as_pdf_and_png(drawn):
    names = ["curves", "gains", "intensity_dlif_at", "neuron"]
    found = {path.name for path in drawn.glob("*.pdf")}
    assert found == {f"{name}.pdf" for name in names}
    found = {path.name for path in drawn.glob("*.png")}
    assert found == {f"{name}.png" for name in names}
    for path in drawn.glob("*.pdf"):
        content = path.read_bytes()
        assert content.startswith(b"%PDF")
        bar = "intensity" in path.name  # its colours are a picture in every PDF of matplotlib
        assert b"/Subtype /Image" not in content or bar, f"{path.name} is not all vectors"


@pytest.mark.slow
def test_redraw_gives_the_same_pixels_from_the_files_alone(drawn, tmp_path, monkeypatch, capsys):
    for name in ("curves", "gains", "intensity_dlif_at"):
        (tmp_path / f"{name}.json").write_bytes((drawn / f"{name}.json").read_bytes())
    monkeypatch.setattr(figures, "from_checkpoint", None)  # nothing is to be computed
    figures.main(["--redraw", str(tmp_path)])
    again = sorted(tmp_path.glob("*.png"))
    assert len(again) == 3
    for picture in again:
        assert (imread(picture) == imread(drawn / picture.name)).all(), picture.name
        vectors = picture.with_suffix(".pdf")
        assert vectors.read_bytes() == (drawn / vectors.name).read_bytes()
    assert f"{tmp_path / 'gains.json'} drawn as gains.pdf, gains.png" in capsys.readouterr().out


@pytest.mark.slow
def test_numbers_are_those_of_the_run(run, drawn):
    gains = load_figure(drawn / "gains.json")
    assert list(gains.networks) == ["dlif_at"]
    for values in gains.networks["dlif_at"].values():
        assert values == [1.0] * 3
    expected = {"dlif at": [asdict(record) for record in HISTORY]}
    assert load_figure(drawn / "curves.json").networks == expected
    result = load_figure(drawn / "intensity_dlif_at.json")
    assert isinstance(result, IntensityCorrelation)
    assert result.directions == ("gaussian", "adversarial")
    assert result.samples + result.left_out == 40
    options = read_options(figures.Options, QUICK)
    assert figures.correlate(options, from_checkpoint(run / "dlif_at" / "best.pt")) == result


def test_history_of_a_run_without_report_is_that_of_its_checkpoints(tmp_path):
    checkpoint(tmp_path / "one", history=HISTORY)
    checkpoint(tmp_path / "two")
    expected = [asdict(record) for record in HISTORY]
    assert training_curves(tmp_path).networks == {"one": expected}
    assert training_curves(tmp_path / "one").networks == {"one": expected}


@pytest.mark.slow
def test_all_leaves_out_what_a_network_does_not_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "intensity", lambda options, folder: None)  # tried above
    checkpoint(tmp_path / "lif", neuron="lif", history=HISTORY)
    figures.main([str(tmp_path)])
    found = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert found == {
        "README",
        "neuron",
        "curves",
    }
    assert "gains skipped: no network has a DLIF neuron" in capsys.readouterr().out


def test_event_frames_are_not_perturbed():
    frames = Subject("gestures", torch.nn.Identity(), "", spec=NetworkSpec(frames=True))
    with pytest.raises(ValueError, match="gestures takes event frames"):
        figures.correlate(figures.Options(), frames)


def test_what_cannot_be_redrawn(tmp_path):
    path = tmp_path / "gains.json"
    InputGains({"mine": {"0": [1.0]}}).save(path)
    path.write_text(path.read_text().replace("sj_robust.figure", "sj_robust.figure.pie"))
    with pytest.raises(ValueError, match=r"gains\.json: not the numbers of a figure"):
        figures.main(["--redraw", str(tmp_path)])


def test_gains_of_networks_without_dlif_are_left_out():
    nets = {
        name: build_network(NetworkSpec(neuron=name, channels=(2, 2))) for name in ("dlif", "lif")
    }
    assert list(input_gains(nets).networks) == ["dlif"]
