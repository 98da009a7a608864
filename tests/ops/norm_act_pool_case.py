"""What the tests of norm_act_pool share: its arguments, and PyTorch's own chain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.ops import (
    channel_statistics_ref,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_backward_ref,
    norm_act_pool_pushforward,
    norm_act_pool_pushforward_ref,
    norm_act_pool_ref,
)

SLOPE, EPS = 0.2, 1e-5
ACTIVATE = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
}
POOL = {
    "none": lambda a: a,
    "2x2": lambda a: F.max_pool2d(a, 2),
    "3x3": lambda a: F.max_pool2d(a, 3, 2, 1),
    "3x3-unpadded": lambda a: F.max_pool2d(a, 3, 2),
}
LINEAR = [a for a in ACTIVATE if a != "silu"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ACTIVATION = pytest.mark.parametrize("activation", ACTIVATE)
POOLS = pytest.mark.parametrize("pool", POOL)
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EXACT = {"rtol": 1e-10, "atol": 1e-11}


class Case:
    """Random arguments of one call: on a grid, so that windows have ties and z sits on the kinks."""

    def __init__(
        self,
        *shape: int,
        with_residual: bool = False,
        pool: str = "none",
        device: str = "cpu",
        dtype: torch.dtype = torch.float64,
        layout: torch.memory_format = torch.contiguous_format,
        grid: float | None = None,
        seed: int = 0,
    ) -> None:
        make = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            x = torch.randn(size, generator=make, dtype=torch.float64)
            return x if grid is None else (x / grid).round() * grid

        def maps(*size: int) -> Tensor:
            x = random(*size).to(dtype).contiguous(memory_format=layout).to(device)
            assert x.device.type == device
            return x

        channels, acc = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
        self.u = maps(*shape)
        self.residual = maps(*shape) if with_residual else None
        self.tu, self.curvature = maps(*shape), maps(*shape)
        self.tresidual = maps(*shape) if with_residual else None
        self.gy = maps(*out_shape(shape, pool))
        if grid is None:
            self.weight, self.bias = random(channels) + 0.1, random(channels)
            self.mean, var = channel_statistics_ref(self.u.cpu().double())
            self.invstd = (var + EPS).rsqrt()
        else:
            sign = torch.tensor([1.0, -1.0]).repeat(channels)[:channels].double()
            self.weight, self.bias = 2 * sign, random(channels)
            self.mean, self.invstd = random(channels), torch.full_like(sign, 0.5)
        self.coefficient = random(channels)
        for name in ("weight", "bias", "mean", "invstd", "coefficient"):
            setattr(self, name, getattr(self, name).to(acc).to(device))

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.u, self.residual, self.weight, self.bias, self.mean, self.invstd

    def forward(self, f, activation: str, pool: str):
        return f(*self.inputs, activation, SLOPE, pool)

    def backward(self, f, activation: str, pool: str, training: bool, added: bool, mask=None):
        more = (self.coefficient, self.curvature) if added else (None, None)
        mask = [True, self.residual is not None, True, True] if mask is None else mask
        return f(self.gy, *self.inputs, activation, SLOPE, pool, training, *more, mask)

    def pushforward(self, f, activation: str, pool: str, statistics: str, curvature: bool):
        tangents = (self.tu, self.tresidual, self.gy)
        return f(*tangents, *self.inputs, activation, SLOPE, pool, statistics, curvature)

    def everything(self, native: bool, activation: str, pool: str) -> dict[str, Tensor]:
        """All results of all operators, by name."""
        ops = (norm_act_pool, norm_act_pool_backward, norm_act_pool_pushforward)
        refs = (norm_act_pool_ref, norm_act_pool_backward_ref, norm_act_pool_pushforward_ref)
        forward, backward, pushforward = ops if native else refs
        results = {"y": self.forward(forward, activation, pool)}
        names = ("gu", "gresidual", "gweight", "gbias")
        for training, added in ((True, True), (False, False)):
            got = self.backward(backward, activation, pool, training, added)
            results.update({f"{n} {training}": x for n, x in zip(names, got, strict=True)})
        if activation != "silu":
            names = ("ty", "T", "coefficient", "kappa")
            for statistics in ("fixed", "batch"):
                curve = statistics == "batch"
                got = self.pushforward(pushforward, activation, pool, statistics, curve)
                results.update({f"{n} {statistics}": x for n, x in zip(names, got, strict=True)})
        return {n: x for n, x in results.items() if x is not None and x.numel()}

    def double(self) -> Case:
        """The same numbers in float64."""
        other = Case.__new__(Case)
        for name, x in vars(self).items():
            setattr(other, name, x if x is None else x.double())
        return other


def out_shape(shape: tuple[int, ...], pool: str) -> tuple[int, ...]:
    if min(shape) == 0:
        return (*shape[:2], *POOL[pool](torch.empty(1, 1, *shape[2:])).shape[2:])
    return tuple(POOL[pool](torch.empty(shape)).shape)


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name].to(x.dtype)
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def chain(u, residual, weight, bias, activation, pool, training=True, running=(None, None), m=0.1):
    n = F.batch_norm(u, *running, weight, bias, training, m, EPS)
    return POOL[pool](ACTIVATE[activation](n if residual is None else n + residual))


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
