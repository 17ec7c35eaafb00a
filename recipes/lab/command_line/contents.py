"""The README of an output folder: what made it, what each file is, how to go on and how to draw again."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sj_robust._saved import write_whole

__all__ = ["CONTENTS", "Contents", "describe_folder", "described"]

README = "README.md"
_RULED = "```"


@dataclass(frozen=True)
class Contents:
    """What a recipe leaves in its folder. 输出目录的内容说明。

    Attributes:
        title: What the folder is.
        files: What a file is, by its name or a shell pattern of names; a folder ends with a slash.
        further: Paragraphs on going on and on drawing again; FOLDER stands for the folder.
    """

    title: str
    files: Mapping[str, str]
    further: tuple[str, ...]


CONTENTS: Mapping[str, Contents] = MappingProxyType(
    {
        "adv_train": Contents(
            "A run of adv_train.py",
            {
                "README.md": "this text",
                "config.yaml": "all options; `--config` takes it",
                "log.txt": "versions, device, commit, options, a line per epoch",
                "report.json": "the result; `sj_robust.evaluation.Report.load` reads it",
                "report.png": "drawn from `report.json`",
                "*/best.pt": "the network at its best epoch, with its options; `recipes/evaluate.py` takes it",
                "*/last.pt": "the last checkpoint, which `--resume` goes on from",
                "tensorboard/": "losses, accuracies, learning rate, MS-MPPD and gain of every layer: "
                "`tensorboard --logdir FOLDER/tensorboard`",
                "figures/": "made by `recipes/figures.py`, with a README of its own",
            },
            (
                "**Go on** after a stop: `python recipes/adv_train.py --output FOLDER --resume`.",
                "**Measure further:** `python recipes/evaluate.py FOLDER/NETWORK`. **Figures of the paper:** "
                "`python recipes/figures.py FOLDER`.",
                "**Draw again:** `plot_report(Report.load(Path('report.json')), Path('report.png'))`, with `Report` of "
                "`sj_robust.evaluation` and `plot_report` of `sj_robust.evaluation.drawings`.",
            ),
        ),
        "evaluate": Contents(
            "An evaluation by evaluate.py",
            {
                "README.md": "this text",
                "config.yaml": "all options; `--config` takes it",
                "log.txt": "versions, device, commit, options, what was said",
                "report.json": "the result: the outcome of every image under every attack; "
                "`sj_robust.evaluation.RobustnessReport.load` reads it",
                "report.html": "the same as a page that needs no other file",
                "attacks.*": "accuracy left by each attack, as PNG and PDF",
                "accuracy_over_eps.*": "accuracy over the radius, as PNG and PDF",
                "potential.*": "MS-MPPD of every layer under each attack, as PNG and PDF",
                "progress/": "what is finished, for `--resume`; may be deleted once `report.json` is there",
            },
            (
                "**Go on** after a stop: `python recipes/evaluate.py --output FOLDER --resume`.",
                "**Compare** with another: `python recipes/evaluate.py --compare FOLDER OTHER_FOLDER`.",
                "**Draw again:** `plot_robustness(report, Path('.'))` of `sj_robust.evaluation.drawings` and "
                "`save_html(report, Path('report.html'))` of `sj_robust.evaluation.html`, with "
                "`report = RobustnessReport.load(Path('report.json'))` of `sj_robust.evaluation`.",
            ),
        ),
        "sweep": Contents(
            "A sweep by sweep.py",
            {
                "README.md": "this text",
                "sweep.yaml": "the sweep; `--sweep` takes it",
                "results.md": "the tables, with the spread over seeds and the paper's figures",
                "results.csv": "every figure of every setting",
                "contrast-*.csv": "effect of an option over pairs of runs with the same seed, from `--contrast`",
                "effect-*.*": "accuracy over an option of numbers, from `--plot`, as PNG and PDF",
                "runs/*/options.yaml": "the options of a run",
                "runs/*/run.json": "its figures, versions and times; written when it is finished",
                "runs/*/output.txt": "what it printed",
                "runs/*/*.yaml": "the options of its evaluations",
                "runs/*/*/": "its training and its evaluations, each with a README of its own",
                ".lock": "keeps a second sweep out while one is running",
            },
            (
                "**Go on** after a stop, or try failed runs again: `python recipes/sweep.py --output FOLDER`.",
                "**Draw again** and make the tables, from the runs there are: "
                "`python recipes/sweep.py --output FOLDER --report`.",
            ),
        ),
        "figures": Contents(
            "Figures by figures.py",
            {
                "README.md": "this text",
                "neuron.*": "one LIF neuron under two perturbations (figure 1 of the paper)",
                "rho.*": "accuracy over rho (figure 3), from the records of a sweep",
                "gains.*": "learned input gains of every DLIF layer (figure 4)",
                "curves.*": "accuracy and MS-MPPD over the epochs (figure 5)",
                "intensity_*.*": "indicators of every layer of a network under growing perturbations, and heat maps",
            },
            (
                "`NAME.json` holds the numbers of a figure, `NAME.pdf` and `NAME.png` are drawn from it.",
                "**Draw again:** `python recipes/figures.py --redraw FOLDER`; nothing is computed.",
            ),
        ),
        "benchmark": Contents(
            "Measurements by benchmark.py",
            {
                "README.md": "this text",
                "*.csv": "every measurement, with machine and versions",
                "*.md": "the same as tables, with the command and the machine",
                "*.png": "the same as a chart",
            },
            (
                "A file is called after what was measured. The same command measures again and replaces its own files.",
                "**Draw again:** `python recipes/benchmark.py --redraw FOLDER`.",
            ),
        ),
    }
)
"""What each recipe leaves behind."""


def describe_folder(folder: Path, recipe: str, arguments: Sequence[str]) -> None:
    """Write the README of an output folder; commands that wrote into it before stay in it. 写入输出目录的说明文件。

    Args:
        folder: The folder, which exists.
        recipe: Name of the recipe, one of :data:`CONTENTS`.
        arguments: Words of its command line.

    Raises:
        OSError: If it cannot be written.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> describe_folder(folder, "figures", ["--which", "neuron", "--output", str(folder)])
        >>> "python recipes/figures.py --which neuron" in (folder / "README.md").read_text()
        True
    """
    contents = CONTENTS[recipe]
    command = shlex.join(["python", f"recipes/{recipe}.py", *arguments])
    path = folder / README
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    commands = earlier.partition(f"{_RULED}text\n")[2].partition(f"\n{_RULED}")[0].splitlines()
    lines = [f"# {contents.title}", "", "Made by, in this order:", "", f"{_RULED}text"]
    lines += [
        *dict.fromkeys([*commands, " ".join(command.splitlines())]),
        _RULED,
        "",
        "| file | what it is |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {text} |" for name, text in contents.files.items()]
    lines += ["", "Files that are not needed for what was asked, or not made yet, are missing."]
    lines += [line for text in contents.further for line in ("", text)]
    write_whole(path, "\n".join(lines).replace("FOLDER", shlex.quote(str(folder))) + "\n")


def described(text: str, name: str) -> bool:
    """Whether a README names a file. 说明文件是否提到某文件。

    Args:
        text: The README.
        name: Path of the file below its folder, with slashes.

    Examples:
        >>> described("| `*/best.pt` | a network |", "dlif_at/best.pt"), described("| `a` | b |", "b")
        (True, False)
    """
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    return any(re.fullmatch(_expression(row), name) for row in rows)


def _expression(pattern: str) -> str:
    """A shell pattern as a regular expression; an asterisk does not reach into a folder, a slash at the end does."""
    return re.escape(pattern).replace(r"\*", "[^/]*") + (".+" if pattern.endswith("/") else "")
