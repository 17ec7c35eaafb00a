"""What evaluate.py does beside running suites: images read once, two reports to compare, and the
vote of a smoothed classifier.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lab.command_line import WrongUse
from sj_robust.data import image_loader
from sj_robust.evaluation import Report, smoothed_bracket
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Batches, Data
from sj_robust.evaluation.subject import Subject
from sj_robust.proofs import smooth


def read_once(images: Dataset[tuple[Tensor, ...]], batch_size: int) -> Data:
    """The images of a data set as all parts of an evaluation share them."""
    return Data.of(image_loader(images, batch_size))


def two_reports(paths: list[str]) -> list[Report]:
    """Two saved reports, each from its file or its folder."""
    if len(paths) != 2:
        raise WrongUse(
            f"--compare takes two reports, got {len(paths)}: --compare A/report.json B/report.json"
        )
    files = [_report_in(Path(path)) for path in paths]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]} does not exist; --compare takes two report.json of this recipe"
        )
    return [Report.load(file) for file in files]


def _report_in(path: Path) -> Path:
    """The report of a folder; a path that is none itself."""
    if not path.is_dir():
        return path
    names = ("report.json", "smoothed.json", "card.json")  # of a suite, a vote, a stress test
    there = [path / name for name in names if (path / name).is_file()]
    return there[0] if there else path / names[0]


def bracket_of_the_vote(
    subject: Subject, batches: Batches, request: Request, *, n: int, alpha: float
) -> Report:
    """Certify and attack the smoothed classifier on all images, at radii up to that of the threat,
    which is 2 sigma.
    """
    model, say, sigma = subject.model, request.watch.say, request.threat.eps / 2
    device = next(model.parameters()).device
    x, y = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    noise = torch.Generator().manual_seed(request.seed)
    say(f"{len(y)} votes of {n} draws with sigma {sigma:g}")
    votes = smooth(model, x, sigma, n=n, alpha=alpha, generator=noise)
    say("PGD on the vote")
    report = smoothed_bracket(
        model,
        x,
        y,
        votes,
        [sigma * half / 2 for half in range(5)],
        seed=request.seed,
        name=subject.name,
        dataset=request.dataset,
        configuration=dict(request.configuration),
    )
    return replace(report, warnings=(*subject.remarks, *report.warnings))
