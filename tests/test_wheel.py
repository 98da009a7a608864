"""The wheel: what it holds, what its kernels take of a device, and the tests beside another PyTorch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from fastjac.ops._cuda_build import CudaBuild

# One process builds the wheel and the other environment.
pytestmark = [pytest.mark.check, pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).parents[1]
OTHER_TORCH = "torch==2.13.0"
# Tests of what needs more than PyTorch, of the source tree, or of pure Python that takes its time. All
# others that `make test` runs do so beside OTHER_TORCH, but for those of the kernels' own bits.
ELSEWHERE = {"data", "models", "train", "cuda_executor", "host_device", "cpu_kernels", "sass"}
ELSEWHERE |= {
    "test_docs.py",
    "test_install.py",
    "test_wheel.py",
    "test_gpu_check.py",
    "test_support.py",
    "test_headers.py",
    "test_metadata.py",
    "test_set_up.py",
    "test_launches.py",
    "test_no_synchronisation.py",
}


def command(*words: str | Path, cwd: Path = ROOT) -> str:
    """What it prints, with no source tree on Python's path; fails with all of it."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS")}
    run = subprocess.run(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode != 0:
        pytest.fail(f"{' '.join(map(str, words))}\n{run.stdout}", pytrace=False)
    return run.stdout


@pytest.fixture(scope="session")
def wheel() -> Path:
    """Built from what is here now; `make test` has done so already."""
    command("make", "wheel", f"VENV={sys.prefix}")
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def record(wheel: Path) -> dict:
    """What the build has noted."""
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastjac/_build.json"))


def test_it_holds_the_package_the_operators_and_no_pytorch(wheel, record):
    assert re.fullmatch(r"fastjac-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        libraries = {f: archive.read(f) for f in files if ".so" in f}
    assert set(libraries) == {f"fastjac/_{name}.abi3.so" for name in record["libraries"]}
    assert "fastjac/_cpu.abi3.so" in libraries
    for code in libraries.values():
        assert not re.search(rb"libtorch_python|libpython|libcudart\.so", code)
    for kind in ("py", "yaml"):
        for path in (ROOT / "fastjac").rglob(f"*.{kind}"):
            assert str(path.relative_to(ROOT)) in files
    assert all(f.startswith(("fastjac/", "fastjac-")) for f in files)


def test_the_cuda_library_tells_what_it_was_built_for(wheel, record, tmp_path):
    if "cuda" in record["missing"]:
        pytest.skip(f"no CUDA operators: {record['missing']['cuda']}")
    with zipfile.ZipFile(wheel) as archive:
        build = CudaBuild.read(Path(archive.extract("fastjac/_cuda.abi3.so", tmp_path)))
    noted = record["libraries"]["cuda"]
    assert (str(build.toolkit), build.architectures) == (noted["toolkit"], noted["architectures"])


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes stored and loaded


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\d+)\w*'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def resources(log: str) -> dict[tuple[str, str], Resources]:
    """By kernel and architecture; of several builds in a log, the last one's."""
    return {
        (m["kernel"], m["architecture"]): Resources(
            int(m["registers"]), int(m["stores"]) + int(m["loads"])
        )
        for m in REPORT.finditer(log)
    }


def written_kernels() -> set[str]:
    written = re.compile(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\) )?(\w+)\(")
    sources = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in {".cu", ".cuh"}]
    names = [name for p in sources for name in written.findall(p.read_text())]
    assert len(names) == sum(p.read_text().count("__global__") for p in sources)
    return set(names)


def test_the_report_is_read():
    log = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, {stores} bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]
"""
    said = (
        log.format(stores=4)
        + log.format(stores=8)
        + log.replace("sm_80", "sm_90a").format(stores=0)
    )
    assert resources(said) == {("_Z1aPf", "80"): (40, 20), ("_Z1aPf", "90"): (40, 12)}


def test_no_kernel_spills_on_any_architecture(wheel, record):
    if "cuda" in record["missing"]:
        pytest.skip(f"no CUDA operators: {record['missing']['cuda']}")
    listed = record["libraries"]["cuda"]["architectures"]
    architectures = set(re.sub(r"\+PTX|\.", "", listed).replace(" ", ";").split(";"))
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert listed == "7.5;8.0;9.0;10.0;12.0+PTX"

    found = resources((ROOT / "build" / "wheel.log").read_text())
    kernels = {kernel for kernel, _ in found}
    for name in written_kernels():
        assert any(f"{len(name)}{name}" in kernel for kernel in kernels), name
    missing = {(k, a) for k in kernels for a in architectures} - set(found)
    assert not missing
    spilling = {key: r for key, r in found.items() if r.spilled and key[1] in architectures}
    assert not spilling, "\n".join(f"{key}: {r}" for key, r in spilling.items())


@pytest.fixture(scope="session")
def other_python(wheel: Path) -> Path:
    """Of an environment that has another PyTorch, the wheel, numpy and pytest."""
    folder = Path(sys.prefix) / OTHER_TORCH.replace("==", "-")
    python, ready = folder / "bin" / "python", folder / ".ready"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    if not ready.exists():
        command(sys.executable, "-m", "venv", "--clear", folder)
        command(*pip, OTHER_TORCH, "numpy", "scipy", "pytest>=8,<9.2", "pytest-xdist>=3.6")
        ready.touch()
    command(*pip, "--no-deps", "--force-reinstall", wheel)
    return python


def test_it_runs_beside_another_pytorch(other_python, record, tmp_path):
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=lambda _, names: ELSEWHERE & {*names}
    )

    said = command(other_python, "-m", "fastjac.info", cwd=tmp_path)
    assert f"{tmp_path}" not in said
    assert f"{ROOT / 'fastjac'}" not in said
    assert re.search(r"^torch: +2\.13\.0\S*, CUDA none$", said, re.MULTILINE)
    assert re.search(r"^cpu loaded: +yes", said, re.MULTILINE)
    assert re.search(r"^cuda loaded: +no: PyTorch 2\.13\.0\S* has no CUDA$", said, re.MULTILINE)
    assert not record["torch"].startswith("2.13.0")

    addopts = "addopts=--strict-markers --import-mode=importlib"
    options = ("-q", "-n", "2", "--dist", "loadgroup", "--max-worker-restart", "0", "-o", addopts)
    options += ("-m", "not check", "-k", "not bits and not instruction_set", "tests")
    said = command(other_python, "-m", "pytest", *options, cwd=tmp_path)
    (passed,) = re.findall(r"(\d+) passed", said)
    assert int(passed) > 100
