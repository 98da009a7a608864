"""The state of random numbers: to restore it, and to draw some without moving it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def get_states(device: torch.device) -> dict[str, Any]:
    """The states of PyTorch's generators, the CPU's and those of the kind of ``device``."""
    # Nothing where the device draws from the CPU's generator.
    states = getattr(torch.get_device_module(device), "get_rng_state_all", list)()
    return {"torch": torch.get_rng_state(), "devices": {device.type: states}}


def set_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`get_states` gave, here or in version 0.1, which kept CUDA's alone."""
    torch.set_rng_state(states["torch"])
    devices = states.get("devices", {"cuda": states.get("cuda")})
    if found := devices.get(device.type):
        torch.get_device_module(device).set_rng_state_all(found)


@contextmanager
def seeding() -> Iterator[Callable[[int], None]]:
    """A function that seeds what runs on the host: torch's generator, ``random`` and ``numpy.random``.

    When the block ends, they are as they were before it.
    """
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()  # noqa: NPY002

    def seed(number: int) -> None:
        number %= 2**32  # all that NumPy takes
        torch.default_generator.manual_seed(number)
        random.seed(number)
        numpy.random.seed(number)  # noqa: NPY002

    try:
        yield seed
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        numpy.random.set_state(before[2])  # noqa: NPY002
