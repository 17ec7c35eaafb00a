"""Names of the data sets, to check options before torch is imported."""

__all__ = [
    "AUGMENTED",
    "DATASETS",
    "EVENT_DATASETS",
    "IMAGE_FOLDER",
    "RECORDINGS",
    "SACCADES",
    "check_dataset",
]

IMAGE_FOLDER = "image_folder:"
RECORDINGS = {
    "cifar10_dvs": ("CIFAR10DVS", 10),
    "dvs128_gesture": ("DVS128Gesture", 11),
    "n_mnist": ("NMNIST", 10),
}
"""Recordings of event cameras, each with SpikingJelly's class and the number of classes."""
SACCADES = {
    "saccade:digits": "digits",
    "saccade:mnist": "mnist",
    "saccade:fashion_mnist": "fashion_mnist",
}
"""Events made from images, each with the name of the images."""
EVENT_DATASETS = (*RECORDINGS, *SACCADES)
"""Names of all event data, whose samples are binary frames [T, 2, H, W]."""
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


AUGMENTED = ("cifar10", "cifar100")
"""Names of data sets whose training images are augmented unless one says otherwise."""


def check_dataset(name: str) -> None:
    """Raise ValueError unless it is a name of :data:`DATASETS`."""
    if name not in DATASETS and not name.startswith(IMAGE_FOLDER):
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
