"""``python -m fastjac.info``: what is built, what is loaded, and why anything is not.

Environment variables, read when fastjac is first used: ``FASTJAC_NATIVE=0`` runs without the native
operators, on their PyTorch references; ``FASTJAC_CPU_ISA=portable|avx2|avx512`` limits the CPU's
instruction set.
When building: ``FASTJAC_NATIVE=0`` and ``FASTJAC_CUDA=0`` leave out native and CUDA code,
``FASTJAC_CUDA=1`` insists on CUDA, ``TORCH_CUDA_ARCH_LIST`` chooses its architectures, and
``FASTJAC_BUILD_FOR=here`` compiles for this machine alone.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastjac.ops import _library


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _built(library: _library.NativeLibrary, record: dict) -> str:
    if library.path is None:
        return "no"
    if library.build is not None:
        build = library.build
        return f"{library.path}, with CUDA {build.toolkit}, for {build.architectures}"
    details = record.get("libraries", {}).get(library.name)
    if details is None:
        return f"{library.path}, by an earlier build"
    shown = ", ".join(f"{key} {value}" for key, value in details.items())
    return f"{library.path}, with PyTorch {record['torch']}, {shown}"


def _cuda_loaded(cuda: _library.NativeLibrary) -> str:
    if not cuda.loaded:
        return f"no: {cuda.problem}"
    refused = [f"not on cuda:{i}: {reason}" for i, reason in _library.unsupported_cards().items()]
    return "; ".join(["yes", *refused])


def report() -> str:
    """The text that ``python -m fastjac.info`` prints."""
    cpu, cuda, record = _library.CPU, _library.CUDA, _library.build_record()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = [f"{p.name} ({p.major}.{p.minor})" for p in found]
    rows = {
        "fastjac": f"{_version('fastjac')} in {_library.PACKAGE}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "GPUs": ", ".join(devices) or "none",
        "threads": str(torch.get_num_threads()),
        "cpu built": _built(cpu, record),
        "cpu loaded": f"yes, {_library.cpu_isa()}" if cpu.loaded else f"no: {cpu.problem}",
        "cuda built": _built(cuda, record),
        "cuda loaded": _cuda_loaded(cuda),
    }
    if cpu.path is None or cuda.path is None or cpu.broken or cuda.broken:
        rows["to build"] = _library.REBUILD
    return "\n".join(f"{key + ':':13}{value}" for key, value in rows.items())


if __name__ == "__main__":
    print(report())
