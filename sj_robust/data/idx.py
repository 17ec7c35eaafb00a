"""The IDX file format of MNIST and its successors."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_idx"]


def read_idx(path: Path) -> Tensor:
    """The unsigned bytes of an IDX file, gzipped (name ends in ``.gz``) or not. 读取 IDX 文件。

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions, every dimension as a big-endian
    32-bit integer, then the values with the last dimension fastest.

    Args:
        path: The file.

    Returns:
        A uint8 tensor in the shape that the file states.

    Raises:
        ValueError: If the file is damaged, of another type or of another length than it states.

    Source: the format description that comes with MNIST.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch the file again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes (begin 00 00 08), got {content[:4].hex(' ')}")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:header]) if len(content) >= header else ()
    if len(content) != header + math.prod(shape) or len(shape) != dimensions:
        raise ValueError(
            f"{path} states the shape {shape} and must be {header + math.prod(shape)} bytes long, got {len(content)}; "
            "fetch the file again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
