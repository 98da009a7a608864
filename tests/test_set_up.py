"""What ``make demo`` and ``make test`` compile, and when they take libraries that are there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastjac.ops import _library

ROOT = Path(__file__).parents[1]
BUILD_VARIABLES = ("FASTJAC_BUILD_FOR", "FASTJAC_CUDA", "FASTJAC_NATIVE", "TORCH_CUDA_ARCH_LIST")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def set_up(monkeypatch, tmp_path) -> ModuleType:
    """``scripts/set_up.py`` on an empty source tree, without a compiler, for this machine."""
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "here")
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = load(ROOT / "scripts" / "set_up.py")
    for folder in ("fastjac", "csrc", "dist"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "schema.cpp").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "fastjac")
    return module


@pytest.fixture
def setup() -> ModuleType:
    return load(ROOT / "setup.py")


def record(setup: ModuleType, **cpu: str) -> dict:
    return {"sources": setup.source_hash(), "libraries": {"cpu": {"compiler": "c++", **cpu}}}


def write_wheel(root: Path, noted: dict, tag: str = "cp310-abi3-linux_x86_64") -> None:
    with zipfile.ZipFile(root / "dist" / f"fastjac-0.1.0-{tag}.whl", "w") as wheel:
        wheel.writestr("fastjac/_build.json", json.dumps(noted))
        wheel.writestr("fastjac/_cpu.abi3.so", "the library")
        wheel.writestr("fastjac/losses.py", "of the wheel")
        wheel.writestr("fastjac-0.1.0.dist-info/METADATA", "Name: fastjac\nVersion: 0.1.0\n")
        wheel.writestr("fastjac-0.1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel's tag is Linux's")
def test_a_wheel_that_fits_is_unpacked(set_up, setup, tmp_path, capsys):
    write_wheel(tmp_path, record(setup))
    assert not set_up.in_place(setup)
    assert set_up.unpack_wheel(setup)
    assert (tmp_path / "fastjac/_cpu.abi3.so").read_text() == "the library"
    assert not (tmp_path / "fastjac/losses.py").exists()
    assert "nothing is compiled" in capsys.readouterr().out
    assert set_up.in_place(setup)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sources": "of another commit"}, "it was built from other sources"),
        ({"libraries": {}}, "it has no CPU operators"),
        ({"libraries": {"cpu": {"instruction_set": "avx1024"}}}, "it is for avx1024 alone"),
    ],
)
def test_a_wheel_that_does_not_fit_is_named(set_up, setup, tmp_path, capsys, change, reason):
    write_wheel(tmp_path, record(setup) | change)
    assert not set_up.unpack_wheel(setup)
    assert f"is not used: {reason}" in capsys.readouterr().out
    assert not list((tmp_path / "fastjac").iterdir())


def test_a_wheel_of_another_platform_is_named(set_up, setup, tmp_path, capsys):
    write_wheel(tmp_path, record(setup), tag="cp310-abi3-win_arm64")
    assert not set_up.unpack_wheel(setup)
    assert "this Python or platform cannot install it" in capsys.readouterr().out


def test_libraries_older_than_a_source_are_compiled_again(set_up, setup, tmp_path):
    (tmp_path / "fastjac/_build.json").write_text(json.dumps(record(setup)))
    (tmp_path / "fastjac/_cpu.abi3.so").write_text("the library")
    assert set_up.in_place(setup)
    source = tmp_path / "csrc" / "schema.cpp"
    source.write_text("changed")
    library = (tmp_path / "fastjac/_cpu.abi3.so").stat()
    later = library.st_mtime + 10
    os.utime(source, (later, later))
    assert not set_up.in_place(setup)


def test_without_a_compiler_it_says_what_will_run(set_up, setup):
    what, took = set_up.minutes(setup, {"MAX_JOBS": "2", "PATH": ""})
    assert "no C++ compiler was found" in what
    assert "PyTorch's own operators run, slower" in what
    assert took < 1


def test_a_build_for_this_machine_has_one_instruction_set(monkeypatch, setup):
    extension = pytest.importorskip("torch.utils.cpp_extension")
    try:
        compiler = setup.torch_extension().get_cxx_compiler()
    except setup.Unavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "here")
    only = setup.instruction_set(compiler)
    built = setup.cpu_extension(extension, only)
    compiled = {m[1] for s in built.sources if (m := re.search(r"_(portable|avx\d+)\.cpp$", s))}
    assert compiled == {only}
    assert f"-DFASTJAC_ONLY_ISA={only}" in built.extra_compile_args["cxx"]
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "everywhere")
    assert setup.instruction_set(compiler) is None
    whole = setup.cpu_extension(extension, None)
    assert len(whole.sources) > len(built.sources)
    assert not any("ONLY_ISA" in flag for flag in whole.extra_compile_args["cxx"])
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "there")
    with pytest.raises(SystemExit, match="must be 'here' or 'everywhere', got 'there'"):
        setup.instruction_set(compiler)


def test_a_library_for_another_processor_is_not_loaded(monkeypatch, tmp_path):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"never read")
    noted = {"libraries": {"cpu": {"instruction_set": "avx512"}}}
    (tmp_path / "_build.json").write_text(json.dumps(noted))
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    library = _library._load("cpu")
    assert library.broken
    assert "built for avx512 alone (FASTJAC_BUILD_FOR=here), which this processor lacks" in (
        library.problem
    )


def test_make_says_what_there_is():
    said = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "scripts/set_up.py train\n" in said.stdout or "fastjac.train" in said.stdout
    assert "pytest" not in said.stdout


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        ("11.8", r"the CUDA toolkit is 11\.8, but PyTorch's CUDA is 13\.0"),
        (None, "no CUDA toolkit was found"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_a_reason_to_build_without(
    monkeypatch, setup, tmp_path, release, reason
):
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if release is not None:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}'\n"
        )
        nvcc.chmod(0o755)
    with pytest.raises(setup.Unavailable, match=reason):
        setup.cuda_toolkit(SimpleNamespace(CUDA_HOME=str(tmp_path)))


def test_without_a_gpu_this_machine_needs_no_cuda(monkeypatch, setup):
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "here")
    with pytest.raises(setup.Unavailable, match="no GPU is visible"):
        setup.cuda_toolkit(SimpleNamespace(CUDA_HOME=None))
    monkeypatch.setenv("FASTJAC_CUDA", "1")
    with pytest.raises(setup.Unavailable, match="no CUDA toolkit was found"):
        setup.cuda_toolkit(SimpleNamespace(CUDA_HOME=None))


def test_with_gpus_their_architectures_are_built(monkeypatch, setup):
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTJAC_BUILD_FOR", "here")
    cards = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    assert setup.cuda_architectures(Path("no-nvcc")) == "8.0;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0+PTX")
    assert setup.cuda_architectures(Path("no-nvcc")) == "12.0+PTX"
