"""The training objective: cross entropies of clean and perturbed images, and MS-MPPD."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.preserved import RandomNumbers, from_reset, seeded_network
from sj_robust.core.threat import Threat
from sj_robust.defences.penalty import ForwardPasses, Penalty
from sj_robust.perturbation import MPPDMonitor
from sj_robust.perturbation.pair import Indicator, NotFollowedError
from sj_robust.training.certified import CertifiedLoss, CertifiedOptions

__all__ = ["LossName", "Losses", "Objective"]

LossName = Literal["paper", "trades", "certified"]


class Losses(NamedTuple):
    """The parts of the objective for one batch, scalars; only ``total`` has a graph.

    Attributes:
        total: The loss that is minimised.
        clean: Cross entropy of the clean images; 0 if the objective does not run them.
        perturbed: Cross entropy of the perturbed images; 0 if there are none, or if the objective
            does not run them.
        mppd: MS-MPPD, or the indicator used instead, before weighting; 0 if it has no weight.
        certified: Cross entropy of the worst logits that the bounds allow; 0 without bounds.
        accuracy: Share of the clean images that are classified correctly; 0 if they do not run.
        accuracy_perturbed: The same of the perturbed images.
        accuracy_certified: Share of the images that keep their class under any perturbation,
            according to these bounds.
        penalty: Sum of all penalties with their weights.
    """

    total: Tensor
    clean: Tensor
    perturbed: Tensor
    mppd: Tensor
    certified: Tensor
    accuracy: Tensor
    accuracy_perturbed: Tensor
    accuracy_certified: Tensor
    penalty: Tensor


class Objective(nn.Module):
    """Loss of a classifier on clean and perturbed images. 干净与扰动图像上的训练目标。

    Equation, with loss ``"paper"``, ``"trades"`` and ``"certified"``::

        L = kappa * CE(f(x), y) + (1 - kappa) * CE(f(x~), y)   + R
        L = CE(f(x), y) + trades_weight * KL(f(x) || f(x~))    + R
        L = k * CE(f(x), y) + (1 - k) * CE(z, y)               + R
        R = rho * MS-MPPD + sum of weight * penalty

    Without perturbed images it is ``CE(f(x), y)`` plus the penalties, except for ``"certified"``. z
    are the worst logits that the bounds over a ball allow (:class:`CertifiedLoss`; its options may
    use boxes instead of the ball, and perturbed images instead of clean ones), ``1 - k`` is ``1 -
    kappa`` times its ramp, and there is always a clean pass. The divergence is that of the softmax
    distributions, averaged over the batch, with a gradient through both arguments. MS-MPPD can be
    replaced by the mean square (or mean absolute value, see ``norm``) of a difference of spikes,
    see :meth:`MPPDMonitor.loss`: ``s[t] - s~[t]`` for ``"std"``, ``mean_t s - mean_t s~`` for
    ``"tasad"``, both through the surrogate. The clean pass is a constant in all three.

    Both passes run in the module's own mode, the clean one first, so in training mode batch norm
    sees one after the other. Passes that a term compares draw the same random numbers. A pass that
    no term needs is skipped: the clean one for kappa 0 and rho 0, the perturbed one for kappa 1 and
    rho 0.

    Shapes: images [N, C, H, W] or frames [N, T, C, H, W], labels [N]; the parts are scalars. Both
    passes happen inside one ``forward``, so that DDP reduces every gradient once.

    Args:
        classifier: The network to train.
        kappa: Weight of the clean cross entropy, in [0, 1]; not used by ``"trades"``.
        rho: Weight of MS-MPPD, >= 0; with 0, the monitor is not used.
        layers: ``"last"`` (the spiking layer executed last), ``"all"``, or names of spiking layers.
        norm: ``"l2"`` for the mean square, ``"l1"`` for the mean absolute value.
        input_gain: Whether DLIF's learnable gain is part of the perturbation; the paper omits it.
        loss: ``"paper"``, ``"trades"`` or ``"certified"``.
        trades_weight: Weight of the divergence, >= 0 (the 1/lambda of TRADES).
        indicator: ``"mppd"``, ``"tasad"`` or ``"std"``.
        penalties: Further terms, each with its weight; those with weight 0 are skipped.
        certified_eps: Linf radius or threat model of the bounds at the end of the training; only
            for ``"certified"``.
        certified_options: Options of certified training.

    Attributes:
        certified: The part with the bounds, whose ``progress`` is set by the training; None for
            other losses.
        penalty_values: Value of every penalty in the last forward before weighting, by name,
            without a graph.

    Raises:
        ValueError: If no parameter requires a gradient or one in half precision does, a weight is
            out of range, a name is unknown, two penalties have the same name, or the radius is
            missing or out of range; for ``"certified"``, if there are no bounds for a part of the
            network.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), section 4; kappa 0.5
        and rho 1. Zhang et al., "Theoretically Principled Trade-off between Robustness and
        Accuracy" (ICML 2019); weight 6.

    Examples:
        >>> import torch
        >>> from sj_robust.models import NetworkSpec, build_network
        >>> objective = Objective(SpikingClassifier(build_network(NetworkSpec()), T=4))
        >>> x, y = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
        >>> bool(objective(x, y, x + 0.1).total > 0)
        True
    """

    def __init__(
        self,
        classifier: SpikingClassifier,
        *,
        kappa: float = 0.5,
        rho: float = 1.0,
        layers: Literal["last", "all"] | Sequence[str] = "last",
        norm: Literal["l2", "l1"] = "l2",
        input_gain: bool = False,
        loss: LossName = "paper",
        trades_weight: float = 6.0,
        indicator: Indicator = "mppd",
        penalties: Sequence[Penalty] = (),
        certified_eps: Threat | None = None,
        certified_options: CertifiedOptions = CertifiedOptions(),  # noqa: B008  # frozen
    ) -> None:
        """Attach the monitor if the objective needs one; see the class."""
        super().__init__()
        _check_trainable(classifier.net)
        if not 0.0 <= kappa <= 1.0:
            raise ValueError(
                f"kappa must be in [0, 1], got {kappa}; it is the weight of the clean images"
            )
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be >= 0 and finite, got {rho}; 0 turns MS-MPPD off")
        if not 0.0 <= trades_weight < float("inf"):
            raise ValueError(
                f"trades_weight must be >= 0 and finite, got {trades_weight}; TRADES uses 6"
            )
        for name, value, known in (
            ("norm", norm, ("l2", "l1")),
            ("loss", loss, get_args(LossName)),
            ("indicator", indicator, get_args(Indicator)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        names = [penalty.name for penalty in penalties]
        if len(set(names)) < len(names):
            raise ValueError(
                f"penalties must differ in name, got {', '.join(names)}; omit one of them"
            )
        if (certified_eps is None) == (loss == "certified"):
            raise ValueError(
                f"certified_eps belongs to loss 'certified' and to no other, got {certified_eps} "
                f"for {loss!r}; give both or neither"
            )
        self.classifier = classifier
        self.certified = None
        if certified_eps is not None:
            self.certified = CertifiedLoss(classifier, certified_eps, certified_options)
        self.kappa = kappa
        self.rho = rho
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.norm: Literal["l2", "l1"] = norm
        self.input_gain = input_gain
        self.loss: LossName = loss
        self.trades_weight = trades_weight
        self.indicator: Indicator = indicator
        self.penalties = tuple(penalty for penalty in penalties if penalty.weight > 0)
        self.penalty_values: dict[str, Tensor] = {}
        self.monitor: MPPDMonitor | None = None
        if rho > 0:
            self.monitor = MPPDMonitor(
                classifier.net, layers=self.layers, keep="loss", spikes=indicator != "mppd"
            )

    def check_layers(self, x: Tensor) -> None:
        """Raise an error for layers that cannot be followed and penalties that do not fit the
        network, by running it on ``x``; nothing else changes.

        Afterwards the monitor knows which layer is executed last, and follows only that one from
        the first step.

        Raises:
            ValueError: If a layer cannot be followed, a penalty needs other layers than the network
                has, or the loss needs bounds that do not exist.
        """
        if self.certified is not None:
            self.certified.check(x)
        if self.monitor is not None:
            try:
                with seeded_network(self.classifier, 0, x.device):
                    self.monitor.compare(x, x, forward=self.classifier)
            except NotFollowedError as error:
                raise ValueError(
                    f"MS-MPPD cannot be measured in this network ({error}); train without it, by "
                    "rho 0 (--rho 0)"
                ) from error
            self.monitor.clear_recorded_data()
        if self.penalties:
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            with from_reset(self.classifier, 0, x.device):
                passes = self._run(x, labels, None)
                for penalty in self.penalties:
                    penalty.value(passes)

    def forward(self, x: Tensor, y: Tensor, x_perturbed: Tensor | None = None) -> Losses:
        """The parts of the objective for images ``x`` with labels ``y``; without perturbed images,
        the plain cross entropy.
        """
        if self.certified is not None and self.certified.options.attacked:
            if x_perturbed is None:
                raise ValueError("attacked needs perturbed images; give an attack")
            x_perturbed = self.certified.clamped(x, x_perturbed)
        passes = self._run(x, y, x_perturbed)
        zero = torch.zeros((), dtype=passes.first[1].dtype, device=x.device)
        clean = perturbed = certified = mppd = penalty = zero
        accuracy = accuracy_perturbed = accuracy_certified = zero
        if passes.logits is not None:
            clean, accuracy = F.cross_entropy(passes.logits, y), _accuracy(passes.logits, y)
        if passes.logits_perturbed is not None:
            perturbed = F.cross_entropy(passes.logits_perturbed, y)
            accuracy_perturbed = _accuracy(passes.logits_perturbed, y)
        if self.certified is not None:
            total = perturbed if self.certified.options.attacked else clean
            weight = (1 - self.kappa) * self.certified.ramp
            if weight > 0:
                certified, accuracy_certified = self.certified.value(x.detach(), y, x_perturbed)
            if weight == 1:  # nothing goes back through the other pass
                total = certified
            elif weight > 0:
                total = (1 - weight) * total + weight * certified
        elif x_perturbed is None:
            total = clean
        elif self.loss == "trades":
            assert passes.logits is not None
            assert passes.logits_perturbed is not None
            total = clean + self.trades_weight * _divergence(passes.logits, passes.logits_perturbed)
        else:
            total = self.kappa * clean + (1 - self.kappa) * perturbed
        if self.monitor is not None and x_perturbed is not None:
            mppd = self.monitor.loss(
                self.layers, self.norm, self.input_gain, indicator=self.indicator, retain=False
            )
            total = total + self.rho * mppd
        self.penalty_values = {}
        for term in self.penalties:
            value = term.value(passes)
            self.penalty_values[term.name] = value.detach()
            penalty = penalty + term.present_weight * value
        return Losses(
            total=total + penalty if self.penalties else total,
            clean=clean.detach(),
            perturbed=perturbed.detach(),
            mppd=mppd.detach(),
            certified=certified.detach(),
            accuracy=accuracy,
            accuracy_perturbed=accuracy_perturbed,
            accuracy_certified=accuracy_certified,
            penalty=penalty.detach(),
        )

    def _run(self, x: Tensor, y: Tensor, x_perturbed: Tensor | None) -> ForwardPasses:
        """The passes that the objective needs, watched by the monitor and the penalties."""
        needs_both = self.monitor is not None or self.loss == "trades"
        runs_clean = (
            x_perturbed is None or self.kappa > 0 or needs_both or self.certified is not None
        )
        weighs_perturbed = self.kappa < 1
        if self.certified is not None:
            weighs_perturbed = self.certified.options.attacked
        runs_perturbed = x_perturbed is not None and (weighs_perturbed or needs_both)
        if any(penalty.input_gradient for penalty in self.penalties):
            if runs_clean:
                x = x.detach().requires_grad_()
            elif x_perturbed is not None:
                x_perturbed = x_perturbed.detach().requires_grad_()
        logits = logits_perturbed = None
        numbers = RandomNumbers(self.classifier, x.device)
        with ExitStack() as stack:
            for penalty in self.penalties:
                stack.enter_context(penalty.observe(self.classifier))
            monitor = self.monitor if runs_perturbed else None  # which needs both passes
            if runs_clean:
                watching = nullcontext() if self.certified is None else self.certified.watching()
                with nullcontext() if monitor is None else monitor.clean(), watching:
                    logits = self.classifier(x)
            if runs_perturbed:
                watching = nullcontext() if monitor is None else monitor.perturbed()
                with watching, numbers.again() if needs_both else nullcontext():
                    logits_perturbed = self.classifier(x_perturbed)
        return ForwardPasses(
            classifier=self.classifier,
            y=y,
            x=x,
            x_perturbed=x_perturbed,
            logits=logits,
            logits_perturbed=logits_perturbed,
            same_numbers=numbers.again,
        )


def _divergence(logits: Tensor, logits_perturbed: Tensor) -> Tensor:
    """KL divergence of the perturbed distribution from the clean one, mean over the batch."""
    p, q = logits.log_softmax(1), logits_perturbed.log_softmax(1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).to(logits.dtype).mean()


def _check_trainable(net: nn.Module) -> None:
    """Raise ValueError for a network without a weight to train, or with one in half precision, in
    which small steps are lost by rounding.
    """
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    if not trained:
        raise ValueError(
            "the network must have a weight to train, got none with requires_grad; call "
            "net.requires_grad_(), or set it for the layers that are to be trained"
        )
    for name, value in trained.items():
        if value.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"weights must be float32 to be trained, got {value.dtype} in {name}, whose "
                "rounding swallows the steps; call net.float(), and for half precision train "
                'inside torch.autocast("cuda", torch.bfloat16)'
            )
