"""The stress test: what is counted, its intervals, its file, and a run that goes on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.reports import stress_report
from evaluation.suite_run import batches, classifier, images
from torch import nn
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.core.checks import check_images
from sj_robust.evaluation import Corruption, Fault, Report, faulty, stress
from sj_robust.evaluation.assess import stress_network
from sj_robust.evaluation.intervals import repeated_interval, wilson_interval
from sj_robust.evaluation.report.levels import Level, intact, kinds, levels
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run import faults, loop
from sj_robust.evaluation.run.faults import CORRUPTIONS
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.subject import Subject

LINF = ThreatModel("Linf", 0.2)
FEW = [Fault("weight_bits", 3), Fault("stuck_at_zero", 0.3), Fault("lost_spikes", 0.5)]


def test_counts_clean_and_attacked(margins):
    faults = [Fault("weight_bits", 4), Fault("stuck_at_zero", 1.0)]
    report = stress(*margins, eps=0.2, faults=faults, draws=2, progress=False)
    assert intact(report) == Level("none", 0, (4,), (2,), 5)  # of margins 0.5 and 0.7
    as_before, tied = levels(report)
    expected = Level("weight_bits", 4, (4,), (2,), 5)
    assert as_before == expected
    assert tied == Level("stuck_at_zero", 1.0, (5, 5), (5, 5), 5)  # a tie names the first class


def test_the_attack_sees_the_faulty_network(monkeypatch):
    attacked = []
    true = loop.crafted

    def spied(network, *arguments, **options):
        attacked.append(network)
        return true(network, *arguments, **options)

    monkeypatch.setattr(loop, "crafted", spied)
    model = classifier()
    options = {"faults": FEW[1:2], "draws": 2, "steps": 1, "seed": 4, "progress": False}
    with unchanged(model):
        stress(model, *images(6), eps=0.1, **options)
    first, *others = attacked
    assert first is model
    wanted = [faulty(model, FEW[1], seed=4 * 2**10 + draw).net.parts[0].weight for draw in (0, 1)]
    found = [one.net.parts[0].weight for one in others]
    assert all(map(torch.equal, found, wanted))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_the_network_is_as_it_was(tmp_path):
    model = classifier()
    few = [*FEW, Fault("first_steps", 1)]
    asked = Request("stress", LINF, "made up", faults=few, draws=2, steps=2)
    subject = Subject("mine", model, "two layers")

    def run(folder=None, on_step=None, **changes):
        watch = Watch(on_step=on_step)
        request = replace(asked, folder=folder, watch=watch, **changes)
        return stress_network(subject, batches(), request)

    whole = run()
    found = [len(level.clean) for level in levels(whole)]
    assert found == [1, 2, 2, 1]

    def stops(position):
        if position.done == 21:
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run(tmp_path, stops)
    files = [path for path in tmp_path.rglob("*.jsonl") if path.stat().st_size]
    done = {path: path.read_bytes() for path in files}
    places = {path.parent.name for path in done}
    assert places == {"none", "weight_bits-3", "stuck_at_zero-0.3-draw0"}
    resumed = run(tmp_path)
    found = [without_time(row) for row in resumed.rows]
    expected = [without_time(row) for row in whole.rows]
    assert found == expected
    for path, text in done.items():
        assert path.read_bytes().startswith(text)
    with pytest.raises(ValueError, match="seed changed"):
        run(tmp_path, seed=1)


def without_time(row):
    return replace(row, seconds=0.0)


def test_levels_that_differ_in_the_seventh_digit_are_kept_apart(tmp_path, margins):
    faults = [Fault("stuck_at_zero", level) for level in (0.2, 0.2 + 1e-9)]
    options = {"eps": 0.2, "draws": 1, "steps": 1, "progress": False, "folder": tmp_path}
    stress(*margins, faults=faults[:1], **options)
    stress(*margins, faults=faults, **options)
    assert len(list(tmp_path.glob("stuck_at_zero-*"))) == 2


def test_what_cannot_be_measured_is_named():
    net = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(16, 3)), T=2)
    faults = [Fault("lost_spikes", 0.1), Fault("first_steps", 1)]
    report = stress(net, *images(4), eps=0.1, faults=faults, draws=1, progress=False)
    assert kinds(report) == ("first_steps",)
    (said,) = report.warnings
    assert said.startswith("lost_spikes:0.1 was not measured: a fault of spikes needs SpikingJelly")
    assert said in report.table()


@pytest.mark.parametrize("suite", ["stress", "corruptions"])
def test_a_report_on_which_nothing_was_measured_can_be_shown(suite, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `recipes`")
    report = stress_report(suite, rows=stress_report().rows[:2])
    assert "No fault was measured." in repr(report)
    assert report.table().count("\n") == 2
    report.write(tmp_path)
    assert Report.load(tmp_path / "card.json") == report


def test_the_first_level_that_is_5_points_lower():
    report = stress_report()
    assert report.fall("clean") == {"lost_spikes": 0.2, "weight_bits": None}
    assert report.fall("attacked", points=1.0) == {"lost_spikes": 0.1, "weight_bits": 4}
    assert (
        "clean: 91.0 % without faults, 5 points lower at lost_spikes 0.2, never 5 points lower "
        "under weight_bits; " in report.verdict
    )
    table = report.table().splitlines()
    assert table[2].startswith("| none |  | 91.0 |")
    assert [line for line in table if "lost_spikes | 0.2 | 83.0 * |" in line]
    with pytest.raises(KeyError, match="no kind 'rust' in this report; it has lost_spikes"):
        report.mean_accuracy("clean", "rust")


def test_its_files_and_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `recipes`")
    report = stress_report()
    assert report.write(tmp_path) == ("card.json", "card.md", "card.png", "card.pdf")
    assert Report.load(tmp_path / "card.json") == report
    first, second = report.plot().axes[:2]
    found = [axes.get_title() for axes in (first, second)]
    assert found == ["lost_spikes", "weight_bits"]
    assert first.lines[0].get_ydata() == pytest.approx([89.0, 83.0])
    found = [label.get_text() for label in first.get_xticklabels()]
    assert found == ["0.1", "0.2"]


def test_the_interval_covers_other_images_and_other_draws():
    """Of shares around 0.6 that differ from draw to draw, on 150 images, in 300 experiments."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        hard = draw.normal(0.0, 0.08, 5)  # of every draw, for all images
        luck = draw.uniform(size=150)
        low, high = repeated_interval([int((luck < 0.6 + one).sum()) for one in hard], 150)
        hits += low <= 0.6 <= high
    assert hits >= 285
    narrow, wide = (repeated_interval(counts, 100) for counts in ([60, 60], [50, 70]))
    assert narrow == pytest.approx(wilson_interval(60, 100))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


class TestCorruptions:
    def test_every_kind_severity_and_mean(self, monkeypatch):
        """With the library's place taken by one that darkens images the more, the higher the
        severity.
        """

        def corrupt(image, severity, corruption_name, seed=None):
            assert image.shape == (32, 32, 1)
            assert (seed is None) is (corruption_name not in ("impulse_noise", "glass_blur"))
            drawn = np.random.randint(1, 2)  # noqa: NPY002  as the library draws
            return (np.repeat(image, 3, 2) // (severity + drawn)).astype(np.uint8)

        monkeypatch.setattr(faults, "_library", lambda: corrupt)
        x, y = images(2)
        model = classifier()
        with unchanged(model):
            report = stress(model, x, y, eps=0.01, steps=1, suite="corruptions", progress=False)
        assert kinds(report) == CORRUPTIONS
        assert len(levels(report)) == 75
        counts = [level.clean[0] for level in levels(report, "fog")]
        assert report.mean_accuracy("clean", "fog") == pytest.approx(sum(counts) / 10)
        assert f"mean of all |  | {100 * report.mean_accuracy('clean'):.1f} |" in report.table()
        assert "Mean over kinds and severities" in report.verdict
        dark = faults.corrupted(x, Corruption("fog", 3), seed=0)
        expected = (x * 255).round().div(4, rounding_mode="floor") / 255
        torch.testing.assert_close(dark, expected)

    @pytest.mark.slow
    def test_the_library(self):
        pytest.importorskip("imagecorruptions", reason="extra `corruptions`")
        x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        x = nn.functional.avg_pool2d(x, 5, 1, 2)
        for kind in CORRUPTIONS:
            state = repr(np.random.get_state())  # noqa: NPY002
            mild, severe, again = (
                faults.corrupted(x, Corruption(kind, level), seed=1) for level in (1, 5, 5)
            )
            assert repr(np.random.get_state()) == state, kind  # noqa: NPY002
            assert torch.equal(severe, again), kind
            assert torch.equal(
                severe[1:], faults.corrupted(x[1:], Corruption(kind, 5), seed=1, start=1)
            ), kind
            check_images(severe)
            assert not torch.equal(mild, severe), kind
        assert faults.corrupted(x[:, :1, :8, :8], Corruption("snow", 2), seed=1).shape == (
            3,
            1,
            8,
            8,
        )
