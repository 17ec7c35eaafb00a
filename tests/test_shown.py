"""Results show themselves: a sentence where they are printed, a table and a figure in a
notebook.
"""

from html import escape

import pytest
import torch
from evaluation.reports import DEAD, finding, over_eps, report
from spikingjelly.activation_based import neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier, compare_potentials, perturbation_gains, verify
from sj_robust.core.shown import new_figure

X = torch.tensor([[0.9, 0.1], [0.3, 0.2]])
LAYERS = 12


def deep(layers=LAYERS):
    net = nn.Sequential()
    for _ in range(layers):
        linear = nn.Linear(2, 2, bias=False)
        linear.weight.data.copy_(torch.eye(2))
        net.extend([linear, neuron.IFNode(step_mode="m")])
    return net.eval()


@pytest.fixture(scope="module")
def results():
    model = SpikingClassifier(deep(), T=12).eval()
    y = torch.tensor([0, 0])
    x_perturbed = X + 0.05
    return {
        "report": report(name="<mine>", verified=(7,), curve=over_eps()),
        "certificate": perturbation_gains(model, X, x_perturbed=x_perturbed),
        "verification": verify(model, X, y, 0.0625),
        "statistics": compare_potentials(model, X, x_perturbed),
    }


RESULTS = ("report", "certificate", "verification", "statistics")


@pytest.mark.parametrize("name", RESULTS)
def test_short_where_printed_and_a_table_in_a_notebook(results, name):
    result = results[name]
    assert result.verdict in repr(result)
    assert len(repr(result)) < 1500
    html = result._repr_html_()
    assert html.count("<table>") == 1
    assert html.count("</table>") == 1
    sentence = result.verdict.partition(";")[0]
    assert html.count(escape(sentence)) == 1, "said once"
    assert "| ---" not in html


def test_the_verdict_of_a_report_has_a_bracket_the_attacks_and_caveats(results):
    assert results["report"].verdict == (
        "Robust accuracy is between 10.0 % (proved) and 30.0 % (95 % CI 10.8 to 60.3; 10 images, "
        "Linf 0.1). Quick check: 5 attacks of suite `fast`. No sign of gradient masking (2 checks)."
    )
    findings = (finding("flat_loss", passed=False), finding("zero_gradients"))
    failed = report(findings=findings, suite="mine")
    end = "of suite `mine`. Signs of gradient masking: flat_loss (1 of 2 checks)."
    assert failed.verdict.endswith(end)
    dead = report(firing=(DEAD,))
    assert "DEAD LAYER; no sign of gradient masking" in dead.verdict
    not_looked_for = report(findings=())
    assert not_looked_for.verdict.endswith("`fast`. Gradient masking was not checked.")


def test_the_verdict_of_statistics_says_where_the_potential_moved_least_and_most():
    # Both neurons of the second layer get the same spike in either run.
    x = torch.tensor([[1.25, 0.5]])
    stats = compare_potentials(deep(2), x, x + 0.25, T=1)
    expected = "2 spiking layers, T = 1, 1 pair of inputs; MS-MPPD from 0 (3) to 0.0625 (1)"
    assert stats.verdict == expected


def test_a_layer_that_never_fires_is_named_and_long_tables_are_cut():
    with pytest.warns(UserWarning, match="1, 3, 5.* never fired, .* check the weights") as caught:
        stats = compare_potentials(deep(), 0 * X, 0 * X, T=12)
    assert caught[0].filename == __file__
    assert "NEVER FIRED" in stats.verdict
    assert stats.table().count("\n| ") == 11  # head, marks, 8 layers and what is left out
    deepest = compare_potentials(deep(40), X, X + 0.05, T=12)
    assert len(deepest._repr_html_()) < 6000


def test_a_notebook_shows_a_figure_as_a_picture():
    assert new_figure(1, 1)._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_figures_of_a_report(results, tmp_path):
    whole = results["report"]
    axes, *_ = whole.plot().axes
    assert axes.get_ylabel() == "accuracy, %"
    axes, *_ = whole.plot("potential").axes
    assert axes.get_title().startswith("apgd_ce/atan:4/r0")
    assert whole.plot("attacks", tmp_path / "a.pdf").axes
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    partial = report(potential=())
    with pytest.raises(ValueError, match="which must be one of attacks, got 'potential'"):
        partial.plot("potential")


@pytest.mark.slow
def test_figures_of_a_verification(results):
    verification = results["verification"]
    images, spikes, _ = verification.plot().axes
    found = sorted(images.lines[0].get_ydata())
    assert found == sorted(verification.margin)
    assert images.get_xlabel() == "images, sorted"
    assert spikes.get_xlabel() == "time step"
    layers = [label.get_text() for label in spikes.get_yticklabels()]
    assert layers == list(results["statistics"])


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["ms_mppd", "silent"])
def test_figures_of_statistics(results, statistic):
    stats = results["statistics"]
    axes, *_ = stats.plot(statistic).axes
    mesh = torch.as_tensor(axes.collections[0].get_array())
    rows = [getattr(layer, statistic) for layer in stats.values()]
    wanted = torch.stack(rows)
    assert_close(mesh.view_as(wanted), wanted)
    with pytest.raises(ValueError, match="got 'mppd'"):
        stats.plot("mppd")
