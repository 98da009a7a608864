"""What the CUDA library was built for, and whether this PyTorch, driver and card are such."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

_RECORD = re.compile(rb"fastjac CUDA build: (\d+) ([\d.;af+PTX]+)\0")


class Release(NamedTuple):
    """Of CUDA, or a compute capability."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def release(number: int) -> Release:
    """Of CUDA's own number for it: 12080 is 12.8."""
    return Release(number // 1000, number % 1000 // 10)


class Card(NamedTuple):
    name: str
    capability: Release


class Machine(NamedTuple):
    """The newest CUDA that the driver runs, and the cards by their index."""

    driver: Release
    cards: list[Card]


def machine() -> Machine:
    """This one; CUDA is initialised, or being so."""
    number = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    if status != 0:
        raise RuntimeError(f"cuDriverGetVersion failed with status {status}; expected 0")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cards = [Card(p.name, Release(p.major, p.minor)) for p in found]
    return Machine(release(number.value), cards)


@dataclass(frozen=True)
class CudaBuild:
    """``architectures`` as TORCH_CUDA_ARCH_LIST has them: ``8.0;9.0a;12.0+PTX``."""

    toolkit: Release
    architectures: str

    @classmethod
    def read(cls, path: Path) -> CudaBuild | None:
        """From the library's file, which is not loaded for it; None: it does not say."""
        found = _RECORD.search(path.read_bytes())
        return None if found is None else cls(release(int(found[1])), found[2].decode())

    def pytorch_problem(self, cuda: str) -> str | None:
        """Why it cannot run in a PyTorch of this CUDA."""
        if int(cuda.split(".")[0]) == self.toolkit.major:
            return None
        return f"it was built with CUDA {self.toolkit}, and PyTorch's CUDA is {cuda}"

    def card_problem(self, driver: Release, capability: Release) -> str | None:
        """Why it cannot run on a card of this capability, by this driver."""
        if driver.major < self.toolkit.major:
            return (
                f"they were built with CUDA {self.toolkit}, and the driver runs {driver} at most; "
                "a newer driver runs them"
            )
        if any(_runs_on(code, capability) for code in self._codes(driver)):
            return None
        return f"they were built for {self.architectures} by CUDA {self.toolkit}, driver {driver}"

    def _codes(self, driver: Release) -> Iterable[str]:
        """The architectures whose code this driver takes; ``+PTX`` where it also compiles theirs."""
        for code in self.architectures.split(";"):
            # PTX is of the toolkit's own release, and an older driver does not read it.
            yield code if driver >= self.toolkit else code.removesuffix("+PTX")


def _runs_on(code: str, capability: Release) -> bool:
    architecture = code.removesuffix("+PTX")
    number, feature = architecture.rstrip("af"), architecture.lstrip("0123456789.")
    built = Release(*map(int, number.split(".")))
    if feature == "a":  # of this one architecture
        return built == capability
    if built.major == capability.major and built.minor <= capability.minor:
        return True
    return code.endswith("+PTX") and not feature and built <= capability
