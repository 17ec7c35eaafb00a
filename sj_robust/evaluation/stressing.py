"""A network under every level of faults or corruptions, clean and attacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sj_robust.core.eps import eps_text
from sj_robust.core.preserved import preserved
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.request import Request, described
from sj_robust.evaluation.run.corruptions import Corruption, corrupted, default_corruptions
from sj_robust.evaluation.run.data import Batches, Data, check_data
from sj_robust.evaluation.run.draws import DRAWS, gradient_draws, settled_draws
from sj_robust.evaluation.run.estimator_search import short_attack, short_attack_name
from sj_robust.evaluation.run.faults import Fault, default_faults, faulty
from sj_robust.evaluation.run.identity import network_key
from sj_robust.evaluation.run.loop import Asked, run
from sj_robust.evaluation.run.member import Member
from sj_robust.evaluation.run.variant import Variant
from sj_robust.evaluation.subject import Subject

__all__ = ["stress_network"]


def stress_network(subject: Subject, batches: Batches | Data, request: Request) -> Report:
    """Measure a network under faults or corruptions and write the report. 压力测试。

    Every step is kept in the folder of the request as it ends, and a call with the same request
    continues where a killed one stopped. Several processes share the levels, and each gets the
    report. The network stays as it was: faults are those of a copy. What cannot be measured is
    named in the warnings.

    Args:
        subject: The network.
        batches: Images with labels in batches, read once.
        request: What is asked; the attack is crafted on the faulty network, or from the corrupted
            images: APGD-CE of so many steps (``flip_events`` or ``move_events`` for events).

    Raises:
        ValueError: If the network carries state from one forward into the next, or the folder holds
            the progress of another run.

    Source: as of :func:`sj_robust.evaluation.stress`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sj_robust.attacks import ThreatModel
        >>> from sj_robust.classifier import SpikingClassifier
        >>> net = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(4, 3)), T=2)
        >>> mine = Subject("mine", net, "one layer")
        >>> batches = [(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)]
        >>> few = [Fault("weight_bits", 4), Fault("first_steps", 1)]
        >>> asked = Request("stress", ThreatModel("Linf", 0.1), "noise", faults=few)
        >>> stress_network(mine, batches, asked).variants
        ('none', 'weight_bits:4', 'first_steps:1')
    """
    data = Data.of(batches)
    check_data(data, request.threat)
    faults = request.faults
    if faults is None and request.suite == "stress":
        faults = default_faults(subject.model)
    elif faults is None:
        faults = default_corruptions(data[0][0])
    kinds = {fault.kind for fault in faults}
    request.watch.say(f"{request.suite}: {len(faults)} levels of {len(kinds)} kinds")
    draws = settled_draws(subject.model, data, None)
    if draws > 1:
        request.watch.say(f"the network draws random numbers: {draws} forwards judge an image")
    network = network_key(subject.model, data, request.folder)
    with preserved(subject.model):
        outcome = run(
            subject.model,
            data,
            _variants(faults, request, draws),
            asked=Asked(request.threat, draws),
            network=network,
            folder=request.folder,
            watch=request.watch,
        )
    judged = f", judged over {draws} draws" if draws > 1 else ""
    return Report(
        **described(subject, data, request, network),
        rows=outcome.rows,
        description=f"{short_attack_name(request.threat)} {request.steps}{judged}",
        draws=request.draws or 1,
        warnings=(*subject.remarks, *outcome.warnings),
    )


def _variants(
    faults: Sequence[Fault | Corruption], request: Request, draws_of_network: int
) -> list[Variant]:
    """The network as it is, then every draw of every level."""
    first = request.seed * 2**10
    network_is_noisy = draws_of_network > 1
    attack = [_attack(request, noisy=network_is_noisy)]
    found = [Variant(attack, "none", first)]
    for fault in faults:
        name = f"{fault.kind}:{fault.level}"
        if isinstance(fault, Corruption):
            images = _Corrupted(fault, request.seed)
            found.append(Variant(attack, name, first, images=images))
            continue
        draws = (request.draws or 1) if fault.random else 1
        members = [_attack(request, noisy=fault.noisy or network_is_noisy)]
        for draw in range(draws):
            seed = first + draw
            place = name if draws == 1 else f"{name}/draw{draw}"
            network = partial(faulty, fault=fault, seed=seed, counts=request.threat.counts)
            found.append(Variant(members, place, seed, network=network, may_draw=fault.noisy))
    return found


def _attack(request: Request, *, noisy: bool) -> Member:
    threat = request.threat
    draws = gradient_draws(DRAWS, threat) if noisy else 1
    attack = short_attack(threat, request.steps, draws=draws)
    return Member(f"short@{eps_text(threat.eps)}", attack, threat=threat)


@dataclass(frozen=True)
class _Corrupted:
    """Images with a corruption."""

    corruption: Corruption
    seed: int

    def __call__(self, x: Tensor, start: int) -> Tensor:
        return corrupted(x, self.corruption, seed=self.seed, start=start)
