"""What works with which network: SpikingJelly's model zoo and the patterns of its tutorials, built
small.

python docs/results/networks.py                 # every network of the installed release
python docs/results/networks.py MSResNet loop   # those whose names contain one of these words
python docs/results/networks.py --measure       # the table of proofs and evaluations

It writes networks_RELEASE.json for the installed release of SpikingJelly and, from those of all
releases, networks.md. A few minutes on one core; with --measure about a minute per network.
"""

import importlib
import json
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import sj_robust
from sj_robust.attacks import fgsm, flip_events, pgd, random_flips
from sj_robust.attacks.threat import ThreatModel
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier
from sj_robust.evaluation import Member, worst_case
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.neuron import replace_neurons

HERE = Path(__file__).parent
NETWORKS = HERE.parents[1] / "tests" / "networks_as_written.py"
YES = "yes"
LARGE = ("SNASNet", "SpikeDHS")
_REASON = 110
"""Characters of a reason."""

TITLES = {
    "evaluate": "`evaluate`",
    "compare": "`compare_potentials`",
    "gains": "gains",
    "verify": "`verify`",
    "replace": "`replace_neurons`",
    "tune": "fine-tuning",
}
HEAD = """# Supported networks

This page, written by `python docs/results/networks.py`, lists the networks of
`spikingjelly.activation_based.model` and of SpikingJelly's tutorials, in small versions with
untrained weights. The first forward pass
[detects](../your_network.md#make-it-a-function-of-images) what a network takes: images
[N, C, H, W], which the network itself runs over time; a sequence [T, N, C, H, W]; or steps, one
[N, C, H, W] per call.

`evaluate` means the initial checks of an evaluation and a short attack; gains means
`perturbation_gains`; `verify` means bounds by intervals; fine-tuning means a step of
`adv_train.py`. The reasons for "no" are [below](#what-does-not-work-and-why).

"""
BOTH = "both"
MEASURED = """
## Proofs and evaluations of the zoo

`python docs/results/networks.py --measure` reports how many of two images intervals prove robust
(eps 0.001, or one event), and whether one image is still correct under the suite `fast` (eps 0.03;
for event frames, suite `events`, one event). For SNASNet and SpikeDHS, add their names to the
command. Labels are the predictions of the untrained network; SpikeDHS sees images of 8x8. CPU
seconds are medians, on one thread; figures of every network are in [2.0.0](measured_2.0.0.json) and
[0.0.0.0.14](measured_0.0.0.0.14.json).

"""


def main() -> None:
    """Try the networks of the installed release, and write its results and the page."""
    release = version("spikingjelly")
    path = HERE / f"networks_{release}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    words = sys.argv[1:]
    if "--measure" in words:
        measure(path.with_name(f"measured_{release}.json"), words)
        (HERE / "networks.md").write_text(page(), encoding="utf-8")
        return
    rows = rows_of_the_tests()
    for name, row in rows.items():
        if any(word in name for word in words) or not (words or name.startswith(LARGE)):
            found[name] = tried(row)
            kept = {name: found[name] for name in rows if name in found}
            path.write_text(f"{json.dumps(kept, indent=1)}\n", encoding="utf-8")
    (HERE / "networks.md").write_text(page(), encoding="utf-8")


def measure(path: Path, words: list[str]) -> None:
    """Prove and evaluate the networks of the zoo, and write what comes out, network by network."""
    torch.set_num_threads(1)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = {name: smaller(name, row) for name, row in rows_of_the_tests("BOUNDED").items()}
    names = [word for word in words if word != "--measure"]
    for column, measured in (("verify", proved), ("fast", left)):
        for name, row in rows.items():
            chosen = any(word in name for word in names)
            done = column in found.get(name, {})
            if done or (not chosen and (names or name.startswith(LARGE))):
                continue
            began = time.process_time()
            cells = found.setdefault(name, {})
            cells[column] = outcome(measured, row)
            cells[f"{column} seconds"] = round(time.process_time() - began, 1)
            kept = {name: found[name] for name in rows if name in found}
            path.write_text(f"{json.dumps(kept, indent=1)}\n", encoding="utf-8")


def smaller(name: str, row: Any) -> Any:
    """The network, for smaller images if it is slow and takes them."""
    return replace(row, shape=(3, 8, 8)) if name.startswith("SpikeDHS") else row


def rows_of_the_tests(which: str = "ROWS") -> dict[str, Any]:
    """The networks that the installed release has, by name."""
    sys.path.insert(0, str(NETWORKS.parent))
    rows: dict[str, Any] = getattr(importlib.import_module(NETWORKS.stem), which)
    sys.path.remove(str(NETWORKS.parent))
    return rows


def tried(row: Any) -> dict[str, str]:
    """What happens in every column: "yes", in how far, or why not."""
    threads = torch.get_num_threads()
    columns = {
        "takes": takes,
        "evaluate": evaluated,
        "compare": compared,
        "gains": gains,
        "verify": verified,
        "replace": replaced,
        "tune": tuned,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = {name: outcome(column, row) for name, column in columns.items()}
    torch.set_num_threads(threads)
    return cells


def outcome(column: Callable[[Any], str], row: Any) -> str:
    """What a column says, or the error in a line."""
    try:
        return column(row)
    except Exception as error:  # the page shows every one of them
        return f"no: {' '.join(str(error).split())}".replace(f"{NETWORKS}:", "")


def classifier_of(row: Any, net: nn.Module | None = None) -> SpikingClassifier:
    """The network as a user wraps it."""
    net = row.network() if net is None else net
    if row.frames:
        return SpikingEventClassifier(net, row.T).eval()
    return SpikingClassifier(net, row.T if row.given else None).eval()


def labelled(model: nn.Module, row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, and the classes that the network sees in them."""
    x = row.images()
    with torch.no_grad():
        return x, model(x).argmax(1)


def perturbed(x: torch.Tensor, row: Any) -> torch.Tensor:
    """Images close to x."""
    generator = torch.Generator().manual_seed(2)
    if row.frames:
        return random_flips(nn.Flatten(), x, torch.zeros(len(x)).long(), flips=20)
    return (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def takes(row: Any) -> str:
    """How it is called, in a line."""
    return str(classifier_of(row).find_convention(row.images()))


def evaluated(row: Any) -> str:
    """The checks of an evaluation, and a short attack."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    check_fits(Subject("network", model, ""), x, None, "images")
    threat = ThreatModel("L0", 2) if row.frames else ThreatModel("Linf", 0.03)
    attack = partial(pgd, eps=0.03, step_size=0.01, steps=2)
    if row.frames:
        attack = partial(flip_events, flips=2)
    worst_case(model, x, y, [Member("short", attack, threat=threat)], threat=threat)
    return YES


def compared(row: Any) -> str:
    """Statistics of every layer."""
    model = classifier_of(row)
    x = row.images()
    stats = sj_robust.compare_potentials(model, x, perturbed(x, row))
    neurons = neurons_of(model)
    others = neurons - len(stats)
    return part(len(stats), neurons, f"the decay of the other {others} neurons is not known")


def gains(row: Any) -> str:
    """Layers that the certificate covers."""
    x = row.images()
    model = classifier_of(row)
    found = sj_robust.perturbation_gains(model, x, x_perturbed=perturbed(x, row), max_iterations=10)
    layers = found.layers
    failed = [layer for layer in layers if layer.not_covered is not None]
    why = f"{failed[0].name}: {failed[0].not_covered}" if failed else ""
    return part(len(layers) - len(failed), len(layers), why)


def verified(row: Any) -> str:
    """Bounds by intervals."""
    proved(row)
    return YES


def proved(row: Any) -> str:
    """How many images intervals prove in a small ball."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    threat: dict[str, Any] = {"eps": 1, "norm": "L0"} if row.frames else {"eps": 0.001}
    found = sj_robust.verify(model, x, y, method="ibp", **threat).verified
    return f"{sum(found)} of {len(found)}"


def left(row: Any) -> str:
    """How many images a short suite of attacks leaves."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    asked: dict[str, Any] = {"eps": 0.03, "suite": "fast"}
    if row.frames:
        asked = {"eps": 1, "suite": "events"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sj_robust.evaluate(model, x[:1], y[:1], progress=False, **asked)
    return f"{report.worst_case.correct} of {report.worst_case.total}"


def replaced(row: Any) -> str:
    """DLIF in place of its neurons, with the same logits."""
    net = row.network()
    model = classifier_of(row, deepcopy(net))
    report = replace_neurons(net, row.T)
    why = next(iter(report.skipped.values()), "")
    x = row.images()
    with torch.no_grad():
        if not torch.allclose(classifier_of(row, net)(x), model(x), atol=1e-4):
            return "no: other logits"
    return part(len(report.replaced), len(report.replaced) + len(report.skipped), why)


def tuned(row: Any) -> str:
    """One step of adversarial training, as the recipe does it."""
    from sj_robust.training import Objective  # needs the extra recipes

    torch.manual_seed(0)
    spec = {"image_shape": row.shape, "T": row.T, "frames": row.frames, "classes": row.classes}
    model = build_classifier(NetworkSpec(name=f"{NETWORKS}:{row.build}", **spec))
    x, y = labelled(model.eval(), row)
    x_perturbed = perturbed(x, row) if row.frames else fgsm(model, x, y, eps=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Objective(model.train())(x, y, x_perturbed).total.backward()
    optimizer.step()
    reached = any(value.grad is not None for value in model.parameters())
    return YES if reached else "no: no gradient reaches its weights"


def neurons_of(model: nn.Module) -> int:
    """Number of spiking layers."""
    return sum(hasattr(module, "surrogate_function") for module in model.modules())


def part(done: int, of: int, why: str) -> str:
    """All of them, some or none."""
    if done == of > 0:
        return YES
    return f"{done} of {of}: {why}" if done else f"no: {why}"


def page() -> str:
    """The page, from the results of all releases."""
    found = stored("networks")
    measured = stored("measured")
    heads = ["network", "SpikingJelly", "takes", "returns", *TITLES.values()]
    lines = [HEAD, *table(heads, grouped(found))]
    heads = ["SpikingJelly", "networks", "bounded", "both proved", "CPU s"]
    heads += ["attacked", "still correct", "CPU s"]
    lines += [*MEASURED.split("\n"), *table(heads, measured_rows(measured))]
    lines += ["", "## What does not work, and why", "", *explained(found, measured)]
    return "\n".join(lines) + "\n"


def stored(stem: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by release, the newest first, and by network."""
    found = {}
    for path in sorted(HERE.glob(f"{stem}_*.json"), reverse=True):
        found[path.stem.removeprefix(f"{stem}_")] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def names_in(found: dict[str, dict[str, Any]]) -> list[str]:
    """Networks of all releases, in the order of the newest."""
    return list(dict.fromkeys(name for rows in found.values() for name in rows))


def grouped(found: dict[str, dict[str, dict[str, str]]]) -> list[list[str]]:
    """Rows of the first table: networks with equal cells share one, but for zoo and tutorials."""
    groups: dict[tuple[bool | str, ...], list[str]] = {}
    for name in names_in(found):
        of_releases = {release: rows[name] for release, rows in found.items() if name in rows}
        releases = BOTH if len(of_releases) == len(found) else ", ".join(of_releases)
        called = next(iter(of_releases.values()))["takes"]
        shown = (releases, *short_convention(called), *cells_of(of_releases))
        of_zoo = name[0].isupper()
        groups.setdefault((of_zoo, *shown), []).append(name)
    return [["; ".join(names), *map(str, cells[1:])] for cells, names in groups.items()]


def short_convention(called: str) -> tuple[str, str]:
    """What a network takes and returns, from the line that describes its convention."""
    if called.startswith("no"):
        return "no", "no"
    kinds = {
        "takes images": "images",
        "takes a sequence": "sequence",
        "takes one step": "steps",
    }
    (kind,) = (word for start, word in kinds.items() if called.startswith(start))
    return kind, called.partition("returns ")[2]


def cells_of(of_releases: dict[str, dict[str, str]]) -> list[str]:
    """The cells of a network in the columns after its convention."""
    return [each(of_releases, column) for column in TITLES]


def measured_rows(measured: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """Rows of the table of proofs and evaluations, one for every release."""
    rows = []
    for release, networks in measured.items():
        row = [release, str(len(networks))]
        for column, best in (("verify", "2 of "), ("fast", "1 of ")):
            done = [cells for cells in networks.values() if column in cells]
            worked = [cells for cells in done if not cells[column].startswith("no: ")]
            reached = sum(cells[column].startswith(best) for cells in worked)
            seconds = median(cells[f"{column} seconds"] for cells in worked)
            row += [str(len(worked)), str(reached), f"{seconds:.1f}"]
        rows.append(row)
    return rows


def explained(
    found: dict[str, dict[str, dict[str, str]]], measured: dict[str, dict[str, dict[str, Any]]]
) -> list[str]:
    """Reasons, each once, with the networks and columns that it concerns."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for columns, results in ((TITLES, found), ({"verify": TITLES["verify"]}, measured)):
        for name in names_in(results):
            for column, title in columns.items():
                for release in results.values():
                    why = reason(str(release.get(name, {}).get(column, "")))
                    titles = reasons.setdefault(why, {}).setdefault(name, []) if why else []
                    if title not in titles:
                        titles.append(title)
    lines = []
    for why, concerned in reasons.items():
        by_titles: dict[tuple[str, ...], list[str]] = {}
        for name, titles in concerned.items():
            by_titles.setdefault(tuple(titles), []).append(name)
        places = []
        for titles, names in by_titles.items():
            all_of_them = len(titles) == len(TITLES)
            places.append(f"{'; '.join(names)} ({'all' if all_of_them else ', '.join(titles)})")
        lines.append(f"- {'; '.join(places)}: {why}")
    return lines


def each(of_releases: dict[str, dict[str, str]], column: str) -> str:
    """One cell: what the releases say, once if it is the same."""
    short = {release: cells[column].partition(": ")[0] for release, cells in of_releases.items()}
    if len(set(short.values())) == 1:
        return next(iter(short.values()))
    return ", ".join(f"{text} ({release})" for release, text in short.items())


def reason(cell: str) -> str:
    """Why a cell does not say yes, without marks of Markdown and the list of what has bounds."""
    text = cell.partition(": ")[2].partition("; there are for ")[0]
    text = text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    return textwrap.shorten(text, _REASON, placeholder=" ...")


if __name__ == "__main__":
    main()
