"""Networks that are too large for the wheel, downloaded from a release."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

from sj_robust.core.folders import check_folder

__all__ = ["Asset", "fetch"]

RELEASE = ""
"""The release that holds all assets, https://github.com/OWNER/NAME/releases/download/assets; empty
until one is published.
"""
ADDRESS_VARIABLE = "SJ_ROBUST_ASSETS"
"""Environment variable with an address that takes the place of the release's, such as a mirror."""

_PATIENCE = 30.0  # seconds without an answer
_BLOCK = 2**18  # bytes
_PARTIAL = 206  # status of an answer that begins where it was asked to


@dataclass(frozen=True)
class Asset:
    """A file of the release. 发布附件。

    Attributes:
        name: The network's name.
        size: Its bytes.
        sha256: Its digest.

    Examples:
        >>> Asset("cifar10/large", 4, "9f86d081884c7d65").file_name
        'cifar10-large-9f86d081.pt'
    """

    name: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name in the release and in the cache; other content has another name."""
        return f"{self.name.replace('/', '-')}-{self.sha256[:8]}.pt"


def fetch(asset: Asset) -> Path:
    """The file of an asset, from the cache or from the release. 下载并缓存权重文件。

    The cache is the folder ``sj_robust`` in ``torch.hub.get_dir()``, which ``TORCH_HOME`` moves.
    One process fetches, others wait for it. What a lost connection leaves is continued, at once or
    in the next call. (``torch.hub`` and pooch start again, so the transfer is written out here.)

    Raises:
        OSError: If the file is not in the cache and cannot be downloaded.
        ValueError: If it has another digest, and it is then removed; or if the cache cannot be
            written.
    """
    folder = Path(torch.hub.get_dir(), "sj_robust")
    file = folder / asset.file_name
    if not file.exists():
        check_folder("TORCH_HOME", folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():  # no other process has fetched it meanwhile
                _download(asset, file)
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != asset.sha256:
        file.unlink(missing_ok=True)
        raise ValueError(
            f"{file} must have the SHA-256 {asset.sha256} of the card, got {found}; it was "
            f"removed, so try again, with another address in {ADDRESS_VARIABLE} if need be"
        )
    return file


def _download(asset: Asset, file: Path) -> None:
    """Fetch a file under the name ``.part``, as long as every attempt brings it further."""
    base = os.environ.get(ADDRESS_VARIABLE) or RELEASE
    address = f"{base.rstrip('/')}/{asset.file_name}"
    part = file.with_suffix(".part")
    size = _size(part)
    while size < asset.size:
        before = size
        try:
            _continue(asset, address, part)
            reason = "the connection ended early"
        except (OSError, HTTPException, ValueError) as error:
            reason = str(error)
        size = _size(part)
        if size <= before:
            raise OSError(
                f"{asset.name} is not in the package and cannot be downloaded from {address} "
                f"({reason}); try again online, set {ADDRESS_VARIABLE} to the address of another "
                f"folder, or put the file there by hand: {file}"
            )
    part.replace(file)


def _continue(asset: Asset, address: str, part: Path) -> None:
    """Append what is missing; all of it anew if the server only sends whole files."""
    begun = _size(part)
    request = urllib.request.Request(address, headers={"Range": f"bytes={begun}-"})
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        if answer.status != _PARTIAL:
            begun = 0
        coming = int(answer.headers.get("Content-Length", asset.size - begun))
        if begun + coming != asset.size:
            raise OSError(f"the file there has {begun + coming} bytes instead of {asset.size}")
        bar = tqdm(
            desc=f"downloading {asset.name}",
            total=asset.size,
            initial=begun,
            unit="B",
            unit_scale=True,
            disable=None,  # shown on a terminal alone
        )
        with bar, part.open("ab" if begun else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
