"""Receptive-field arithmetic: which inputs a window of outputs sees. Pure Python, no tensors.

An output interval [a, a + n) of an operator with kernel k, stride s, padding p, dilation d needs the
input interval [a*s - p, (a + n - 1)*s - p + d*(k - 1) + 1). Going down a network from a window at r,
every interval starts at ``scale * r + offset`` and has one size, whatever r is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class KernelGeometry(NamedTuple):
    """One axis of a convolution or a pool."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """How many inputs one output spans."""
        return self.dilation * (self.kernel - 1) + 1


class Interval(NamedTuple):
    """[scale * r + offset, scale * r + offset + size) of one axis, for a window standing at r."""

    scale: int
    offset: int
    size: int

    def through(self, geometry: KernelGeometry) -> Interval:
        """The inputs that these outputs of ``window`` see."""
        return Interval(
            self.scale * geometry.stride,
            self.offset * geometry.stride - geometry.padding,
            (self.size - 1) * geometry.stride + geometry.reach,
        )

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both; they must move at one scale."""
        if self.scale != other.scale:
            raise ValueError(f"intervals move at different scales: {self.scale} and {other.scale}")
        start = min(self.offset, other.offset)
        end = max(self.offset + self.size, other.offset + other.size)
        return Interval(self.scale, start, end - start)

    def exceeds(self, length: int, positions: int) -> bool:
        """Whether it reaches outside [0, length) for some r in [0, positions)."""
        return self.offset < 0 or self.scale * (positions - 1) + self.offset + self.size > length


class Region(NamedTuple):
    """An interval on each axis of a map, rows first.

    ``axis``: the dimension of the rows, before that of the columns: 2 of ``[B, C, H, W]``, and 1 of
    ``[B, H, W, C]``.
    """

    rows: Interval
    cols: Interval
    axis: int = 2

    @classmethod
    def window(cls, size: int) -> Region:
        """The square window of ``size`` itself, at r."""
        return cls(Interval(1, 0, size), Interval(1, 0, size))

    def through(self, geometry: tuple[KernelGeometry, KernelGeometry]) -> Region:
        """The inputs that these outputs see through a window on each axis."""
        rows, cols = self.rows.through(geometry[0]), self.cols.through(geometry[1])
        return Region(rows, cols, self.axis)

    def moved(self, axis: int) -> Region:
        """The same region of a map whose rows are another dimension."""
        return Region(self.rows, self.cols, axis)

    def resized(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a crop of a map of this shape."""
        return (*shape[: self.axis], *self.shape, *shape[self.axis + 2 :])

    def map_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of a map of this shape."""
        return shape[self.axis], shape[self.axis + 1]

    def hull(self, other: Region) -> Region:
        """The smallest region that holds both."""
        if self.axis != other.axis:
            raise ValueError("it is read as [B, C, H, W] and as [B, H, W, C]")
        return Region(self.rows.hull(other.rows), self.cols.hull(other.cols), self.axis)

    def exceeds(self, shape: tuple[int, int], positions: tuple[int, int]) -> bool:
        """Whether it reaches outside a map of ``shape`` for some position of the window."""
        return self.rows.exceeds(shape[0], positions[0]) or self.cols.exceeds(
            shape[1], positions[1]
        )

    def within(self, outer: Region) -> tuple[int, int]:
        """Where this region starts in ``outer``, which holds it."""
        return self.rows.offset - outer.rows.offset, self.cols.offset - outer.cols.offset

    @property
    def scales(self) -> tuple[int, int]:
        """How far it moves when the window moves by one, on each axis."""
        return self.rows.scale, self.cols.scale

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.size, self.cols.size

    @property
    def area(self) -> int:
        """Height times width."""
        return self.rows.size * self.cols.size
