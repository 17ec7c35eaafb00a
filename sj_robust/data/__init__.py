"""Image data sets with a held-out validation split, and batches in a reproducible order."""

from sj_robust.data.batches import ShuffledBatches, image_loader
from sj_robust.data.images import DATASETS, ImageSplits, load_images

__all__ = ["DATASETS", "ImageSplits", "ShuffledBatches", "image_loader", "load_images"]
