"""Proofs about a network's predictions: images whose class no perturbation within a radius changes,
and the certified radius of randomised smoothing.
"""

from sj_robust.proofs.no_flip import no_flip_radius
from sj_robust.proofs.smoothing import SmoothedClassifier, smooth
from sj_robust.proofs.soundness import UnsoundBoundsError
from sj_robust.proofs.verification import verify

__all__ = ["SmoothedClassifier", "UnsoundBoundsError", "no_flip_radius", "smooth", "verify"]
