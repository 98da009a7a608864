"""What can be built, what it contains, and what is said where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastjac
from fastjac.ops import _library
from fastjac.ops.jacobian_match import jacobian_match_ref

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastjac.__file__).parent

MATCH = """
import torch, fastjac
from fastjac.ops import jacobian_match, jacobian_match_ref
js, jt = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
loss, v = jacobian_match(js, jt)
assert not v.requires_grad
expected = jacobian_match_ref(js.detach(), jt)
torch.testing.assert_close((loss, v), expected)
(grad,) = torch.autograd.grad(loss.sum(), js, create_graph=True)
torch.testing.assert_close(grad, expected[1])
try:
    grad.sum().backward()
except fastjac.FastjacError as error:
    assert "second derivative" in str(error)
else:
    raise SystemExit("no error for the second derivative")
"""


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter that finds the package in cwd first."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), **env}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from, with no build in it."""
    target = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "fastjac"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def wheel(source: Path, **env: str) -> subprocess.CompletedProcess:
    options = ["-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist"]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "."],
        cwd=source,
        env={**os.environ, "MAX_JOBS": "2", **env},
        capture_output=True,
        text=True,
    )


def built(source: Path, **env: str) -> tuple[str, list[str], str]:
    """The wheel's name, its files, and what the build said; unpacked into source/unpacked."""
    run = wheel(source, **env)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(source / "unpacked")
        return path.name, archive.namelist(), run.stdout + run.stderr


def test_import_needs_torch_alone():
    forbidden = [
        *("torchvision", "timm", "numpy", "yaml", "jsonargparse", "tqdm", "torchmetrics", "PIL"),
        *("matplotlib", "safetensors", "sklearn", "tensorboard", "pandas", "scipy"),
    ]
    block = f"import sys; sys.modules.update(dict.fromkeys({forbidden!r}))\n"
    python(block + MATCH, cwd=PACKAGE.parent)


def test_the_installed_build_is_whole():
    missing = _library.build_record().get("missing", {})
    for library in (_library.CPU, _library.CUDA):
        assert not library.broken, library.problem
        if library.name not in missing and os.environ.get("FASTJAC_NATIVE") != "0":
            assert library.loaded or torch.version.cuda is None, library.problem


def test_info_says_what_is_loaded_and_why_not():
    code = "import runpy; runpy.run_module('fastjac.info', run_name='__main__')"
    rows = dict(
        re.split(r":\s+", line, maxsplit=1)
        for line in python(code, PACKAGE.parent).stdout.splitlines()
    )
    assert rows["torch"].startswith(torch.__version__)
    for library in (_library.CPU, _library.CUDA):
        assert rows[f"{library.name} loaded"].startswith("yes" if library.loaded else "no: ")
        assert (str(library.path) in rows[f"{library.name} built"]) == (library.path is not None)

    off = python(code, PACKAGE.parent, FASTJAC_NATIVE="0").stdout
    assert "cpu loaded:  no: FASTJAC_NATIVE=0 is set" in off
    assert "cuda loaded: no: FASTJAC_NATIVE=0 is set" in off


def warning(run: subprocess.CompletedProcess) -> str:
    """The one line that running without native operators prints."""
    (line,) = run.stderr.splitlines()
    assert line.startswith("fastjac:1: RuntimeWarning: running without native operators")
    assert "pip install --no-build-isolation ." in line
    return line


def test_without_native_operators():
    assert "FASTJAC_NATIVE=0 is set" in warning(python(MATCH, PACKAGE.parent, FASTJAC_NATIVE="0"))


@pytest.mark.skipif(_library.CPU.path is None, reason="not built")
def test_a_library_that_is_switched_off_is_not_to_be_built():
    line = warning(python(MATCH, PACKAGE.parent, FASTJAC_NATIVE="0"))
    assert f"unset it to load {_library.CPU.path.name}" in line


@pytest.mark.parametrize(
    ("name", "expected"), [("FASTJAC_NATIVE", "0, 1, keep"), ("FASTJAC_CPU_ISA", "portable, avx2, avx5")]
)  # fmt: skip
def test_an_unknown_value_of_a_variable_is_told(name, expected):
    told = python(MATCH, PACKAGE.parent, **{name: "no"}).stderr
    assert f"fastjac:1: RuntimeWarning: {name}=no has no effect; expected one of {expected}" in told


def test_a_library_that_does_not_load_gives_the_reason(source):
    (source / "fastjac" / "_cpu.abi3.so").write_bytes(b"not a library")
    line = warning(python(MATCH, source))
    assert "_cpu.abi3.so does not load:" in line
    assert "invalid ELF header" in line or "file too short" in line


FOR_CUDA_12 = b"\x7fELF\0fastjac CUDA build: 12080 9.0\0"


@pytest.mark.parametrize(
    ("library", "problem"),
    [
        (FOR_CUDA_12, "it was built with CUDA 12.8, and PyTorch's CUDA is 13.0"),
        (b"\x7fELF\0", "it was built from other sources"),
    ],
)
@pytest.mark.skipif(not _library.CPU.loaded, reason=f"not loaded: {_library.CPU.problem}")
def test_a_cuda_library_for_another_cuda_is_not_loaded(source, library, problem):
    """So its references run, and nothing more is said where they do."""
    shutil.copy(_library.CPU.path, source / "fastjac")
    (source / "fastjac" / "_cuda.abi3.so").write_bytes(library)
    run = python(
        "import torch; torch.version.cuda = '13.0'; import fastjac; "
        "from fastjac.ops import _library; from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode(): x = torch.empty(2, device='cuda'); "
        "print(_library.native(x.device), _library._stand_in('some_op', lambda x: x)(x) is x)",
        source,
    )
    assert run.stdout.split() == ["False", "True"]
    (line,) = run.stderr.splitlines()
    assert line == (
        "fastjac:1: RuntimeWarning: running without CUDA operators (_cuda.abi3.so is not loaded: "
        f"{problem}); to rebuild: pip install --no-build-isolation ."
    )


def test_a_library_from_other_sources_is_refused():
    with pytest.raises(ImportError, match=r"built from other sources.*jacobian_match\(Tensor js,"):
        _library.define("jacobian_match(Tensor js, Tensor jt) -> Tensor", jacobian_match_ref)


def test_a_device_without_a_kernel_runs_the_reference_and_says_so_once(recwarn):
    run = _library._stand_in("some_op", lambda x: x + 1)
    assert run(torch.zeros(2)).tolist() == [1, 1]
    assert not recwarn
    for _ in range(3):
        assert run(torch.zeros(2, device="meta")).shape == (2,)
    (said,) = recwarn
    assert str(said.message).startswith("some_op runs its PyTorch reference on 'meta' (there is")


@pytest.mark.parametrize("problem", [None, "no CUDA here"])
def test_cuda_without_a_kernel_gives_the_reason(monkeypatch, recwarn, problem):
    library = _library.NativeLibrary("cuda", None, problem)
    monkeypatch.setattr(_library, "CUDA", library)
    with FakeTensorMode():  # says that it is on CUDA, whatever there is
        x = torch.empty(2, device="cuda")
        assert _library._stand_in("some_op", lambda x: x + 1)(x).device.type == "cuda"
    (said,) = recwarn
    reason = problem or "there is no native kernel"
    assert f"some_op runs its PyTorch reference on 'cuda' ({reason});" in str(said.message)


def test_cuda_can_be_left_out(source):
    for kernel in (source / "csrc" / "cpu").glob("*.cpp"):
        if kernel.name != "isa.cpp":  # test_wheel.py has them all, built once
            kernel.unlink()
    name, files, said = built(source, FASTJAC_CUDA="0")
    assert name.endswith(".whl")
    assert "-cp310-abi3-" in name
    assert [f for f in files if ".so" in f] == ["fastjac/_cpu.abi3.so"]
    assert "fastjac: building without CUDA operators: built with FASTJAC_CUDA=0" in said
    record = json.loads((source / "unpacked/fastjac/_build.json").read_text())
    assert record["missing"] == {"cuda": "built with FASTJAC_CUDA=0"}
    # The source tree has its copy, for Python started there.
    copy = (source / "fastjac/_cpu.abi3.so").read_bytes()
    assert copy == (source / "unpacked/fastjac/_cpu.abi3.so").read_bytes()


def test_without_a_compiler_the_wheel_is_pure(source):
    stale = source / "fastjac" / "_cpu.abi3.so"
    stale.write_bytes(b"of an older build")
    name, files, said = built(source, CXX="no-such-compiler", FASTJAC_CUDA="")
    assert name.endswith("-py3-none-any.whl")
    assert not [f for f in files if ".so" in f]
    assert not stale.exists()
    (metadata,) = (source / "unpacked").glob("fastjac-*.dist-info/METADATA")
    assert "\nLicense-Expression: MIT\n" in metadata.read_text()
    assert "the fastjac authors" in (metadata.parent / "licenses" / "LICENSE").read_text()
    reason = "no C++ compiler was found ('no-such-compiler' is not on the PATH)"
    assert f"fastjac: building without CPU operators: {reason}" in said
    assert reason in warning(python(MATCH, source / "unpacked"))


def test_architectures_without_numbers_are_refused(source):
    run = wheel(source, FASTJAC_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    said = run.stdout + run.stderr
    if "FASTJAC_CUDA=1 asks for the CUDA operators, but " in said:
        pytest.skip(said[said.index("fastjac: FASTJAC_CUDA=1") :].splitlines()[0])
    assert run.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST must list compute capabilities (8.0;9.0+PTX)" in said
    assert "got '8.0;Hopper'" in said


@pytest.mark.parametrize(
    "without", [{"CUDA_HOME": "/nowhere"}, {"CXX": "no-such-compiler"}], ids=["toolkit", "compiler"]
)
def test_asking_for_cuda_that_cannot_be_built_is_an_error(source, without):
    run = wheel(source, FASTJAC_CUDA="1", **without)
    assert run.returncode != 0
    said = run.stdout + run.stderr
    assert "fastjac: FASTJAC_CUDA=1 asks for the CUDA operators, but " in said
    assert not list(source.glob("dist/*.whl"))
