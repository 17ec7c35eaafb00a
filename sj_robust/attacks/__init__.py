"""Attacks as functions ``attack(model, x, y, *, eps, ...) -> x_adv`` on any callable model.

The following arguments, results, errors and guarantees are common to all of them; each docstring
only describes what it adds:

- ``model``: Any callable from images [N, ...] in [0, 1] to logits [N, classes] that forgets its
  past between calls: a spiking network belongs inside ``SpikingClassifier``, which resets it before
  every forward. An ``nn.Module`` is attacked in evaluation mode, and every submodule gets its own
  mode back, also after an exception; any other callable is called as it is.
- ``x``: Images [N, ...] in [0, 1], floating point.
- ``y``: Labels [N] int64.
- ``eps``: What may be changed: a Linf radius in units of [0, 1] images, such as ``8 / 255`` or
  ``"8/255"``, or a ``ThreatModel``, such as ``ThreatModel("L2", 0.5)``; for event frames, where a
  number is one of events, ``ThreatModel("L0", 5, counts=True)`` or ``ThreatModel("moves", 5,
  largest_shift=2)``. It is never exceeded, as ``ThreatModel.project`` says.
- ``steps``: Number of gradient steps of a run, >= 1.
- ``restarts``: Number of runs from different random starts, >= 1.
- ``eot_samples``: Forwards averaged at every point (expectation over transformation), for
  stochastic models. The images that are kept were judged on these forwards: score the result with
  several fresh ones.
- ``targeted``: Whether ``y`` holds target labels, so that the loss is minimised instead of
  maximised.
- ``loss``: A function of logits and labels that returns one value per sample, [N]; cross entropy by
  default.
- ``generator``: One number is drawn from it per call. This number seeds all randomness of the call,
  including the network's own use of torch's global generators. It may be on another device than
  ``x``. With ``SampleSeeds``, the random numbers of a sample depend neither on the other samples
  nor on the batch size. None uses fresh randomness in every call, independent of
  ``torch.manual_seed``.
- The result has the shape, dtype and device of ``x``, stays within the budget, and has no graph.
- The caller's ``x``, parameters, ``.grad`` and global random state are not changed.
- ``TypeError``: an argument has the wrong type, or ``x`` is not floating point. ``ValueError``:
  ``x`` is not finite or leaves [0, 1], labels or logits do not fit, or a number is out of range.
  ``RuntimeError``: no gradient reaches the images of an attack that needs it.
"""

from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.bridges import autoattack, external, transfer
from sj_robust.attacks.call import Attack
from sj_robust.attacks.events import count_flips, flip_events, random_flips
from sj_robust.attacks.gradient import fgsm, pgd, rfgsm
from sj_robust.attacks.noise import gaussian, salt_and_pepper, uniform
from sj_robust.attacks.sapgd import sapgd
from sj_robust.attacks.spike_search import spike_search
from sj_robust.attacks.square import square
from sj_robust.attacks.timing import count_moves, move_events, random_moves
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel

__all__ = [
    "Attack",
    "SampleSeeds",
    "ThreatModel",
    "apgd",
    "autoattack",
    "count_flips",
    "count_moves",
    "external",
    "fgsm",
    "flip_events",
    "gaussian",
    "move_events",
    "pgd",
    "random_flips",
    "random_moves",
    "rfgsm",
    "salt_and_pepper",
    "sapgd",
    "spike_search",
    "square",
    "transfer",
    "uniform",
]
