"""Diagnosis of gradient masking: what each check measures, and its text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.core.checks import check_count, check_images, check_labels, check_model
from sj_robust.core.preserved import from_reset
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.diagnosis._probe import Probe
from sj_robust.evaluation.diagnosis.activity import LayerActivity, firing
from sj_robust.evaluation.intervals import (
    extent,
    paired_difference_interval,
    wilson_interval,
)
from sj_robust.evaluation.run.estimator_search import EstimatorTrial
from sj_robust.evaluation.run.member import check_estimator
from sj_robust.evaluation.run.plain import plain_copy

__all__ = ["ESTIMATORS_COMPARED", "THRESHOLDS", "Finding", "diagnose", "estimators_searched"]

ESTIMATORS_COMPARED = ("triangle:0.5", "triangle:1", "atan:4", "assg")
"""Gradient estimators that :func:`diagnose` compares with the training surrogate unless told
otherwise.
"""


THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {
        "clean_errors": 0.9,
        "random_outputs": 0.0,
        "other_answers": 0.05,
        "silent_layers": 0.95,
        "saturated_layers": 0.5,
        "zero_gradients": 0.5,
        "tiny_gradients": 0.1,
        "flat_loss": 0.1,
        "saturated_loss": 0.1,
        "loss_does_not_rise": 0.1,
        "gradient_of_another": 0.1,
        "gradient_of_small_steps": 0.3,
        "noise_beats_attack": 0.05,
        "single_step_beats_iterative": 0.05,
        "more_steps_fool_fewer": 0.05,
        "larger_budget_fools_fewer": 0.05,
        "unbounded_attack_fails": 0.0,
        "transfer_beats_white_box": 0.05,
        "other_estimator_stronger": 0.05,
    }
)
"""Largest value with which each finding passes: shares in [0, 1]. ``clean_errors`` is relative to
guessing; a share of images beside it fails only if its 95 % interval lies above."""


@dataclass(frozen=True)
class Finding:
    """One symptom of gradient masking, measured. 一项梯度掩蔽诊断结果。

    Attributes:
        name: Name of the symptom, a key of ``THRESHOLDS``.
        value: Extent of the symptom in [0, 1]; the lower the better.
        threshold: Largest value that passes.
        passed: Whether ``value <= threshold``; for a share of images, whether its 95 % interval
            includes such values.
        meaning: What was measured and what it means, in words and numbers.
        remedy: What to do if it fails.
        count: Number of images with the symptom; None if it is not a share of images.
        total: Number of images examined.

    Examples:
        >>> print(Finding("zero_gradients", 0.75, 0.5, False, "75 % are zero.", "Try others."))
        FAILED zero_gradients: 0.75 (limit 0.5). 75 % are zero. Try others.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    meaning: str
    remedy: str
    count: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        state, remedy = ("passed", "") if self.passed else ("FAILED", f" {self.remedy}")
        return (
            f"{state} {self.name}: {self.extent} (limit {self.threshold:.3g}). "
            f"{self.meaning}{remedy}"
        )

    @property
    def extent(self) -> str:
        """The value, with its count and interval if it is a share of images."""
        return extent(self.value, self.count, self.total)


def diagnose(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    estimators: Sequence[str] | None = (),
    source: nn.Module | None = None,
    plain: Model | None = None,
    steps: int = 20,
    eot_samples: int = 1,
) -> tuple[Finding, ...]:
    """Check for gradient masking. 梯度掩蔽诊断。

    Every finding has a value in [0, 1] and passes if ``value <= threshold``. A passed check proves
    nothing; if one fails, do not report accuracies under gradient attacks.

    Equation: comparisons are per image, ``value = mean_n [weaker attack fools n and stronger attack
    does not]`` over correctly classified images. The attacks are PGD from the clean image with
    ``step_size = 2.5 * eps / steps``, and APGD on cross entropy for the estimators.

    Args:
        model: Images [N, ...] in [0, 1] to logits; any network, spiking ones inside a
            ``SpikingClassifier``.
        x: A few dozen images, such as 40.
        y: Labels [N] int64.
        threat: Norm and radius, > 0.
        seed: Seeds all randomness, including that of a stochastic network; the same seed gives the
            same findings.
        estimators: Names of gradient estimators to compare with the training surrogate; the empty
            tuple uses ``ESTIMATORS_COMPARED``; None skips the comparison, which is also skipped for
            networks without spiking neurons.
        source: Network for the transfer attack, ideally trained without a defence. Without one, a
            small network is fitted to the model's outputs on noisy copies of ``x``, which gives a
            weak attack.
        plain: A copy of the network that nothing has asked yet; None makes one.
        steps: Steps of the attacks.
        eot_samples: Forwards averaged per step, for a stochastic network.

    Returns:
        The findings in a fixed order. Those on spiking layers and estimators exist only for spiking
        networks, and attacks are compared only if some images are classified correctly.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there are no images, images or labels do not fit, ``threat.eps`` is 0, a
            count is below 1, or an estimator is unknown.

    Source: Athalye et al. (ICML 2018), section 3.1; Carlini et al. (arXiv 1902.06705); the
        comparison of surrogates follows the attacks on spiking networks of Hao et al. (ICLR 2024)
        and arXiv 2512.22522.

    Examples:
        >>> weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x = torch.tensor([[0.6, 0.5], [0.9, 0.1], [0.2, 0.4], [0.3, 0.8]])
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> findings = diagnose(
        ...     lambda x: x @ weight.T, x, y, threat=ThreatModel("Linf", 0.1), seed=0
        ... )
        >>> [finding.name for finding in findings if not finding.passed]
        []
    """
    check_model(model)
    check_images(x)
    check_labels(y, x)
    check_count("steps", steps)
    check_count("eot_samples", eot_samples)
    if len(x) == 0:
        raise ValueError("x must hold at least one image, got none; a few dozen are enough")
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            f"threat must be a ThreatModel, got {type(threat).__name__}; use ThreatModel('Linf', "
            "8 / 255)"
        )
    if threat.eps == 0:
        raise ValueError("threat.eps must be > 0 to attack at all, got 0")
    if threat.of_events:
        raise ValueError(
            "threat.norm must be 'Linf' or 'L2', whose attacks move values a little, got "
            f"{threat.norm!r}"
        )
    names = (
        ESTIMATORS_COMPARED
        if estimators is not None and len(estimators) == 0
        else tuple(estimators or ())
    )
    for name in names:
        check_estimator(name)
    if plain is None and isinstance(model, nn.Module):
        plain, _ = plain_copy(model)
    activity = firing(model, x, seed=seed) if isinstance(model, nn.Module) else ()
    with (
        torch.inference_mode(False),
        from_reset(model, seed, x.device),
        from_reset(source, seed, x.device),
        from_reset(plain, seed, x.device),
    ):
        probe = Probe(
            model,
            x.detach().clone(),
            y.clone(),
            threat=threat,
            seed=seed,
            steps=steps,
            eot_samples=eot_samples,
            plain=plain,
        )
        findings = [
            clean_errors(probe),
            randomness(probe),
            answers(probe),
        ]
        if activity:
            findings += layers(activity)
        findings += [*gradients(probe), slopes(probe), slopes_far(probe)]
        if bool(probe.right.any()):
            findings += attacks(probe)
            findings.append(transfer(probe, source))
            if activity and names and probe.gradients.connected:
                findings.append(estimators_attacking(probe, names))
    return tuple(findings)


_FLAT = 0.1  # of the way to the decision boundary, which the gradient has to promise within [0, 1]
_RESOLUTION = 2.0**-23  # of float32, relative to the logits
_NAMED = 4  # of the estimators of a search, how many a finding names


def clean_errors(probe: Probe) -> Finding:
    """Errors on clean images."""
    guessing = 1 - 1 / probe.repeated.shape[2]
    errors = 1 - float(probe.right.double().mean())
    threshold = THRESHOLDS["clean_errors"] * guessing
    return Finding(
        name="clean_errors",
        value=errors,
        threshold=threshold,
        passed=errors <= threshold,
        meaning=f"The network misclassifies {errors:.0%} of the clean images; guessing "
        f"misclassifies {guessing:.0%}. A network that is wrong without an attack cannot be "
        "robust.",
        remedy="Check the weights, the normalisation and the labels before attacking.",
        count=int((~probe.right).sum()),
        total=len(probe.right),
    )


def randomness(probe: Probe) -> Finding:
    """Images whose logits differ between forward passes, which is no sign where the attacks average
    over several.
    """
    value = float(probe.random.double().mean())
    found = _share(
        "random_outputs",
        probe.random,
        f"The logits of {value:.0%} of the images differ between forward passes. The gradient "
        "of one pass is wrong for the next, so an attack that does not average is too weak.",
        "Average gradients: use eot_samples >= 3 here and in every attack, and count an image as "
        "fooled only if most of several passes misclassify it (draws of the suites).",
    )
    if probe.eot_samples == 1:
        return found
    return replace(
        found,
        threshold=1.0,
        passed=True,
        meaning=f"The logits of {value:.0%} of the images differ between forward passes. The "
        f"attacks of these checks average over {probe.eot_samples} of them.",
    )


def answers(probe: Probe) -> Finding:
    """Images whose logits depend on what was asked before, on gradients, or on their batch."""
    changed = probe.changed()
    said = [f"{place} {_percent(images)}" for place, images in changed.items()]
    return _share(
        "other_answers",
        torch.stack(list(changed.values())).any(0),
        "Share of the images whose logits, after noise or an attack, differ from those that the "
        f"network gives in a batch without gradients: {', '.join(said)}. Attacks have searched "
        "another network than the one that is judged.",
        "Let the network be one function of every image: no memory of earlier images outside of "
        "states that a reset clears, no switch on gradients, on the batch or on a place in it.",
    )


def slopes(probe: Probe) -> Finding:
    """Pieces of the network, between spiking layers, whose gradient is not that of what they
    compute.
    """
    place, cosine = min(probe.agreement.items(), key=lambda one: one[1], default=("", 1.0))
    return _finding(
        "gradient_of_another",
        min(1.0, max(0.0, 1.0 - cosine)),
        f"Behind {place} the gradient predicts what a small step changes with a cosine of "
        f"{cosine:.2f}, the lowest of all pieces between spiking layers. Surrogates have no part "
        "in these pieces, so that finite differences tell the true gradient.",
        "Look there for a custom backward pass, a hook on gradients, detach or a switch on "
        "whether gradients are enabled; attack without gradients (Square), and by transfer from "
        "a copy with plain gradients, as evaluate then does.",
    )


def slopes_far(probe: Probe) -> Finding:
    """The piece up to the first spiking layers, whose gradient changes within the radius."""
    cosine = probe.agreement_far
    return _finding(
        "gradient_of_small_steps",
        min(1.0, max(0.0, 1.0 - cosine)),
        "Up to the first spiking layers, the gradient predicts what a step of the radius changes "
        f"with a cosine of {cosine:.2f}. Surrogates have no part in it.",
        "Look there for a function that turns within the radius, such as a sine; attack without "
        "gradients (Square), as evaluate then does.",
    )


def layers(activity: Sequence[LayerActivity]) -> list[Finding]:
    """The layers that fire least and most."""
    quiet = max(activity, key=lambda layer: layer.silent)
    loud = max(activity, key=lambda layer: layer.saturated)
    return [
        _finding(
            "silent_layers",
            quiet.silent,
            f"In layer {quiet.layer!r} ({quiet.neuron}) {quiet.silent:.0%} of the neurons never "
            "fire on these images, the most of all layers. A silent neuron transmits nothing, "
            "neither images nor attacks.",
            "Lower v_threshold, scale up the input or the weights, or add batch norm before the "
            "layer, then retrain; do not report the robustness of a network with a dead layer.",
        ),
        _finding(
            "saturated_layers",
            loud.saturated,
            f"In layer {loud.layer!r} ({loud.neuron}) {loud.saturated:.0%} of the neurons fire "
            "in every step of every image, the most of all layers. Such a neuron carries no "
            "information about the image.",
            "Raise v_threshold, scale down the input or the weights, or add batch norm before the "
            "layer, then retrain.",
        ),
    ]


def gradients(probe: Probe) -> list[Finding]:
    """Findings on the gradient at the clean images."""
    found = probe.gradients
    size = found.elements.abs()
    zero = float((size == 0).double().mean())
    least = _RESOLUTION * found.spread[:, None]
    tiny = float(((size > 0) & (size < least)).double().mean())
    flat = found.reach <= _FLAT * found.margin.abs()
    saturated = found.margin > 24 * math.log(2)
    return [
        _finding(
            "zero_gradients",
            zero,
            f"{zero:.0%} of the gradient's elements are exactly zero. A gradient attack "
            "cannot move these pixels.",
            "Look for a clamp, a rounding or a saturated activation before the network, and for "
            "neurons without a gradient (wrap the network in SpikingClassifier); attack with "
            "wider surrogates (estimators atan:4, triangle:1), with the masking layer replaced "
            "by the identity in the backward pass, and with Square, which needs no gradient.",
        ),
        _finding(
            "tiny_gradients",
            tiny,
            f"{tiny:.0%} of the gradient's elements are not zero but so small that moving the "
            "pixel over its whole range would not change the logits by one float32 rounding. The "
            "sign of such an element is random.",
            "The surrogate is too narrow or an input layer is saturated: attack with wider "
            "surrogates (estimators atan:4, triangle:1), in float64, and with Square, which "
            "needs no gradient.",
        ),
        _share(
            "flat_loss",
            flat,
            f"For {_percent(flat)} of the images, the gradient predicts that even fully black or "
            "white pixels would cover less than a tenth of the distance to another class. Other "
            "classes do lie in that range, so the gradient is misleading.",
            "The surrogate is too narrow or an input layer is saturated: try other surrogates "
            "(shapes, widths), and transfer attacks from an undefended network.",
        ),
        _share(
            "saturated_loss",
            saturated,
            f"For {_percent(saturated)} of the images, the probability of the label rounds to 1 "
            "in float32, so the gradient of the cross entropy vanishes.",
            "Attack with APGD-DLR (loss='dlr'), which does not depend on the scale of the logits.",
        ),
        _rise(probe),
    ]


def _rise(probe: Probe) -> Finding:
    before = probe.losses(probe.x)
    direction = probe.gradients.elements.view_as(probe.x)
    rises = []
    for share in (0.5, 1.0, 2.0):
        moved = probe.moved(direction, share)
        rises.append(probe.losses(moved) > before)
    still = ~torch.stack(rises).any(0)
    return _share(
        "loss_does_not_rise",
        still,
        f"For {_percent(still)} of the images, the loss does not rise along the gradient, either "
        "at half the radius or at one or two radii.",
        "The gradient points in a wrong direction: attack with other estimators, with EoT if the "
        "outputs are random, and check the direction by finite differences on single images.",
    )


def attacks(probe: Probe) -> list[Finding]:
    """Findings that compare attacks on the images that are classified correctly."""
    attack, single = probe.white_box, probe.fooled(probe.single_step())
    draws = [probe.fooled(probe.noise(draw)) for draw in range(10)]
    noise = torch.stack(draws).any(0)
    long = probe.fooled(probe.attack(steps=4 * probe.steps))
    rate = probe.rate
    return [
        _comparison(
            probe,
            "noise_beats_attack",
            noise & ~attack,
            f"The best of ten draws of random noise at the full radius fools {rate(noise):.0%} "
            f"of the images, the attack fools {rate(attack):.0%}.",
            "The attack is weaker than random search: attack with other estimators, with restarts "
            "from random starts, and with Square.",
        ),
        _comparison(
            probe,
            "single_step_beats_iterative",
            single & ~attack,
            f"A single step of the full radius fools {rate(single):.0%} of the images, "
            f"{probe.steps} steps fool {rate(attack):.0%}.",
            "Iterations get stuck near the image: attack with random starts and restarts, larger "
            "steps and wider surrogates.",
        ),
        _comparison(
            probe,
            "more_steps_fool_fewer",
            attack & ~long,
            f"{probe.steps} steps fool {rate(attack):.0%} of the images, {4 * probe.steps} steps "
            f"fool {rate(long):.0%}.",
            "The attack does not converge: use APGD with restarts, which adapts its step size, "
            "and keep every iterate that fools the network.",
        ),
        *_budgets(probe, attack),
    ]


def _budgets(probe: Probe, attack: Tensor) -> Iterator[Finding]:
    """The attack with larger radii, and without one; APGD also with a smaller one."""
    eps = probe.threat.eps
    rates = [f"{probe.rate(attack):.0%} of the images at eps {eps:.3g}"]
    inner = probe.fooled(probe.strong_attack(eps=probe.inner))
    most_lost = inner & ~probe.usual  # images that fall at a radius and not at the next one
    before = attack
    for radius in (2 * eps, 4 * eps):
        if radius < probe.diameter:
            after = probe.fooled(probe.attack(eps=radius))
            lost = before & ~after
            if int(lost.sum()) > int(most_lost.sum()):
                most_lost = lost
            rates.append(f"{probe.rate(after):.0%} at {radius:.3g}")
            before = after
    yield _comparison(
        probe,
        "larger_budget_fools_fewer",
        most_lost,
        f"The attack fools {', '.join(rates)}; APGD fools {probe.rate(inner):.0%} at "
        f"{probe.inner:.3g} and {probe.rate(probe.usual):.0%} at {eps:.3g}.",
        "A larger ball contains the smaller one, so the attack fails to search it: use APGD "
        "with restarts and other estimators, and with smaller radii, whose images do not lie on "
        "the border.",
    )
    left = (~probe.fooled(probe.unbounded()))[probe.right]
    yield _share(
        "unbounded_attack_fails",
        left,
        f"{_percent(left)} of the images are still correct under an attack that may change every "
        "pixel arbitrarily, although it could draw an image of another class.",
        "The gradient does not lead to adversarial images that do exist: attack with wider "
        "surrogates, with the masking layer replaced by the identity in the backward pass, by "
        "transfer and with Square.",
    )


def transfer(probe: Probe, source: nn.Module | None) -> Finding:
    """Images crafted on another network, compared with those crafted with the network's own
    gradient.
    """
    crafting = probe.substitute() if source is None else source
    attack, transferred = probe.white_box, probe.fooled(probe.attack(source=crafting))
    origin = (
        "a substitute network fitted to the model's outputs"
        if source is None
        else "the source network"
    )
    return _comparison(
        probe,
        "transfer_beats_white_box",
        transferred & ~attack,
        f"Images crafted on {origin} fool {probe.rate(transferred):.0%}, those crafted with the "
        f"model's own gradient fool {probe.rate(attack):.0%}.",
        "The gradient of another network is more useful than the model's own: attack with other "
        "estimators, by transfer from several undefended networks and with Square, and report the "
        "worst case per image.",
    )


def estimators_attacking(probe: Probe, names: Sequence[str]) -> Finding:
    """The same attack with the training surrogate and with other gradient estimators."""
    usual = probe.usual
    found = []
    skipped = ""
    for name in ("training", *names):
        try:
            fooled = usual if name == "training" else probe.fooled(probe.strong_attack(name))
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            skipped += f" {name} could not be tried: {error}."
            continue
        trial = EstimatorTrial(
            name,
            robust_accuracy=1 - probe.rate(fooled),
            margin=0.0,  # which is not compared, nor is the time
            seconds=0.0,
            images=int(probe.right.sum()),
            gained=int((fooled & ~usual).sum()),
            lost=int((usual & ~fooled).sum()),
        )
        found.append(trial)
    return _estimators_compared(found, skipped)


def estimators_searched(trials: Sequence[EstimatorTrial]) -> list[Finding]:
    """The same from a search, which has run these attacks; nothing if it could try no other
    estimator. Those that only the short attack tried are not compared with the others.
    """
    usual = next((trial for trial in trials if trial.estimator == "training"), None)
    if usual is None:
        return []
    others = [
        trial
        for trial in trials
        if not trial.note and trial.steps == usual.steps and trial is not usual
    ]
    if not others:
        return []
    others.sort(key=lambda trial: trial.lost - trial.gained)
    return [_estimators_compared([usual, *others[:_NAMED]])]


def _estimators_compared(found: Sequence[EstimatorTrial], skipped: str = "") -> Finding:
    """What is left of the same images with each estimator, that of the training among them."""
    best = max(found, key=lambda one: one.gained - one.lost)
    listed = ", ".join(f"{one.estimator} {one.robust_accuracy:.0%}" for one in found)
    return _finding(
        "other_estimator_stronger",
        (best.gained - best.lost) / best.images,
        f"Accuracy under the same attack by gradient estimator, on correctly classified images: "
        f"{listed}. The training surrogate overstates robustness by the difference from the "
        f"lowest.{skipped}",
        "Report the worst case over estimators (suites fast and standard), not the attack with "
        f"the training surrogate alone; start with {best.estimator}.",
        lowest=paired_difference_interval(best.gained, best.lost, best.images)[0],
    )


def _finding(
    name: str, value: float, meaning: str, remedy: str, *, lowest: float | None = None
) -> Finding:
    """A finding that fails if its value, or the lower end of its interval (``lowest``), is above
    the threshold.
    """
    threshold = THRESHOLDS[name]
    return Finding(
        name=name,
        value=value,
        threshold=threshold,
        passed=(value if lowest is None else lowest) <= threshold,
        meaning=meaning,
        remedy=remedy,
    )


def _share(name: str, shown: Tensor, meaning: str, remedy: str) -> Finding:
    """A finding on the share of the images that show something, [N] bool."""
    count, total = int(shown.sum()), len(shown)
    lowest, _ = wilson_interval(count, total)
    found = _finding(name, count / total, meaning, remedy, lowest=lowest)
    return replace(found, count=count, total=total)


def _comparison(probe: Probe, name: str, weaker: Tensor, meaning: str, remedy: str) -> Finding:
    """A finding on the correctly classified images that only the weaker attack breaks."""
    alone = weaker[probe.right]
    return _share(
        name, alone, f"{meaning} {_percent(alone)} are fooled by the weaker attack only.", remedy
    )


def _percent(shown: Tensor) -> str:
    return f"{shown.double().mean():.0%}"
