"""Builds the native operators: ``fastjac/_cpu.abi3.so`` and ``fastjac/_cuda.abi3.so``.

What can be built is built, and what can't is left to PyTorch, with the reason kept for
``python -m fastjac.info``:

* CPU operators need PyTorch and a C++ compiler; ``FASTJAC_NATIVE=0`` leaves out all native code;
* CUDA operators need a PyTorch with CUDA and its toolkit as well, but no GPU. ``FASTJAC_CUDA=1``
  insists on them, ``FASTJAC_CUDA=0`` leaves them out; ``TORCH_CUDA_ARCH_LIST`` chooses devices.

``FASTJAC_BUILD_FOR=here`` compiles for this machine alone, in a fraction of the time: its processor's
instruction set, and the architectures of the GPUs that are visible; CUDA operators only where there
are any. ``FASTJAC_NATIVE=keep`` installs the libraries that lie in ``fastjac/`` as they are.

A compiler that is there and fails is an error: nobody gets the slow path by accident.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = ROOT / "fastjac"
# The oldest PyTorch that is supported. By its stable ABI, what is built here loads in every later
# PyTorch and Python.
OLDEST = re.search(r'"torch>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text())
STABLE_ABI = [
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*map(int, OLDEST.groups())),
    "-DTORCH_STABLE_ONLY",
]
# No contraction: equal Jacobians must give a difference of exactly zero, on every instruction set.
# No trapping, no errno: a loop with a selection or a square root in it vectorises.
HOST_FLAGS = [
    "-std=c++20",  # PyTorch's own would be 17, in its older releases
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    # GCC 12 says it of its own intrinsics, and of a tap's fields that a pass has not asked for.
    "-Wno-maybe-uninitialized",
]
# Some compilers link their own C++ runtime statically. PyTorch's must not take the place of half of it:
# then an error's text is cut short, or the process dies.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
# Those that the toolkit has, and PTX of the last for what comes after. A card of 8.6 or 8.9 runs code of
# 8.0: kernels that wait for memory gain nothing from code of their own.
CUDA_ARCHITECTURES = ["7.5", "8.0", "9.0", "10.0", "12.0"]


class Unavailable(Exception):
    """Why something can't be built here."""


def only_here() -> bool:
    """Whether to compile for this machine alone."""
    asked = os.environ.get("FASTJAC_BUILD_FOR") or "everywhere"
    if asked not in ("here", "everywhere"):
        sys.exit(f"fastjac: FASTJAC_BUILD_FOR must be 'here' or 'everywhere', got {asked!r}")
    return asked == "here"


def source_hash() -> str:
    """Of all that the libraries are compiled from: by it, a wheel is known to fit the source tree."""
    files = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def toolkit_root(nvcc: str) -> str:
    """Where nvcc's toolkit is. The command on the PATH may be a wrapper that lies elsewhere."""
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return str(Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent)


def torch_extension():
    """``torch.utils.cpp_extension``, where there is a C++ compiler to use it with."""
    if os.environ.get("FASTJAC_NATIVE") == "0":
        raise Unavailable("built with FASTJAC_NATIVE=0")
    if nvcc := shutil.which("nvcc"):
        os.environ.setdefault("CUDA_HOME", toolkit_root(nvcc))
    try:
        from torch.utils import cpp_extension
    except ImportError:
        raise Unavailable(f"PyTorch was not there to build with ({sys.executable})") from None
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler was found ({compiler!r} is not on the PATH)")
    return cpp_extension


def cuda_toolkit(cpp_extension) -> str:
    """The release of the CUDA toolkit that PyTorch's extension builder will use."""
    import torch

    if os.environ.get("FASTJAC_CUDA") == "0":
        raise Unavailable("built with FASTJAC_CUDA=0")
    if torch.version.cuda is None:
        raise Unavailable(f"PyTorch {torch.__version__}, which it was built with, has no CUDA")
    if only_here() and os.environ.get("FASTJAC_CUDA") != "1" and not torch.cuda.is_available():
        raise Unavailable("FASTJAC_BUILD_FOR=here, and no GPU is visible (FASTJAC_CUDA=1 insists)")
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home or "", "bin", "nvcc")
    if home is None or not nvcc.exists():
        raise Unavailable("no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", said).group(1)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(
            f"the CUDA toolkit is {release}, but PyTorch's CUDA is {torch.version.cuda}"
        )
    return release


def sources(*folders: str) -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for folder in folders
        for pattern in ("*.cpp", "*.cu")
        for path in sorted((ROOT / "csrc" / folder).glob(pattern))
    ]


def headers() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*h"))]


def instruction_set(compiler: str) -> str | None:
    """The one that csrc/cpu/isa.cpp would choose on this machine; None: compile all of them."""
    if not only_here():
        return None
    from torch.backends.cpu import get_cpu_capability

    # As csrc/cpu/isa.h: only GCC, on x86, compiles more than the portable one.
    macros = subprocess.run(
        [compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    if "__clang__" in macros or "__x86_64__" not in macros:
        return "portable"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(get_cpu_capability(), "portable")


def cpu_extension(cpp_extension, only: str | None):
    files, defined = sources(".", "cpu"), []
    if only is not None:
        others = [f"_{isa}.cpp" for isa in INSTRUCTION_SETS if isa != only]
        files = [f for f in files if not f.endswith(tuple(others))]
        defined = [f"-DFASTJAC_ONLY_ISA={only}"]
    return cpp_extension.CppExtension(
        "fastjac._cpu",
        files,
        depends=headers(),
        extra_compile_args={"cxx": [*HOST_FLAGS, *STABLE_ABI, *defined]},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )


def cuda_architectures(nvcc: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, else this machine's, else all of ours that the toolkit has, and PTX."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = ";".join(re.split(r"[ ;]+", asked.strip(" ;")))
        if not re.fullmatch(r"(\d+\.\d[af]?(\+PTX)?(;|$))+", architectures):
            sys.exit(
                "fastjac: TORCH_CUDA_ARCH_LIST must list compute capabilities (8.0;9.0+PTX), got "
                f"{asked!r}"
            )
        return architectures
    import torch

    if only_here() and torch.cuda.is_available():
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(cards))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return (
        ";".join(a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"
    )


def cuda_flags(architectures: str) -> dict[str, list[str]]:
    """By the compiler; csrc/cuda/build.cpp keeps the architectures in the library."""
    bound = [*STABLE_ABI, "-DUSE_CUDA"]
    return {
        "cxx": [*HOST_FLAGS, *bound, f"-DFASTJAC_CUDA_ARCHITECTURES={architectures}"],
        "nvcc": ["-std=c++20", "-O3", "--threads=2", *bound],
    }


def cuda_extension(cpp_extension, architectures: str):
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    extension = cpp_extension.CUDAExtension(
        "fastjac._cuda",
        sources("cuda"),
        depends=headers(),
        extra_compile_args=cuda_flags(architectures),
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    # The static runtime, so that the library asks for no CUDA release at run time.
    extension.libraries = [
        "cudart_static" if name == "cudart" else name for name in extension.libraries
    ]
    extension.libraries += ["rt", "dl", "pthread"]
    return extension


class Package(build_py):
    """Keeps a record of the build beside the package, and no library of an older build."""

    record: dict

    def run(self):
        for name in self.record["missing"]:
            for stale in PACKAGE.glob(f"_{name}.*.so"):
                stale.unlink()
        (PACKAGE / "_build.json").write_text(json.dumps(self.record, indent=2) + "\n")
        super().run()


def build_command(cpp_extension):
    class Build(cpp_extension.BuildExtension):
        """Leaves the libraries in the source tree too, which Python imports if started there.

        Objects are kept in one place, so that an editable install compiles nothing that a wheel has.
        """

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT.resolve() / "build" / "objects")

        def run(self):
            super().run()
            if not self.inplace:
                self.copy_extensions_to_source()

    return Build


def main() -> None:
    if os.environ.get("FASTJAC_NATIVE") == "keep":
        setup()
        return
    record: dict = {"libraries": {}, "missing": {}, "sources": source_hash()}
    extensions, commands = [], {"build_py": Package}
    try:
        cpp_extension = torch_extension()
    except Unavailable as reason:
        record["missing"] = {"cpu": str(reason), "cuda": str(reason)}
    else:
        import torch

        record["torch"] = torch.__version__
        commands["build_ext"] = build_command(cpp_extension)
        compiler = cpp_extension.get_cxx_compiler()
        only = instruction_set(compiler)
        extensions.append(cpu_extension(cpp_extension, only))
        record["libraries"]["cpu"] = {"compiler": compiler}
        if only is not None:
            record["libraries"]["cpu"]["instruction_set"] = only
        try:
            release = cuda_toolkit(cpp_extension)
            architectures = cuda_architectures(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
            extensions.append(cuda_extension(cpp_extension, architectures))
            record["libraries"]["cuda"] = {"toolkit": release, "architectures": architectures}
        except Unavailable as reason:
            record["missing"]["cuda"] = str(reason)

    if "cuda" in record["missing"] and os.environ.get("FASTJAC_CUDA") == "1":
        reason = record["missing"]["cuda"]
        sys.exit(f"fastjac: FASTJAC_CUDA=1 asks for the CUDA operators, but {reason}")
    for name, reason in record["missing"].items():
        print(f"fastjac: building without {name.upper()} operators: {reason}", file=sys.stderr)
    Package.record = record
    setup(
        ext_modules=extensions,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    )


if __name__ == "__main__":
    main()
