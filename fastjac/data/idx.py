"""IDX, the file format of MNIST and its kin: a header of sizes, then bytes.

Two zero bytes, the type (8: unsigned bytes), the number of dimensions, each size as a big-endian int32,
the values in C order (http://yann.lecun.com/exdb/mnist). Files may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy
import torch
from torch import Tensor

from fastjac.errors import FastjacError


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 values of ``path``, which must have ``dims`` dimensions.

    Raises :class:`FastjacError`, naming the file, if it is compressed and damaged, of another format
    or type, or shorter or longer than its header says.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise FastjacError(f"{path} is damaged: {error}") from error
    expected = bytes([0, 0, 8, dims])
    start = 4 + 4 * dims
    if data[:4] != expected or len(data) < start:
        raise FastjacError(
            f"{path} is not an IDX file of unsigned bytes in {dims} dimensions: expected it to begin "
            f"with {expected.hex()}, got {data[:4].hex() or 'an empty file'}"
        )
    shape = numpy.frombuffer(data, ">i4", dims, 4).tolist()
    if len(data) - start != (size := math.prod(shape)):
        raise FastjacError(
            f"{path} is truncated or damaged: its header promises {size} values, "
            f"{len(data) - start} are there"
        )
    values = numpy.frombuffer(data, numpy.uint8, offset=start).copy()
    return torch.from_numpy(values).view(shape)
