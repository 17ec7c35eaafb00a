"""Names of the data sets, which options are checked against before torch is imported."""

__all__ = ["DATASETS", "EVENT_DATASETS", "IMAGE_FOLDER", "check_dataset"]

IMAGE_FOLDER = "image_folder:"
EVENT_DATASETS = {
    "cifar10_dvs": ("CIFAR10DVS", 10),
    "dvs128_gesture": ("DVS128Gesture", 11),
    "n_mnist": ("NMNIST", 10),
}
"""Names, each with SpikingJelly's class and the number of classes."""
DATASETS = (
    "digits",
    "fashion_mnist",
    "mnist",
    "cifar10",
    "cifar100",
    "svhn",
    f"{IMAGE_FOLDER}PATH",
    *EVENT_DATASETS,
)
"""Names that :func:`sj_robust.data.load_images` takes."""


def check_dataset(name: str) -> None:
    """Raise ValueError unless it is a name of :data:`DATASETS`."""
    if name not in DATASETS and not name.startswith(IMAGE_FOLDER):
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
