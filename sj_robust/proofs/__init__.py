"""What is proved of a network's class: images that no perturbation can turn, and the radius of a
vote.
"""

from sj_robust.proofs.no_flip import no_flip_radius
from sj_robust.proofs.smoothing import SmoothedClassifier, Smoothing, smooth
from sj_robust.proofs.soundness import UnsoundBoundsError
from sj_robust.proofs.verification import BoundedLayer, Verification, verify

__all__ = [
    "BoundedLayer",
    "SmoothedClassifier",
    "Smoothing",
    "UnsoundBoundsError",
    "Verification",
    "no_flip_radius",
    "smooth",
    "verify",
]
