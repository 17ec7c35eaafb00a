"""Published defences of spiking networks, one file each, in the forms of this package."""

from sj_robust.defences.dsd import deflate_
from sj_robust.defences.rsc import SmoothingEncoder
from sj_robust.defences.stod import OrthogonalEncoder

__all__ = ["OrthogonalEncoder", "SmoothingEncoder", "deflate_"]
