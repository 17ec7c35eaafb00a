"""Fast operators, each with a plain reference beside it; knows torch and nothing of
SpikingJelly.
"""

from sj_robust.ops import bn_dlif as bn_dlif  # whose operators torch knows from here on
from sj_robust.ops.dlif.dispatch import (
    BACKENDS,
    available_backends,
    check_backend,
    choose_backend,
    dlif_multi_step,
)
from sj_robust.ops.heap import keep_heap
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "BACKENDS",
    "Surrogate",
    "available_backends",
    "check_backend",
    "choose_backend",
    "dlif_multi_step",
    "keep_heap",
]
