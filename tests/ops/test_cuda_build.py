"""Which PyTorch, driver and cards the CUDA library is for, and what runs where it is for others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastjac.ops import _cuda_build, _library
from fastjac.ops._cuda_build import Card, CudaBuild, Machine, Release

BUILD = CudaBuild(Release(13, 0), "8.0;9.0a;10.0f;12.0+PTX")
VOLTA, AMPERE, HOPPER = (7, 0), (8, 6), (9, 0)


@pytest.mark.parametrize(
    ("capability", "driver", "runs"),
    [
        ((8, 0), (13, 0), True),
        ((8, 6), (13, 0), True),  # code of 8.0 runs on every 8.x
        ((7, 5), (13, 0), False),
        ((9, 0), (13, 0), True),
        ((9, 1), (13, 0), False),  # "a" is for one architecture
        ((10, 3), (13, 0), True),  # "f" for a family
        ((11, 0), (13, 0), False),  # and has no PTX
        ((12, 1), (13, 0), True),
        ((13, 0), (13, 0), True),  # by PTX
        ((13, 0), (13, 2), True),
        ((8, 0), (12, 8), False),  # a driver of an older CUDA
    ],
)
def test_a_card_that_has_code_is_supported(capability, driver, runs):
    problem = BUILD.card_problem(Release(*driver), Release(*capability))
    assert (problem is None) == runs, problem


def test_a_driver_older_than_the_toolkit_compiles_no_ptx():
    build = CudaBuild(Release(13, 2), "8.0+PTX")
    assert build.card_problem(Release(13, 1), Release(8, 6)) is None
    assert build.card_problem(Release(13, 2), Release(9, 0)) is None
    problem = build.card_problem(Release(13, 1), Release(9, 0))
    assert problem == "they were built for 8.0+PTX by CUDA 13.2, driver 13.1"


def test_pytorchs_cuda_must_be_of_the_same_major_release():
    assert BUILD.pytorch_problem("13.2") is None
    problem = BUILD.pytorch_problem("12.8")
    assert problem == "it was built with CUDA 13.0, and PyTorch's CUDA is 12.8"


def test_the_record_is_read_from_the_library(tmp_path):
    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"\x7fELF\0fastjac CUDA build: 12080 8.0;9.0a+PTX\0\1\2")
    assert CudaBuild.read(library) == CudaBuild(Release(12, 8), "8.0;9.0a+PTX")
    library.write_bytes(b"")
    assert CudaBuild.read(library) is None


@pytest.fixture
def inspected(monkeypatch, recwarn):
    """A function: what is warned of when CUDA starts on a machine of these capabilities."""

    def inspect(*capabilities: tuple[int, int], driver: tuple[int, int] = (13, 0)) -> list[str]:
        cards = [Card(f"card {c}", Release(*c)) for c in capabilities]
        monkeypatch.setattr(_cuda_build, "machine", lambda: Machine(Release(*driver), cards))
        library = _library.NativeLibrary("cuda", None, None, build=BUILD)
        monkeypatch.setattr(_library, "CUDA", library)
        monkeypatch.setitem(_library.LIBRARIES, "cuda", library)
        monkeypatch.setattr(_library, "_unsupported", {})
        monkeypatch.setattr(_library, "_references", {})  # no operator is routed in this process
        _library._inspect_cards()
        return [str(w.message) for w in recwarn]

    return inspect


def native() -> list[bool]:
    return [_library.native(torch.device("cuda", i)) for i in range(2)]


def test_all_cards_are_supported(inspected):
    assert inspected(AMPERE, HOPPER) == []
    assert native() == [True, True]


def test_of_two_cards_one_is_supported(inspected):
    (said,) = inspected(AMPERE, VOLTA)
    assert native() == [True, False]
    assert _library.unsupported_cards().keys() == {1}
    assert said.startswith("running without CUDA operators on cuda:1 (card (7, 0), 7.0), on their")
    assert "they were built for 8.0;9.0a;10.0f;12.0+PTX by CUDA 13.0, driver 13.0" in said
    assert "TORCH_CUDA_ARCH_LIST='7.0' pip install --no-build-isolation ." in said


def test_a_driver_that_is_too_old_is_named_once(inspected):
    (said,) = inspected(AMPERE, HOPPER, driver=(12, 8))
    assert native() == [False, False]
    assert said.count("built with CUDA 13.0, and the driver runs 12.8 at most; a newer driver") == 1
    assert "TORCH_CUDA_ARCH_LIST='8.6;9.0'" in said


def in_new_process(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout


ROUTED = """
import torch
from fastjac.ops import _library, jacobian_match

ran = []
for name, reference in list(_library._references.items()):
    def noted(*args, name=name, reference=reference):
        ran.append(name)
        return reference(*args)
    _library._references[name] = noted
    _library._route(name, "CPU")

js, jt = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
u, gy = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
mean, invstd = torch.zeros(3), torch.ones(3)

def results():
    loss, v = jacobian_match(js, jt)
    (grad,) = torch.autograd.grad(loss.sum(), js)
    rest = (None, None, None, mean, invstd, "relu", 0.0, "none", True, None, None)
    mask = [True, False, False, False]
    gu, *_ = torch.ops.fastjac.norm_act_pool_backward(gy, u, *rest, mask)
    written = u.clone()
    torch.ops.fastjac.norm_act_pool_backward_(gy, written, *rest, mask)
    return loss, v, grad, gu, written

native = results()
assert not ran, ran
_library._unsupported[-1] = "a reason"  # the CPU's index
routed = results()
assert ran == ["jacobian_match", "norm_act_pool_backward", "norm_act_pool_backward_"], ran
torch.testing.assert_close(routed, native)
_library._unsupported.clear()
assert all(map(torch.equal, results(), native))
assert len(ran) == 3
"""


@pytest.mark.skipif(not _library.CPU.loaded, reason=f"not loaded: {_library.CPU.problem}")
def test_an_unsupported_device_runs_the_references_and_any_other_its_kernels():
    """On the CPU's key, since no other has kernels everywhere; with derivatives and mutation."""
    in_new_process(ROUTED)


@pytest.mark.skipif(not _library.CUDA.loaded, reason=f"not loaded: {_library.CUDA.problem}")
def test_the_import_starts_no_cuda_and_has_the_cards_inspected_when_it_starts():
    said = in_new_process(
        "import torch, fastjac; from fastjac.ops import _library; "
        "print(torch.cuda.is_initialized(), "
        "[c for c, _ in torch.cuda._queued_calls].count(_library._inspect_cards))"
    )
    assert said.split() == ["False", "1"]


FOR_NO_CARD = """
import dataclasses, warnings, torch
from fastjac.ops import _library, jacobian_match, jacobian_match_ref
from fastjac.ops._cuda_build import CudaBuild

assert not torch.cuda.is_initialized()
build = CudaBuild(_library.CUDA.build.toolkit, "1.0")
_library.CUDA = dataclasses.replace(_library.CUDA, build=build)
with warnings.catch_warnings(record=True) as said:
    js = torch.ones(2, 3, 8, 8, device="cuda", requires_grad=True)
    got = jacobian_match(js, torch.zeros_like(js))
(said,) = said
assert str(said.message).startswith("running without CUDA operators on cuda:0 ("), said
assert not _library.native(js.device)
expected = jacobian_match_ref(js.detach(), torch.zeros_like(js))
assert all(map(torch.equal, got, expected))
"""


@pytest.mark.cuda
@pytest.mark.skipif(not _library.CUDA.loaded, reason=f"not loaded: {_library.CUDA.problem}")
def test_on_a_gpu_without_code_the_references_run():
    in_new_process(FOR_NO_CARD)
