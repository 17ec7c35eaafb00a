"""Attacks as functions ``attack(model, x, y, *, eps, ...) -> x_adv``; they know torch and a callable.

What holds for every one of them:

- ``model`` is any callable from images [N, ...] in [0, 1] to logits [N, classes] that forgets its past between
  calls: a spiking network belongs inside ``SpikingClassifier``, which resets it before every forward.
- The result has shape, dtype and device of ``x``, lies in the budget, and carries no graph.
- The caller's ``x``, parameters, ``.grad`` and global random state stay as they were. An ``nn.Module`` is attacked
  in evaluation mode, and every submodule gets its own mode back, also after an exception; any other callable is
  called as it is.
- ``generator`` is asked for one number per call, which seeds all randomness of that call, the network's own use
  of torch's global generators included; it may live on another device than ``x``. ``SampleSeeds`` in its place make
  what is drawn for a sample independent of the samples beside it and of the batch size. Without a generator every call
  draws fresh numbers that ``torch.manual_seed`` does not govern.
"""

from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.bridges import AutoAttackWarning, autoattack, external, square, transfer
from sj_robust.attacks.call import Attack
from sj_robust.attacks.checks import check_images, check_labels
from sj_robust.attacks.events import check_frames, count_flips, flip_events, random_flips
from sj_robust.attacks.gradient import fgsm, pgd, rfgsm
from sj_robust.attacks.noise import gaussian, salt_and_pepper, uniform
from sj_robust.attacks.projection import linf_bounds, project_l2, project_linf
from sj_robust.attacks.sapgd import sapgd
from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.randomness import SampleSeeds

__all__ = [
    "Attack",
    "AutoAttackWarning",
    "SampleSeeds",
    "ThreatModel",
    "apgd",
    "autoattack",
    "check_frames",
    "check_images",
    "check_labels",
    "count_flips",
    "eps_text",
    "external",
    "fgsm",
    "flip_events",
    "gaussian",
    "linf_bounds",
    "parse_eps",
    "pgd",
    "project_l2",
    "project_linf",
    "random_flips",
    "rfgsm",
    "salt_and_pepper",
    "sapgd",
    "square",
    "transfer",
    "uniform",
]
