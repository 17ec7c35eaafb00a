"""What an installation must be able to do: ``python -I smoke.py EXPECTATION``, far from any source
tree.

The expectation is JSON, written by ``check_distribution.py``: the version, the folder that the
package is in, whether the compiled kernel and the extra ``recipes`` came along, and the public
names by module, with those modules that need no extra.
"""

import importlib
import json
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path


def check_names(expected):
    """Every public module that needs no extra imports alone, with all of its names."""
    import sj_robust

    path = Path(sj_robust.__file__)
    assert path.is_relative_to(expected["folder"]), f"{path} is not the installed package"
    assert sj_robust.__version__ == expected["version"]
    assert metadata.version("sj_robust") == expected["version"]
    assert resources.files("sj_robust").joinpath("py.typed").is_file()
    assert sj_robust.attacks.pgd, "a public module is reached from the package"
    for module, names in expected["names"].items():
        loaded = importlib.import_module(module)
        missing = [name for name in names if not hasattr(loaded, name)]
        assert not missing, f"{module} lacks {missing}"


def check_extra():
    """What needs the extra says so, with the command that installs it."""
    import sj_robust

    remedy = "pip install 'sj_robust[recipes]'"
    for name in ("training", "finetune"):
        try:
            getattr(sj_robust, name)
            said = "nothing, since this environment holds more than the package needs"
        except ModuleNotFoundError as error:
            said = str(error)
        assert remedy in said, f"without its extra, {name} says {said}"
    command = [sys.executable, "-I", "-m", "sj_robust"]
    done = subprocess.run([*command, "train"], capture_output=True, text=True, check=False)
    assert remedy in done.stderr, f"without its extra, sj-robust train says {done.stderr}"
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "sj-robust COMMAND" in done.stdout


def check_doctor(kernel):
    """The doctor finds the chosen backend equal to the reference: the compiled kernel when it came
    along.
    """
    import torch

    from sj_robust import DLIFNode, doctor
    from sj_robust.ops import available_backends

    doctor._main()  # exits where the two differ
    state = available_backends()["cpp"]
    assert state in doctor.report()
    assert (state == "available") == kernel, f"backend cpp: {state}"
    node = DLIFNode(T=4, step_mode="m")
    chosen = node.chosen_backend(torch.zeros(4, 2, 8))
    expected = "cpp" if kernel else "eager"
    assert chosen == expected, f"auto chose {chosen} of {available_backends()}"


def check_calls(training):
    """Every public call on one small network, of which none downloads or needs an extra but
    training.
    """
    import torch
    from spikingjelly.activation_based import functional, neuron
    from torch import nn

    import sj_robust
    from sj_robust import DLIFNode, MPPDMonitor, SpikingClassifier, replace_neurons
    from sj_robust.attacks import ThreatModel, pgd
    from sj_robust.estimators import estimator
    from sj_robust.evaluation import Member, worst_case

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 32),
        DLIFNode(T=4, step_mode="m"),
        nn.Linear(32, 4),
    )
    model = SpikingClassifier(net, T=4).eval()
    x = torch.rand(8, 16)
    y = torch.arange(8) % 4
    with estimator("atan:4")(model):
        x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=3)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    report = worst_case(model, x, y, [Member("idle", lambda model, x, y, *, generator: x)])
    assert report.everything == report.under("everything")
    assert ThreatModel("Linf", 0.1).eps == 0.1
    x_seq = x.expand(4, 8, 16)
    x_seq_adv = x_adv.expand(4, 8, 16)
    with MPPDMonitor(net) as monitor, torch.no_grad():
        (stats,) = monitor.compare(x_seq, x_seq_adv).values()
    assert float(stats.ms_mppd.sum()) > 0
    (stats,) = sj_robust.compare_potentials(model, x, x_adv).values()
    assert float(stats.ms_mppd.sum()) > 0
    certificate = sj_robust.perturbation_gains(model, x, x_perturbed=x_adv)
    assert certificate.holds, certificate
    proved = sj_robust.verify(model, x, model(x).argmax(1), eps=1e-6)
    assert proved.accuracy > 0, proved
    own = nn.Sequential(nn.Flatten(-3), nn.Linear(16, 32), neuron.LIFNode(), nn.Linear(32, 4))
    functional.set_step_mode(own, "m")
    images = x.view(8, 1, 4, 4)
    report = sj_robust.evaluate(own, images, y, eps=0.1, T=4, suite="fast", progress=False)
    assert 0 <= report.worst_case.accuracy <= report.clean.accuracy
    if training:
        data = (images.repeat(8, 1, 1, 1), y.repeat(8))
        once = {"epochs": 1, "batch_size": 32, "progress": False}
        report = sj_robust.finetune(own, data, eps=0.1, T=4, **once)
        assert report.worst_case.accuracy <= report.clean.accuracy
    assert replace_neurons(own, T=4).replaced == {"2": "LIFNode"}


if __name__ == "__main__":
    expected = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    check_names(expected)
    if not expected["recipes"]:
        check_extra()
    check_doctor(expected["kernel"])
    check_calls(training=expected["recipes"])
    print(
        f"smoke test passed: sj_robust {expected['version']} on SpikingJelly "
        f"{metadata.version('spikingjelly')}, {'with' if expected['recipes'] else 'no'} recipes"
    )
