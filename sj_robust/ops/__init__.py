"""Fast operators, each with a plain reference implementation; they depend on torch, not on
SpikingJelly.
"""

import sj_robust.ops.bn_dlif.operator  # noqa: F401  # torch knows it from here on
from sj_robust.ops.dlif.config import Surrogate
from sj_robust.ops.dlif.operator import available_backends, dlif_multi_step
from sj_robust.ops.heap import keep_heap

__all__ = ["Surrogate", "available_backends", "dlif_multi_step", "keep_heap"]
