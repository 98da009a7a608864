"""The calls of tests/ops/instantiations.py launch every instantiation of every kernel.

They are what a GPU and compute-sanitizer run. Here each call is planned and launched by the sources'
own code, on the CPU, and the kernels that ran are compared, by name, with those that were compiled.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import instantiations
import kernels
import pytest
import torch
from instantiations import CALLS, CROPS, LENGTHS, SHAPES, Call

from fastjac.ops import _library

pytestmark = pytest.mark.check

HERE = Path(__file__).parent


def sibling(operator: str) -> ModuleType:
    """The tests of an operator's device code, which have its calls."""
    name = f"cuda_executor_{operator}"
    spec = importlib.util.spec_from_file_location(name, HERE / f"test_{operator}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ATTENTION_WINDOW = sibling("attention_window")
JACOBIAN_MATCH = sibling("jacobian_match")
NORM_ACT_POOL = sibling("norm_act_pool")
WINDOW_CROP = sibling("window_crop")


def launch(executor: ModuleType, call: Call) -> None:
    """The call's launches, with its dtype, shape and layout; dense tensors are aligned."""
    globals()[f"_{call.family}"](executor, call)


def _case(call: Call, pool: str):
    residual = call.accesses == "whole"
    shape = SHAPES[call.accesses]
    return NORM_ACT_POOL.Case(shape, call.dtype, call.layout, pool, residual=residual)


def _statistics(executor: ModuleType, call: Call) -> None:
    case = _case(call, "none")
    NORM_ACT_POOL.launch(executor, "statistics", case, "none", case.results("mean", "var"))
    fixed = case.results("mean", "invstd", "running_mean", "running_var")
    NORM_ACT_POOL.launch(executor, "statistics without values", case, "none", fixed)


def _norm_act_pool(executor: ModuleType, call: Call) -> None:
    case = _case(call, call.option)
    NORM_ACT_POOL.forward(executor, case)
    mask = (True, case.residual is not None, True, True)
    for training, added in ((True, True), (False, False)):
        NORM_ACT_POOL.backward(executor, case, "relu", training, added, mask)
    for batch in (False, True):
        NORM_ACT_POOL.pushforward(executor, case, "relu", batch, batch)


def _attention_window(executor: ModuleType, call: Call) -> None:
    z, k = instantiations.maps(call), instantiations.SIDES[call.accesses]
    position, _ = ATTENTION_WINDOW.find(executor, z, k, call.option)
    ATTENTION_WINDOW.slope(executor, z, position, k, call.option)


def _window_crop(executor: ModuleType, call: Call) -> None:
    start = torch.tensor(instantiations.STARTS)
    WINDOW_CROP.run(executor, instantiations.maps(call), start, CROPS[call.accesses], -1.0)


def _jacobian_match(executor: ModuleType, call: Call) -> None:
    pair = JACOBIAN_MATCH.jacobians(3, LENGTHS[call.accesses], call.dtype)
    JACOBIAN_MATCH.run(executor, *pair, call.option)


@pytest.fixture(scope="module")
def launched(executor: ModuleType) -> set[str]:
    """Mangled names of the kernels that the calls launch."""
    executor.take_launched()
    for call in CALLS:
        launch(executor, call)
    return executor.take_launched()


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_calls_launch_all_that_the_sources_can(native_build, launched):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", native_build / "libdevice_code.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = {line.split()[-1] for line in listed.splitlines()}
    compiled = kernels.among(symbols)
    for name in kernels.written():
        assert any(f"{len(name)}{name}" in symbol for symbol in compiled), name
    kernels.assert_the_same(launched, compiled)


@pytest.mark.skipif(_library.CUDA.path is None, reason="the CUDA operators are not built")
def test_the_calls_launch_all_that_the_library_holds(launched):
    kernels.assert_the_same(launched, kernels.registered(_library.CUDA.path))


def test_a_call_that_is_left_out_is_named(executor, launched):
    """The contiguous 2x2 vectors, once overlooked."""
    executor.take_launched()
    for call in CALLS:
        if (call.family, call.accesses, call.layout, call.option) != (
            "norm_act_pool",
            "whole",
            "contiguous",
            "2x2",
        ):
            launch(executor, call)
    fewer = executor.take_launched()
    with pytest.raises(AssertionError, match=r"write_backward<.*Traits<float, 4, 2, false>"):
        kernels.assert_the_same(fewer, launched)
