"""Every source compiles against the headers of the oldest PyTorch that is supported.

That it does against those of the PyTorch that is installed is what `make wheel` shows.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

# One process downloads the oldest headers.
pytestmark = [pytest.mark.check, pytest.mark.xdist_group("headers")]

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r'"torch>=([\d.]+)"')
# The front ends of nvcc and of the compiler check all types, of the host's code and of the device's.
SYNTAX = ["-fsyntax-only"]
CUDA_SYNTAX = ["-c", "-arch=sm_90", "-fdevice-syntax-only", "-Xcompiler=-fsyntax-only"]


def unavailable(reason: str) -> NoReturn:
    """Skip; but fail where CUDA operators are insisted on, as continuous integration does."""
    if os.environ.get("FASTJAC_CUDA") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py, whose flags these are."""
    spec = importlib.util.spec_from_file_location("fastjac_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def oldest_release() -> str:
    """The first release that pyproject.toml allows."""
    (version,) = set(REQUIREMENT.findall((ROOT / "pyproject.toml").read_text()))
    return version if version.count(".") == 2 else f"{version}.0"


@pytest.fixture(scope="module")
def oldest_headers() -> Path:
    """The oldest release's headers alone; downloaded once for each environment."""
    release = oldest_release()
    folder = Path(sys.prefix) / f"torch-{release}-headers"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
            words = (
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                scratch,
            )
            run = subprocess.run(
                [sys.executable, *words, f"torch=={release}"], capture_output=True, text=True
            )
            if run.returncode != 0:
                unavailable(f"the headers of PyTorch {release} can't be downloaded: {run.stderr}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.startswith("torch/include/")]
                archive.extractall(scratch, names)
            try:
                Path(scratch, "torch", "include").rename(folder)
            except OSError:
                if not folder.exists():  # else another process of the tests was faster
                    raise
    return folder


def failures(setup: ModuleType, headers: Path, sources: list[Path]) -> dict[str, str]:
    """What the compilers say of the sources that do not compile, by their names."""
    extension = setup.torch_extension()
    cxx, nvcc = extension.get_cxx_compiler(), f"{extension.CUDA_HOME}/bin/nvcc"
    includes = [f"-I{headers}", f"-I{extension.CUDA_HOME}/include"]
    cuda = setup.cuda_flags("9.0")

    def compiled(source: Path) -> subprocess.CompletedProcess:
        if source.suffix == ".cu":
            words = [nvcc, *cuda["nvcc"], *CUDA_SYNTAX, "-o", os.devnull]
        elif source.parent.name == "cuda":
            words = [cxx, *cuda["cxx"], *SYNTAX]
        else:
            words = [cxx, *setup.HOST_FLAGS, *setup.STABLE_ABI, *SYNTAX]
        return subprocess.run([*words, *includes, source], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = zip(sources, pool.map(compiled, sources), strict=True)
        return {s.name: r.stdout + r.stderr for s, r in runs if r.returncode != 0}


def check_toolkit(setup: ModuleType) -> None:
    try:
        extension = setup.torch_extension()
    except setup.Unavailable as reason:
        unavailable(str(reason))
    if extension.CUDA_HOME is None:
        unavailable("no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)")


def test_the_stable_abi_is_the_oldest_releases(setup):
    major, minor, _ = map(int, oldest_release().split("."))
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in setup.STABLE_ABI


def test_every_source_compiles_on_the_oldest_pytorch(setup, oldest_headers):
    check_toolkit(setup)
    sources = [ROOT / name for name in setup.sources(".", "cpu", "cuda")]
    assert set(sources) == {p for s in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(s)}
    failed = failures(setup, oldest_headers, sources)
    assert not failed, "\n".join(failed.values())


@pytest.mark.parametrize("suffix", [".cpp", ".cu"])
def test_a_later_releases_header_is_noticed(setup, oldest_headers, tmp_path, suffix):
    """By host code, and by a kernel: both are type-checked."""
    check_toolkit(setup)
    later = tmp_path / f"later{suffix}"
    later.write_text(
        "#include <torch/csrc/stable/tensor.h>\n"
        "void* call() { STABLE_TORCH_ERROR_CODE_CHECK(0); return nullptr; }\n"
    )
    wrong = tmp_path / f"wrong{suffix}"
    device = "__global__ " if suffix == ".cu" else ""
    wrong.write_text(
        f"template <typename T> {device}void kernel(T* x) {{ x->none(); }}\n"
        f"void use() {{ auto* k = kernel<int>; (void)k; }}\n"
    )
    failed = failures(setup, oldest_headers, [later, wrong])
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in failed[later.name]
    assert wrong.name in failed
