"""What a data set holds, in one short text."""

import hashlib


def checksum(part):
    digest = hashlib.sha256()
    for image, label in part:
        digest.update(image.numpy().tobytes())
        digest.update(label.numpy().tobytes())
    return digest.hexdigest()[:16]


def checksums(splits):
    """Of training, validation and test images."""
    return [checksum(part) for part in parts(splits)]


def sizes(splits):
    """Numbers of training, validation and test images."""
    return [len(part) for part in parts(splits)]


def parts(splits):
    return (splits.train, splits.validation, splits.test)
