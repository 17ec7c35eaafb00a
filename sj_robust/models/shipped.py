"""Trained networks by name, each with a card of its measured robustness."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import did_you_mean
from sj_robust.core.folders import check_folder
from sj_robust.core.saved import markdown_table, whole_file
from sj_robust.core.shown import Shown
from sj_robust.models.build import NetworkSpec, build_classifier
from sj_robust.models.checkpoint import load_checkpoint
from sj_robust.models.weights import as_named_in

__all__ = ["PretrainedCard", "pretrained", "pretrained_file", "pretrained_networks"]

RELEASE = ""
"""The release that holds the networks that are too large for the wheel,
https://github.com/OWNER/NAME/releases/download/assets; empty until one is published.
"""
ADDRESS_VARIABLE = "SJ_ROBUST_ASSETS"
"""Environment variable with an address that takes the place of the release's, such as a mirror."""

_FOLDER = Path(__file__).with_name("trained")
_PATIENCE = 30.0  # seconds without an answer


@dataclass(frozen=True, repr=False)
class PretrainedCard(Shown):
    """Description of a trained network. 预训练网络的说明卡。

    Attributes:
        name: Its name for :func:`pretrained`.
        summary: Neuron and training in a few words.
        command: Command of this repository that trained it.
        clean: Clean accuracy in per cent.
        at_most: Upper bound of the robust accuracy, after every attack of the suite and its
            control, in per cent.
        at_least: Lower bound of the robust accuracy, the share of proved images, in per cent.
        found: Verdict of the evaluation: bounds, threat, images, suite and caveats.
        size: Bytes of the file.
        sha256: SHA-256 of the file.
        made_with: Versions and commit.
    """

    name: str
    summary: str
    command: str
    clean: float
    at_most: float
    at_least: float
    found: str
    size: int
    sha256: str
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Name, summary and verdict of the evaluation."""
        return f"{self.name}, {self.summary}: clean {self.clean} %. {self.found}"

    def table(self) -> str:
        """The whole result as Markdown."""
        values = asdict(self)
        made_with = values.pop("made_with")
        rows = [[name, str(value)] for name, value in values.items()]
        rows += [[name, str(value)] for name, value in made_with.items()]
        return markdown_table(["", "value"], rows)


def pretrained(name: str) -> SpikingClassifier:
    """Load a trained network, for examples and comparisons. 加载预训练网络。

    A network that is not in the package is downloaded once and kept in ``sj_robust`` in
    ``torch.hub.get_dir()``; the environment variable ``SJ_ROBUST_ASSETS`` can name the URL of a
    mirror.

    Shapes: images in [0, 1] to logits [N, 10]; [N, 1, 8, 8] of the digits of scikit-learn, [N, 1,
        28, 28] of MNIST and Fashion-MNIST, [N, 3, 32, 32] of CIFAR-10.

    Args:
        name: One of :func:`pretrained_networks`, such as ``"digits/dlif-at-mppd"``.

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        ValueError: If there is no such network; the message lists the available ones. Also if the
            checksum of a downloaded file is not that of the card.
        OSError: If a file cannot be downloaded.

    Source: trained by ``python recipes/studies/pretrained.py``, after Ding et al. (ICML 2024).

    Examples:
        >>> import torch
        >>> pretrained("digits/dlif-at-mppd")(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    content = load_checkpoint(pretrained_file(name))
    classifier = build_classifier(NetworkSpec(**content["description"]["network"]))
    classifier.load_state_dict(as_named_in(classifier, content["model"]))
    return classifier.eval()


def pretrained_networks() -> dict[str, PretrainedCard]:
    """The cards of all trained networks, by name. 预训练网络列表。

    Examples:
        >>> pretrained_networks()["digits/lif"].at_least
        0.0
    """
    cards: dict[str, dict[str, Any]] = json.loads(
        (_FOLDER / "cards.json").read_text(encoding="utf-8")
    )
    return {name: PretrainedCard(name, **card) for name, card in cards.items()}


def pretrained_file(name: str) -> Path:
    """Checkpoint of a trained network; raises as :func:`pretrained`."""
    known = pretrained_networks()
    if name not in known:
        raise ValueError(
            f"there is no pretrained network {name!r}; choose one of {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    inside = _FOLDER / f"{name}.pt"
    return inside if inside.exists() else _downloaded(known[name])


def _downloaded(card: PretrainedCard) -> Path:
    """The file of a network that is not in the package, from torch's folder or from the release."""
    folder = Path(torch.hub.get_dir(), "sj_robust")
    file = folder / f"{card.name.replace('/', '-')}-{card.sha256[:8]}.pt"
    if not file.exists():
        check_folder("TORCH_HOME", folder)
        folder.mkdir(parents=True, exist_ok=True)
        base = os.environ.get(ADDRESS_VARIABLE) or RELEASE
        address = f"{base.rstrip('/')}/{file.name}"
        try:
            with urlopen(address, timeout=_PATIENCE) as answer, whole_file(file) as copy:
                shutil.copyfileobj(answer, copy)
        except (OSError, HTTPException, ValueError) as error:
            raise OSError(
                f"{card.name} is not in the package and cannot be downloaded from {address} "
                f"({error}); try again online, set {ADDRESS_VARIABLE} to the address of another "
                f"folder, or put the file there by hand: {file}"
            ) from error
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != card.sha256:
        file.unlink(missing_ok=True)
        raise ValueError(
            f"{file} must have the SHA-256 {card.sha256} of the card, got {found}; it was "
            f"removed, so try again, with another address in {ADDRESS_VARIABLE} if need be"
        )
    return file
