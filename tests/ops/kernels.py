"""The CUDA kernels that there are, by their mangled names."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
WRITTEN = re.compile(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\) )?(\w+)\(")
# nvcc's functions for the host, and their variables, have names that begin like the kernel's and go on
# with the types of a launch's arguments.
STUB = re.compile(r"7fastjac.*7fastjac|E\d+__(handle|tmp)$")


def written() -> list[str]:
    """The names in the sources, without namespaces and arguments."""
    sources = [path.read_text() for path in sorted(CUDA.iterdir())]
    names = [name for source in sources for name in WRITTEN.findall(source)]
    assert len(names) == sum(source.count("__global__") for source in sources)
    return names


def among(symbols: Iterable[str]) -> set[str]:
    """Those symbols that are kernels."""
    name = "|".join(f"{len(name)}{name}" for name in written())
    mangled = re.compile(rf"_ZN7fastjac(?:\d+[a-z_]+?)??(?:{name})[IE]")
    return {s for s in symbols if mangled.match(s) and not STUB.search(s)}


def registered(library: Path) -> set[str]:
    """All that a shared object registers with the CUDA runtime: by mangled names, in plain text."""
    found = re.findall(rb"_ZN7fastjac\w+(?=\0)", library.read_bytes())
    return among(name.decode() for name in found)


def readable(symbols: Iterable[str]) -> list[str]:
    """Demangled, without what they return and take."""
    text = "\n".join(sorted(symbols))
    said = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return [without_parameters(name) for name in said.stdout.splitlines()]


def without_parameters(name: str) -> str:
    """Of a kernel's demangled name."""
    return name.removeprefix("void ").partition("(")[0]


def assert_the_same(launched: set[str], compiled: set[str]) -> None:
    """Both by mangled names."""
    assert compiled, "no kernel was found"
    missing, unknown = compiled - launched, launched - compiled
    assert not missing, "no call launches\n" + "\n".join(readable(missing))
    assert not unknown, "not among the compiled kernels:\n" + "\n".join(readable(unknown))
