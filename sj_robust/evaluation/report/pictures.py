"""Adversarial images, and the spikes of the clean and the attacked run."""

import warnings
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from sj_robust.classifier import as_classifier
from sj_robust.core.checks import check_count
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text
from sj_robust.core.preserved import seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import (
    ORANGE,
    Shown,
    new_figure,
    png,
    print_style,
    without_formulas,
    write_figure,
)
from sj_robust.core.threat import NormName, Threat, ThreatModel, as_threat
from sj_robust.evaluation.result import Evaluation
from sj_robust.evaluation.run.data import Batches, Data
from sj_robust.evaluation.run.draws import gradient_draws, settled_draws
from sj_robust.evaluation.run.estimator_search import short_attack
from sj_robust.evaluation.run.member import Member, crafted, scored
from sj_robust.perturbation import spike_traces
from sj_robust.perturbation.traces import Traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Gallery", "gallery", "gallery_of"]

_STEPS = 50
_ATTACKED = 32
"""Images that are attacked at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Gallery(Shown):
    """Images before and after an attack, with the predicted classes. 对抗样本图集。

    Attributes:
        threat: Threat model that every attacked image respects.
        estimator: Gradient estimator of the attack.
        x: Clean images [N, C, H, W], or event frames [N, T, C, H, W].
        x_adv: Attacked images; those that fool the network come first.
        labels: True classes [N].
        predicted: Predicted classes of the clean images.
        predicted_adv: Predicted classes of the attacked images.
        traces: Both runs of every pair; empty if no neuron can be followed.
        class_names: Names of the classes; without them, a class is its number.
    """

    threat: ThreatModel
    estimator: str
    x: Tensor
    x_adv: Tensor
    labels: Tensor
    predicted: Tensor
    predicted_adv: Tensor
    traces: Traces
    class_names: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """How many are misclassified, and where their spikes diverge."""
        wrong = int((self.predicted_adv != self.labels).sum())
        where = f"; {self.traces.verdict}" if self.traces else ""
        radius = f"{self.threat.norm} {eps_text(self.threat.eps)}"
        return f"{wrong} of {len(self.labels)} images are misclassified within {radius}{where}"

    def table(self) -> str:
        """Markdown: the verdict, then a row per image."""
        distance = self.threat.distance(self.x, self.x_adv).tolist()
        rows = []
        for number, values in enumerate(
            zip(self.labels, self.predicted, self.predicted_adv, strict=True)
        ):
            names = [self._name(value) for value in values]
            rows.append([self._parting(number), *names, f"{distance[number]:.4g}"])
        heads = ["spikes diverge in", "class", "prediction", "under attack", "distance"]
        return f"{self.verdict}.\n\n{markdown_table(heads, rows)}"

    def _parting(self, number: int) -> str:
        """Where the spikes of an image diverge."""
        parting = self.traces.parting(number) if self.traces else None
        if parting is None:
            return "nowhere"
        layer, step = parting
        return f"{layer}, step {step}"

    @print_style()
    def plot(
        self,
        which: Literal["images", "spikes", "potential"] = "images",
        path: str | Path | None = None,
    ) -> "Figure":
        """The images with their difference, or both runs of the first one layer by layer.
        绘制图集。

        It needs matplotlib (extra ``recipes``).

        Args:
            which: ``"images"``; or ``"spikes"``, ``"potential"``, see
                :meth:`sj_robust.perturbation.traces.Traces.plot`.
            path: File to write to, in the format of its suffix.

        Raises:
            ValueError: If there is no such drawing, or no neuron of the network can be followed.
        """
        if which != "images" and not self.traces:
            raise ValueError(
                f"which must be 'images' for a network without neurons to follow, got {which!r}"
            )
        figure = self._images() if which == "images" else self.traces.plot(which)
        if path is not None:
            write_figure(figure, path)
        return figure

    def _repr_html_(self) -> str:
        """The images and the table, where a notebook shows the gallery."""
        table = super()._repr_html_()
        if find_spec("matplotlib") is None:
            return table
        image = b64encode(png(self.plot())).decode()
        return f'<img alt="{escape(self.verdict)}" src="data:image/png;base64,{image}">{table}'

    def figures(self) -> dict[str, "Figure"]:
        """All figures by the names of their files: gallery, spikes and membrane. 全部图。"""
        found = {"gallery": self.plot()}
        if self.traces:
            found["spikes"] = self.plot("spikes")
            found["membrane"] = self.plot("potential")
        return found

    def _images(self) -> "Figure":
        """A column per image: clean, attacked, difference."""
        count = len(self.labels)
        figure = new_figure(0.6 + 1.05 * count, 3.6)
        panels = figure.subplots(3, count, squeeze=False)
        difference = self.x_adv - self.x
        factor = 0.5 / max(float(difference.abs().max()), 1e-12)
        rows = {
            "clean": self.x,
            "attacked": self.x_adv,
            f"difference\n(x {factor:.3g})": 0.5 + factor * difference,
        }
        for (name, images), axes_row in zip(rows.items(), panels, strict=True):
            axes_row[0].set_ylabel(name)
            for axes, image in zip(axes_row, images, strict=True):
                _draw_image(axes, image)
        for axes, label, seen in zip(panels[0], self.labels, self.predicted, strict=True):
            title = self._title(label)
            if label != seen:
                title = f"{title}, seen as {self._name(seen)}"
            axes.set_title(title, fontsize=7)
        for axes, label, seen in zip(panels[1], self.labels, self.predicted_adv, strict=True):
            title = axes.set_title(self._title(seen), fontsize=7)
            if label != seen:
                title.set(color=ORANGE, fontweight="bold")
        return figure

    def _name(self, label: Tensor) -> str:
        """Of a class: its name, or its number."""
        number = int(label)
        if number < len(self.class_names):
            return without_formulas(self.class_names[number])
        return str(number)

    def _title(self, label: Tensor) -> str:
        """Of an image: what it shows, or is taken for."""
        return self._name(label) if self.class_names else f"class {int(label)}"


def gallery(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    estimator: str = "training",
    count: int = 6,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    draws: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> Gallery:
    """Attack a few images, and show them with the predicted classes. 生成对抗样本图集。

    Equation: ``x_adv = argmax CE(model(x'), y)`` over the ball around ``x`` within [0, 1], with 50
    steps of APGD (for L0, of ``flip_events``), as in the suites of :func:`sj_robust.evaluate`.

    Args:
        model: As in :func:`sj_robust.evaluate`, like the arguments that have no line here.
        x: Images [N, C, H, W] in [0, 1], or event frames [N, T, 2, H, W]; the first 32 that are
            classified correctly are attacked.
        y: Labels [N] int64.
        eps: A radius or a threat model, as in :func:`sj_robust.evaluate`.
        estimator: Gradient estimator to attack with, such as the first of ``report.estimators``.
        count: Number of images to show, starting with those that fool the network.
        T: Number of time steps, for a bare network; None if it brings its own.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        draws: Number of forwards that judge an image, as in :func:`sj_robust.evaluate`; None finds
            out: 1, or 10 for a network that draws random numbers.
        seed: Seed of the attack.
        class_names: Names of the classes, such as ``load_images(...).class_names``.

    Raises:
        ValueError: If an argument is wrong, or no image is classified correctly.

    Source: APGD of Croce and Hein (ICML 2020).

    Examples:
        >>> from sj_robust.data import image_loader, load_images
        >>> from sj_robust.models import pretrained
        >>> x, y = next(iter(image_loader(load_images("digits").test, 32)))
        >>> shown = gallery(pretrained("digits/lif"), x, y, eps=0.1)
        >>> len(shown.x_adv), bool((shown.x_adv - shown.x).abs().max() <= 0.1 + 1e-6)
        (6, True)
    """
    classifier = as_classifier(model, T, mean=mean, std=std, images=x)
    threat = as_threat(eps, "L0" if x.ndim == 5 else "Linf", *get_args(NormName))
    if draws is not None:
        check_count("draws", draws)
    draws = settled_draws(classifier, Data.of([(x, y)]), draws, shared=False)
    return gallery_within(
        classifier,
        x,
        y,
        threat,
        estimator=estimator,
        count=count,
        draws=draws,
        seed=seed,
        class_names=class_names,
    )


def gallery_of(
    report: Evaluation, model: nn.Module, batches: Batches, class_names: Sequence[str] = ()
) -> Gallery | None:
    """Images under the attack with the strongest gradient of a report; None if the network
    misclassifies the whole first batch. 报告附带的对抗样本图集。
    """
    x, y = next(iter(batches))[:2]
    right = report.standing("clean")
    if report.threat is None or min(right, default=len(y)) >= len(y):
        return None
    chosen = [row["estimator"] for row in report.estimators if row["chosen"]]
    return gallery_within(
        model,
        x,
        y,
        report.threat,
        estimator=chosen[0] if chosen else "training",
        draws=report.draws,
        seed=report.seed,
        class_names=class_names,
    )


def gallery_within(
    classifier: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    estimator: str = "training",
    count: int = 6,
    draws: int = 1,
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> Gallery:
    """:func:`gallery` of a function of images, for any threat. 给定威胁模型的图集。"""
    device = device_of(classifier)
    x, y = x.to(device), y.to(device)
    seen = _seen(classifier, x, y, draws=draws, seed=seed)
    right = (seen == y).nonzero()[:_ATTACKED, 0]
    if not len(right):
        raise ValueError(
            f"the network misclassifies all of these {len(y)} images; there is nothing to attack"
        )
    attack = short_attack(threat, _STEPS, draws=gradient_draws(draws, threat))
    member = Member("gallery", attack, estimator, threat=threat)
    seeds = SampleSeeds(range(len(right))).derived("gallery", seed)
    attacked = x.clone()  # whole, so that every image meets the random numbers that it met before
    attacked[right] = crafted(classifier, x[right], y[right], member, seeds=seeds).x_adv.to(x)
    seen_adv = _seen(classifier, attacked, y, draws=draws, seed=seed)[right]
    x, x_adv, y, seen = x[right], attacked[right], y[right], seen[right]
    order = (seen_adv != y).float().argsort(descending=True, stable=True)
    order = order[:count]
    return Gallery(
        threat,
        estimator,
        x=x[order].cpu(),
        x_adv=x_adv[order].cpu(),
        labels=y[order].cpu(),
        predicted=seen[order].cpu(),
        predicted_adv=seen_adv[order].cpu(),
        traces=_traces(classifier, x[order], x_adv[order]),
        class_names=class_names,
    )


def _seen(model: nn.Module, x: Tensor, y: Tensor, *, draws: int, seed: int) -> Tensor:
    """Predicted classes: the label, unless most draws are wrong; then their most frequent class."""
    rounds = []
    for draw in range(draws):
        drawn = SampleSeeds([seed]).derived("gallery draw", draw).single()
        logits = scored(model, x, y, seed=drawn)
        rounds.append(nn.functional.one_hot(logits.argmax(1), logits.shape[1]))
    votes = torch.stack(rounds).sum(0)
    of_label = votes.gather(1, y[:, None])[:, 0]
    others = votes.scatter(1, y[:, None], -1).argmax(1)
    return torch.where(2 * (draws - of_label) > draws, others, y)


def _traces(model: nn.Module, x: Tensor, x_adv: Tensor) -> Traces:
    """Both runs, as far as neurons can be followed."""
    with seeded_network(model, 0, x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of neurons that cannot be followed
        try:
            return spike_traces(model, x, x_adv)
        except (ValueError, RuntimeError):  # there is no neuron to follow, or none that runs
            return Traces()


def _draw_image(axes: Any, image: Tensor) -> None:
    """An image, or event frames, without ticks and grid."""
    drawable = _drawable(image).numpy()
    axes.imshow(drawable, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def _drawable(image: Tensor) -> Tensor:
    """[H, W] or [H, W, 3] in [0, 1]: events of all steps together, more than three channels as
    their mean.
    """
    image = image.float()
    if image.ndim == 4:  # steps of event frames
        image = image.mean(0)
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    if len(image) == 1:
        return image[0]
    return image.permute(1, 2, 0)
