"""A network under faults or corruptions, clean and attacked at every level, as a file that loads
back equal.
"""

from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

from sj_robust.attacks.threat import ThreatModel, eps_text
from sj_robust.core.saved import SavedResult, markdown_table, plain, write_whole
from sj_robust.core.shown import BLUE, GREY, ORANGE, Shown, new_figure, print_style, write_figure
from sj_robust.evaluation.intervals import repeated_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StressCard", "StressRow"]

_LOOKS = {"clean": (BLUE, "o-"), "attacked": (ORANGE, "s--")}


@dataclass(frozen=True)
class StressRow:
    """Images still classified right under one fault or corruption at one level. 单项故障的结果。

    Attributes:
        kind: The fault or corruption.
        level: Its level.
        clean: Images right without an attack, one number per draw.
        attacked: Images right under the attack, which was crafted on the faulty network, likewise.

    Examples:
        >>> StressRow("lost_spikes", 0.1, (90, 92), (40, 44)).mean("clean")
        91.0
    """

    kind: str
    level: float
    clean: tuple[int, ...]
    attacked: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("clean", "attacked"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def counts(self, what: Literal["clean", "attacked"]) -> tuple[int, ...]:
        """Images right, one number per draw."""
        return self.clean if what == "clean" else self.attacked

    def mean(self, what: Literal["clean", "attacked"]) -> float:
        """Images right in the mean over draws."""
        return fmean(self.counts(what))


@dataclass(frozen=True, repr=False)
class StressCard(
    Shown, SavedResult, what="a stress card", format="sj_robust.stress_card", version=1
):
    """What faults of deployment, or common corruptions, leave of a network, clean and attacked.
    压力测试卡。

    Attributes:
        name: Name of the network.
        dataset: Name of the data set.
        suite: ``"stress"`` or ``"corruptions"``.
        threat: Norm and radius of the attack.
        attack: What it is, in words.
        images: Number of images.
        intact: The network without a fault.
        rows: Every level of every kind, from mild to severe.
        seed: Seed of everything.
        network: Architecture and fingerprint.
        data: Fingerprint of images and labels.
        configuration: Options of the run.
        environment: Versions, device, commit.
        warnings: What could not be measured, and why.

    Examples:
        >>> rows = [
        ...     StressRow("weight_bits", bits, (right,), (0,)) for bits, right in ((4, 9), (2, 3))
        ... ]
        >>> threat, intact = ThreatModel("Linf", 0.1), StressRow("none", 0, (9,), (0,))
        >>> card = StressCard("mine", "digits", "stress", threat, "APGD-CE", 10, intact, rows)
        >>> card.fall("clean"), card.fall("attacked")
        ({'weight_bits': 2}, {'weight_bits': None})
        >>> StressCard.from_json(card.to_json()) == card
        True
    """

    name: str
    dataset: str
    suite: str
    threat: ThreatModel
    attack: str
    images: int
    intact: StressRow
    rows: tuple[StressRow, ...]
    seed: int = 0
    network: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rows", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("network", "configuration", "environment"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in their order."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    def fall(
        self, what: Literal["clean", "attacked"], *, points: float = 5.0
    ) -> dict[str, float | None]:
        """By kind, the first level at which accuracy is so many points below the intact network's;
        None at no level.
        """
        floor = self.intact.mean(what) - points / 100 * self.images
        fallen = [row for row in self.rows if row.mean(what) <= floor]
        return {
            kind: next((row.level for row in fallen if row.kind == kind), None)
            for kind in self.kinds
        }

    def accuracy(self, what: Literal["clean", "attacked"], kind: str | None = None) -> float:
        """Mean share over the levels of a kind, or of all, as corruptions are reported.

        Raises:
            KeyError: If the card has no such kind.
        """
        rows = [row for row in self.rows if kind in (None, row.kind)]
        if not rows:
            raise KeyError(f"no kind {kind!r} on this card; it has {', '.join(self.kinds)}")
        return fmean(row.mean(what) for row in rows) / self.images

    @property
    def verdict(self) -> str:
        """What is right intact, and where it falls."""
        parts = []
        for what in ("clean", "attacked"):
            found = self.fall(what)
            levels = [f"{kind} {level:g}" for kind, level in found.items() if level is not None]
            never = [kind for kind, level in found.items() if level is None]
            text = f"{what}: {self._percent(self.intact, what)} % intact"
            text += f", 5 points lower from {', '.join(levels)} on" if levels else ""
            parts.append(text + (f", nowhere so under {', '.join(never)}" if never else ""))
        said = f"{self.images} images, {self.attack} at {self._budget}. {'; '.join(parts)}."
        if not self.rows:
            return f"{said} No fault was measured."
        if self.suite == "stress":
            return said
        clean, attacked = (100 * self.accuracy(what) for what in ("clean", "attacked"))
        mean = f"{clean:.1f} % clean, {attacked:.1f} % attacked"
        return f"{said} Mean over kinds and severities: {mean}."

    def table(self) -> str:
        """Markdown table of every level; a star marks the first level that is 5 points lower."""
        heads = ["fault" if self.suite == "stress" else "corruption", "level"]
        heads += [
            head for what in ("clean", "attacked") for head in (f"{what}, %", "95 % interval")
        ]
        rows = [self._cells(self.intact, "none", "")]
        for kind in self.kinds:
            rows += [
                self._cells(row, kind, f"{row.level:g}") for row in self.rows if row.kind == kind
            ]
            if self.suite == "corruptions":
                rows.append(self._mean(kind))
        rows += [self._mean(None)] if self.suite == "corruptions" and self.rows else []
        notes = "".join(f"\n\n{text}" for text in self.warnings)
        return markdown_table([*heads, "draws"], rows) + notes

    @print_style()
    def plot(self, path: str | Path | None = None) -> "Figure":
        """A panel per kind: accuracy over its levels, clean and attacked. 绘制压力测试卡。

        It needs matplotlib (extra ``recipes``).

        Args:
            path: File to write as well; its ending says which format.
        """
        columns = min(4, max(1, len(self.kinds)))
        down = max(1, ceil(len(self.kinds) / columns))
        figure = new_figure(0.6 + 2.4 * columns, 0.5 + 2.1 * down)
        panels = figure.subplots(down, columns, squeeze=False, sharey=True)
        for axes, kind in zip(panels.flat, self.kinds, strict=False):
            rows = [row for row in self.rows if row.kind == kind]
            places = range(len(rows))
            for what in ("clean", "attacked"):
                color, look = _LOOKS[what]
                low, high = zip(
                    *(repeated_interval(row.counts(what), self.images) for row in rows), strict=True
                )
                axes.fill_between(
                    places,
                    [100 * e for e in low],
                    [100 * e for e in high],
                    color=color,
                    alpha=0.2,
                    lw=0,
                )
                axes.plot(
                    places,
                    [100 * row.mean(what) / self.images for row in rows],
                    look,
                    color=color,
                    ms=4,
                )
                axes.axhline(100 * self.intact.mean(what) / self.images, color=GREY, lw=0.8, ls=":")
            axes.set_title(kind, fontsize=8)
            axes.set_xticks(places, [f"{row.level:g}" for row in rows], fontsize=7)
            axes.set_ylim(-2, 102)
            axes.tick_params(axis="y", labelsize=7)
            axes.grid(alpha=0.3)
        for axes in panels.flat[len(self.kinds) :]:
            axes.set_axis_off()
        for axes in panels[:, 0]:
            axes.set_ylabel("accuracy, %", fontsize=8)
        figure.suptitle(
            f"{self.name}: clean (circles), {self.attack} at {self._budget} (squares); dots: "
            "intact",
            size=8,
        )
        if path is not None:
            write_figure(figure, path)
        return figure

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write JSON, table and plots into a folder; their names. 写入结果卡的全部文件。"""
        self.save(folder / "card.json")
        write_whole(folder / "card.md", f"{self.verdict}\n\n{self.table()}\n")
        figure = self.plot()
        for ending in ("png", "pdf"):
            write_figure(figure, folder / f"card.{ending}")
        return "card.json", "card.md", "card.png", "card.pdf"

    @property
    def _budget(self) -> str:
        return f"{self.threat.norm} {eps_text(self.threat.eps)}"

    def _percent(self, row: StressRow, what: Literal["clean", "attacked"]) -> str:
        return f"{100 * row.mean(what) / self.images:.1f}"

    def _cells(self, row: StressRow, kind: str, level: str) -> list[str]:
        cells = [kind, level]
        for what in ("clean", "attacked"):
            low, high = (100 * end for end in repeated_interval(row.counts(what), self.images))
            first = row is not self.intact and self.fall(what)[row.kind] == row.level
            cells += [
                self._percent(row, what) + (" *" if first else ""),
                f"{low:.1f} to {high:.1f}",
            ]
        return [*cells, str(len(row.clean))]

    def _mean(self, kind: str | None) -> list[str]:
        clean, attacked = (
            f"{100 * self.accuracy(what, kind):.1f}" for what in ("clean", "attacked")
        )
        return [f"mean of {kind or 'all'}", "", clean, "", attacked, "", ""]

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        for what in ("clean", "attacked"):
            content.pop(f"fall_{what}", None)
        rows = tuple(StressRow(**row) for row in content.pop("rows"))
        threat, intact = ThreatModel(**content.pop("threat")), StressRow(**content.pop("intact"))
        return cls(threat=threat, intact=intact, rows=rows, **content)

    def _content(self) -> dict[str, Any]:
        fallen = {f"fall_{what}": self.fall(what) for what in ("clean", "attacked")}
        return asdict(self) | fallen
