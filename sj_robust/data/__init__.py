"""Data sets with a held-out validation split, augmentation, and batches in a reproducible order."""

from sj_robust.data.augmentation import Augmentation
from sj_robust.data.batches import ShuffledBatches, image_loader
from sj_robust.data.images import ImageSplits, load_images
from sj_robust.data.torchvision_sets import CIFAR_STATISTICS

__all__ = [
    "CIFAR_STATISTICS",
    "Augmentation",
    "ImageSplits",
    "ShuffledBatches",
    "image_loader",
    "load_images",
]
