"""fastjac's step beside the reference's, on copies of the same networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac


def step(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, target: Any, **options: Any
) -> dict[str, Tensor]:
    """The Jacobian loss, each parameter's gradient of the whole loss, and the buffers, by name.

    The loss has every other term beside it, so that logits and features are used twice.
    """
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    matcher = fastjac.JacobianMatching(student, teacher, target, **options)
    torch.manual_seed(0)
    out = matcher(x, y)
    loss = 3 * out.jacobian_loss + F.cross_entropy(out.student_logits, y)
    loss = loss + fastjac.activation_match_loss(out.student_logits, out.teacher_logits)
    if out.student_features is not None:
        loss = loss + out.student_features.square().mean()
    loss.backward()
    found = {"loss": out.jacobian_loss.detach()}
    for name, parameter in student.named_parameters():
        found[f"gradient of {name}"] = parameter.grad
    for name, buffer in student.named_buffers():
        found[f"buffer {name}"] = buffer
    return found


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any entry, and which it is.

    A gradient that is zero but for rounding, as of a bias that a BatchNorm takes away again, is
    measured against a ten-thousandth of the largest; a buffer, against 1.
    """
    assert got.keys() == wanted.keys()
    gradients = [g.norm() for k, g in wanted.items() if k.startswith("gradient") and g is not None]
    floors = {"loss": 0.0, "gradient": 1e-4 * max(gradients), "buffer": 1.0}
    worst = (0.0, "")
    for name, expected in wanted.items():
        if expected is None or got[name] is None:
            assert expected is got[name], name
            continue
        error = (got[name].double() - expected.double()).norm()
        scale = expected.double().norm() + floors[name.split()[0]]
        worst = max(worst, (float(error / scale) if scale else float(error), name))
    return worst


def assert_exact(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, target: Any, **options: Any
) -> None:
    """In float64, loss, gradients and running statistics equal the double backward's to 1e-9.

    ``tolerance``: for a network whose double backward itself moves by more where x does by a rounding.
    """
    student, teacher, x = student.double(), teacher.double(), x.double()
    strategy, tolerance = options.pop("strategy", "auto"), options.pop("tolerance", 1e-9)
    wanted = step(student, teacher, x, y, target, strategy="autograd", **options)
    got = step(student, teacher, x, y, target, strategy=strategy, **options)
    assert float(wanted["loss"]) > 0
    assert relative_error(got, wanted) < (tolerance, "")
