"""Recipes that look like the real ones from outside and take no time, for the tests of what runs
them.
"""

TRAINER = '''
import json, os, signal, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from lab.command_line import read_options
from lab.command_line import Decides, Idle, Radius
from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Row


@dataclass(frozen=True)
class Options:
    """Options."""

    dataset: str = "cifar10"
    model: str = "vgg11"
    neuron: Literal["lif", "dlif"] = "dlif"
    mode: Literal["none", "gaussian", "at", "rat", "pgd_at"] = "at"
    eps: Radius = Radius(0.1)
    eval_eps: Radius | None = None
    rho: float | None = 1.0
    norm: Annotated[Literal["l2", "l1"], Idle(lambda options: options.rho == 0)] = "l2"
    indicator: Annotated[
        Literal["mppd", "tasad", "std"], Idle(lambda options: options.rho == 0)] = "mppd"
    epochs: int = 1
    select: Literal["clean", "pgd"] = "pgd"
    seed: int = 0
    behave: str = "well"
    device: Annotated[str, Decides("nothing")] = "auto"
    workers: Annotated[int, Decides("nothing")] = 0
    data_root: Annotated[str, Decides("nothing")] = "data"
    output: Annotated[str | None, Decides("nothing")] = None
    resume: Annotated[bool, Decides("nothing")] = False


def completed(options):
    return replace(options, rho=float(options.mode != "pgd_at")) if options.rho is None else options


def main(arguments):
    options = completed(read_options(Options, arguments))
    folder = Path(options.output)
    with (folder.parent / "calls").open("a") as file:
        file.write(f"train resume={options.resume} pid={os.getpid()}\\n")
    print("training", options.neuron)
    network = folder / f"{options.neuron}_{options.mode}"
    network.mkdir(parents=True, exist_ok=True)
    (network / "last.pt").write_text("half")
    if options.behave == "fail":
        raise ValueError("no such\\nthing")
    if options.behave == "exit":
        raise SystemExit(2)
    if options.behave == "die" and not (folder / "survived").exists():
        (folder / "survived").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if options.behave in ("wait", "long") and not options.resume:
        (folder / "waiting").touch()
        time.sleep(600)
    if options.behave == "linger":
        (folder / "waiting").touch()
        while "waiting" not in (folder.parent / "output.txt").read_text():
            time.sleep(0.05)
    (network / "best.pt").write_text("whole")
    drawn = 5 * options.seed**2 * len(options.mode + options.norm) % 7
    robust = 40 + drawn + (10 if options.rho else 0) + (options.neuron == "dlif")
    own = f"{options.neuron} {options.mode}"
    rows = [Row("clean", "clean", range(100), range(90, 100), variant=own),
            Row("pgd20", "attack", range(90), range(robust, 90), variant=own),
            Row("clean", "clean", range(100), range(1, 100), variant="lif undefended")]
    shares = {"clean": 0.9, "pgd": robust / 100}
    curves = {own: [{"epoch": 1, "losses": {}, "validation": shares, "lr": 0.1}]}
    report = Report(own, "cifar10", "training", (0,) * 100, rows, ThreatModel("Linf", 0.1),
                    curves=curves, configuration=asdict(options), environment={"torch": "x"})
    report.save(folder / "report.json")
'''

EVALUATOR = '''
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from lab.command_line import read_options
from lab.command_line import Decides
from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Row


@dataclass(frozen=True)
class Options:
    """Options."""

    checkpoint: Annotated[str | None, Decides("nothing")] = None
    name: Annotated[str | None, Decides("nothing")] = None
    suite: Literal["paper", "fast"] = "paper"
    test_limit: int | None = None
    device: Annotated[str, Decides("nothing")] = "auto"
    data_root: Annotated[str, Decides("nothing")] = "data"
    output: Annotated[str | None, Decides("nothing")] = None
    resume: Annotated[bool, Decides("nothing")] = False


def main(arguments):
    options = read_options(Options, arguments)
    assert (Path(options.checkpoint) / "best.pt").read_text() == "whole"
    folder = Path(options.output)
    with (folder.parent / "calls").open("a") as file:
        file.write(f"{options.suite} resume={options.resume} pid={os.getpid()}\\n")
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    (folder / "progress" / "estimators.json").touch()
    if (folder.parent / "refuse").exists():
        raise OSError("disk full")
    count = options.test_limit or 40
    names = ["gaussian", "pgd10", "pgd10/last", "apgd_ce", "pgd10@10/255"]
    whole, threat = range(count - 1), ThreatModel("Linf", 8 / 255)
    rows = [Row("clean", "clean", range(count), (count - 1,))]
    rows += [Row(name, "attack", whole, range(n), threat=threat) for n, name in enumerate(names)]
    layers = {"first": [9.0, 9.0], "last": [1.0, 3.0]}
    potential = {"member": "pgd10", "samples": 9, "layers": layers, "warnings": []}
    rows.append(Row("control/pgd10", "control", whole, (0,), threat=threat, group="control"))
    report = Report(options.name or "mine", "cifar10", options.suite,
                    [n % 2 for n in range(count)], rows, threat, 2, potential=[potential],
                    configuration=asdict(options))
    report.save(folder / "report.json")
'''


def write_fakes(folder):
    """Both recipes in a folder; returns the options of a sweep that name them."""
    paths = {}
    for name, text in (("recipe", TRAINER), ("evaluator", EVALUATOR)):
        path = folder / f"{name}.py"
        path.write_text(text)
        paths[name] = str(path)
    return paths
