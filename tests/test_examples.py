"""Each example runs, and what it prints shows that its term of the loss does its work."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples' images ship with scikit-learn")
ROOT = Path(__file__).parents[1]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def numbers(name: str, pattern: str, launcher: tuple[str, ...] = ()) -> list[tuple[float, ...]]:
    """What ``examples/<name>.py`` prints in the places that ``pattern`` marks with ``#``, by line."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, ROOT / "examples" / f"{name}.py"]
    env |= {"GLOO_SOCKET_IFNAME": loopback} if launcher else {}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = re.findall(re.escape(pattern).replace(r"\#", r"([\d.]+)"), run.stdout)
    assert found, run.stdout
    return [tuple(map(float, (f,) if isinstance(f, str) else f)) for f in found]


def test_each_is_tested_and_short():
    files = list((ROOT / "examples").glob("*.py"))
    for file in files:
        assert f'"{file.stem}"' in Path(__file__).read_text()
        assert len(file.read_text().splitlines()) <= 60, file.name
    assert len(files) == 9


def test_r1_discriminator():
    plain, penalised = numbers(
        "r1_discriminator", "gamma #: E ||dD/dx||^2 #, samples' nearest digit at #"
    )
    assert (plain[0], penalised[0]) == (0, 1)
    assert penalised[1] < plain[1] / 10
    assert penalised[2] < 2  # untrained, the generator's samples are at 3


def test_wgan_gp():
    ((norm, nearest, before),) = numbers(
        "wgan_gp",
        "gradient norm: # (1 is wanted)\nsamples' nearest digit at #, before training at #",
    )
    assert norm == pytest.approx(1, abs=0.3)
    assert nearest < 0.75 * before


def test_input_gradient_regularisation():
    plain, penalised = numbers(
        "input_gradient_regularisation", "lambda #: test accuracy #, under noise #"
    )
    assert penalised[1] > 0.9
    assert penalised[2] > plain[2] + 0.02


def test_right_for_the_right_reasons():
    plain, penalised = numbers(
        "right_for_the_right_reasons", "lambda #: training accuracy #, test accuracy #"
    )
    assert min(plain[1], penalised[1]) > 0.9
    assert penalised[2] > plain[2] + 0.1


def test_sobolev_regression():
    plain, penalised = numbers("sobolev_regression", "lambda #: test error # of the variance")
    assert penalised[1] < plain[1] / 2


def test_jacobian_matching():
    plain, matched = numbers("jacobian_matching", "test accuracy # after 30 images")
    assert matched[0] > plain[0] + 0.05


@pytest.mark.parametrize(
    ("name", "package", "launcher"),
    [
        ("jacobian_matching_lightning", "lightning", ()),
        ("jacobian_matching_accelerate", "accelerate", ()),
        ("jacobian_matching_accelerate", "accelerate", TWO),
    ],
)
def test_jacobian_matching_in_a_framework(name, package, launcher):
    """Lightning validates in inference mode; of two processes, the first alone prints."""
    pytest.importorskip(package, reason=f"the example is a loop of {package}")
    before, after = numbers(name, "training: jacobian_loss #, accuracy #", launcher)
    assert after[0] < before[0] / 2
    assert after[1] > 0.8 > before[1]


def test_jacobian_matching_in_timms_loop():
    """What the loop gains is ten lines at most."""
    pytest.importorskip("timm", reason="the example is a loop of timm")
    teacher, plain, matched = numbers("jacobian_matching_timm", "test accuracy # %")
    assert teacher[0] > 90
    assert matched[0] > plain[0] + 5
    assert 0 < (ROOT / "examples" / "jacobian_matching_timm.py").read_text().count("  # +") <= 10
