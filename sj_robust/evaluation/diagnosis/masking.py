"""Diagnosis of gradient masking."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.core.checks import check_count, check_images, check_labels, check_model
from sj_robust.core.host import from_reset
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.diagnosis import _symptoms
from sj_robust.evaluation.diagnosis._probe import Probe
from sj_robust.evaluation.diagnosis._symptoms import THRESHOLDS, Finding, estimators_searched
from sj_robust.evaluation.diagnosis.activity import firing
from sj_robust.evaluation.run.member import check_estimator
from sj_robust.evaluation.run.plain import plain_copy

__all__ = ["ESTIMATORS_COMPARED", "THRESHOLDS", "Finding", "diagnose", "estimators_searched"]

ESTIMATORS_COMPARED = ("triangle:0.5", "triangle:1", "atan:4", "assg")
"""Gradient estimators that :func:`diagnose` compares with the training surrogate unless told
otherwise.
"""


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
            _symptoms.clean_errors(probe),
            _symptoms.randomness(probe),
            _symptoms.answers(probe),
        ]
        if activity:
            findings += _symptoms.layers(activity)
        findings += [*_symptoms.gradients(probe), _symptoms.slopes(probe)]
        if bool(probe.right.any()):
            findings += _symptoms.attacks(probe)
            findings.append(_symptoms.transfer(probe, source))
            if activity and names and probe.gradients.connected:
                findings.append(_symptoms.estimators_attacking(probe, names))
    return tuple(findings)
