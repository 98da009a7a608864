"""``with_jacobian`` by the engine beside the double backward's, on models built anew for each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjac import with_jacobian
from fastjac.reference import map_structure

TOLERANCE = 1e-9


def seed_all(n: int) -> None:
    """Seed every generator that a model may draw from."""
    random.seed(n)
    np.random.seed(n)  # noqa: NPY002  what a model would draw from
    torch.manual_seed(n)


def tensors(structure: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_structure(lambda t: found.append(t) or t, structure)
    return found


def result_of(
    make: Callable[[], nn.Module], x: Tensor, target: Any, y: Any, strategy: str, **options: Any
) -> dict[str, Tensor]:
    """J, outputs, gradients of a loss of all of them, and buffers after the step.

    ``input_gradient``: the loss's gradient in x too.
    """
    change, input_gradient = options.pop("change", None), options.pop("input_gradient", False)
    seed_all(11)
    model = make()
    if change is not None:
        change(model)
    given = x.clone().requires_grad_(input_gradient)
    seed_all(5)
    out = with_jacobian(model, given, target, y, strategy=strategy, **options)
    assert torch.equal(given, x), "the caller's x was changed"
    jacobians = out.jacobian if isinstance(out.jacobian, tuple) else (out.jacobian,)
    loss = 0.0
    for j in jacobians:
        weight = torch.linspace(-1, 2, j.numel(), dtype=j.dtype).view_as(j)
        loss = loss + (j * weight).sum() + j.square().sum()
    for tensor in tensors(out.output):
        if tensor.is_floating_point() and tensor.requires_grad:
            loss = loss + tensor.sin().sum()
    found = {f"jacobian {i}": j.detach() for i, j in enumerate(jacobians)}
    found |= {f"output {i}": t.detach() for i, t in enumerate(tensors(out.output))}
    if loss.requires_grad:
        loss.backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[f"gradient {name}"] = torch.zeros_like(parameter) if grad is None else grad
    if input_gradient:
        assert given.grad is not None
        found["gradient x"] = given.grad
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error; a gradient is measured against 1e-4 of the largest one too."""
    assert got.keys() == wanted.keys()
    gradients = (g for k, g in wanted.items() if k.startswith("gradient") and g.numel())
    largest = max((g.abs().max() for g in gradients), default=0.0)
    found = (0.0, "")
    for name, expected in wanted.items():
        if expected.numel() == 0:
            continue
        assert got[name].shape == expected.shape, name
        if not (expected.is_floating_point() or expected.is_complex()):
            assert torch.equal(got[name], expected), name
            continue
        floor = {"gradient": 1e-4 * largest, "buffer": 1.0}.get(name.split()[0], 1e-6)
        error = (got[name] - expected).abs().max() / (expected.abs().max() + floor)
        assert not error.isnan(), f"NaN in {name}"
        found = max(found, (float(error), name))
    return found


def assert_agrees(
    make: Callable[[], nn.Module], x: Tensor, target: Any, y: Any = None, **options: Any
) -> dict[str, Tensor]:
    """The engine's J, outputs, gradients and buffers are the double backward's, to 1e-9."""
    wanted = result_of(make, x, target, y, "autograd", **options)
    got = result_of(make, x, target, y, "auto", **options)
    assert worst(got, wanted) < (TOLERANCE, "")
    return got
