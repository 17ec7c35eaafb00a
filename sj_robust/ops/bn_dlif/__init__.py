"""Batch norm and the DLIF neurons behind it as one operator."""

from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step, can_fuse
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeat_step

__all__ = ["BatchNorm", "batch_norm_dlif_multi_step", "can_fuse", "repeat_step"]
