"""What has crops and what has none: beside the double backward, and by the reason that is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from agreement import result_of, worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import AttentionWindow, FastjacError, with_jacobian
from fastjac.ops import _library

SIDE, C = 12, 4
GENERATOR = torch.Generator().manual_seed(2)
WEIGHT = torch.rand(SIDE, SIDE, 1, 1, generator=GENERATOR).double() - 0.5
WIDE = torch.rand(C, 2 * C, generator=GENERATOR).double() - 0.5
MAP = torch.rand(SIDE, SIDE, generator=GENERATOR).double() + 0.5
SCALES = torch.linspace(0.5, 2, C).double()


class Between(nn.Module):
    """``function`` of a map ``[B, C, H, W]`` between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.layer = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.function(self.first(x)).tanh()).mean((2, 3))


def last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` of ``[B, H, W, C]``."""
    return lambda z: function(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(z: Tensor, training: bool = True) -> Tensor:
    zeros = z.new_zeros(z.shape[1])
    return F.batch_norm(z, zeros, zeros + 1.5, training=training)


GLOBAL = {
    "mean": (lambda z: z.mean((2, 3), keepdim=True) + z, "it broadcasts over the map"),
    "sum": (lambda z: z - z.sum(1, keepdim=True), "it broadcasts over the map"),
    "product": (lambda z: z * z[:, :1], "it broadcasts over the map"),
    "flip": (lambda z: z.flip(2) + z, "flip: its output sees the whole of its input"),
    "factor": (lambda z: z * MAP, "its factor varies over the map"),
    "factor of rows": (lambda z: z * MAP[:, :1], "its factor varies over the map"),
    "factor of columns": (lambda z: z / MAP[:1], "its factor varies over the map"),
    "factor, last": (last(lambda z: z * MAP[..., None]), "its factor varies over the map"),
    "rows joined": (
        lambda z: torch.cat([z[:, :, :5], z[:, :, 5:]], 2),
        "cat: it concatenates over dimension 2",
    ),
    "rows joined, last": (
        last(lambda z: torch.cat([z[:, :5], z[:, 5:]], 1)),
        "cat: it concatenates over dimension 1",
    ),
    "convolution, last": (last(lambda z: F.conv2d(z, WEIGHT)), "its channels are an axis"),
    "batch norm, last": (last(norm), "batch_norm: its channels are an axis of the map"),
    "running, last": (
        last(lambda z: norm(z, False)),
        "batch_norm: its channels are an axis of the map",
    ),
    "max pool, last": (last(lambda z: F.max_pool2d(z, 3, 1, 1)), "it pools over the channels"),
    "avg pool, last": (last(lambda z: F.avg_pool2d(z, 3, 1, 1)), "it pools over the channels"),
    "linear": (lambda z: F.linear(z, WEIGHT[:, :, 0, 0]), "it sees a whole row of its input"),
    "layer norm": (lambda z: F.layer_norm(z, [SIDE]), "it normalises over the map"),
    "layer norm, rows": (last(lambda z: F.layer_norm(z, [SIDE, C])), "it normalises over the map"),
    "bounds over the map": (lambda z: z.clamp(max=MAP - 0.7), "clamp: its output sees the whole"),
    "vectors": (
        lambda z: F.gelu(z.flatten(2)).view_as(z),
        "its output sees the whole of its input",
    ),
}
LOCAL = {
    "factor": lambda z: z * SCALES[:, None, None] / 3,
    "factor, last": last(lambda z: z * SCALES),
    "channels joined": lambda z: F.conv2d(torch.cat([z.sin(), z], 1), WIDE[:, :, None, None]),
    "channels joined, last": last(lambda z: F.linear(torch.cat([z.sin(), z], -1), WIDE)),
    "channels joined, axis": lambda z: F.conv2d(
        torch.cat([z.sin(), z], axis=1), WIDE[:, :, None, None]
    ),
    "linear, last": last(lambda z: F.linear(z, WIDE[:, :C])),
    "layer norm, last": last(lambda z: F.layer_norm(z, [C], SCALES)),
    "pools": lambda z: F.avg_pool2d(F.max_pool2d(z, 3, 1, 1), 3, 1, 1),
    "pools, default strides": lambda z: F.avg_pool2d(z, 2) + F.max_pool2d(z, 2),
    "pools, no strides": lambda z: F.avg_pool2d(z, 2, []) * F.max_pool2d(z, 2, []),
    "product": lambda z: z * z.sin(),
    "type as it was": lambda z: z.to(z.dtype) * 2,
    "layout": lambda z: z.sin().to(memory_format=torch.channels_last),
    "layout, last": last(lambda z: z.sin().to(memory_format=torch.channels_last)),
    "types": lambda z: z.type_as(SCALES).double().type(torch.float64),
    "clamped": lambda z: z.sin().clamp(-0.5, 0.5) + z.clamp(min=0).abs(),
    "shrunk": lambda z: F.softshrink(z) + F.hardshrink(z, 0.1) + z.atan(),
    "running": lambda z: F.relu(norm(z, False)),
    # Outside of the map u is 0, which would be the largest value of a window there.
    "normalised, pooled": lambda z: F.max_pool2d(F.relu(norm(z - 5)), 3, 2, 1),
    "normalised, added, pooled": lambda z: F.max_pool2d(F.relu(norm(z - 5) + z), 3, 2, 1),
}


def images() -> Tensor:
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return x.double()


def check(function: Callable[[Tensor], Tensor], strategy: str) -> None:
    target = AttentionWindow("layer", window=0.2).at(torch.tensor([[0, 0], [0, 3]]))
    got, wanted = (
        result_of(lambda: Between(function).double(), images(), target, None, way)
        for way in (strategy, "autograd")
    )
    assert worst(got, wanted) < (1e-9, "")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", GLOBAL)
def test_what_has_no_crops_is_named_and_runs_on_whole_maps(name, native, monkeypatch):
    function, reason = GLOBAL[name]
    if not native:
        absent = _library.NativeLibrary("cpu", None, "not built")
        monkeypatch.setitem(_library.LIBRARIES, "cpu", absent)
    torch.manual_seed(0)
    model, target = Between(function).double(), AttentionWindow("layer", window=0.2)
    with pytest.raises(FastjacError, match=rf"strategy='local' needs .*; global: .*{reason}"):
        with_jacobian(model, images(), target, strategy="local")
    check(function, "auto")


def test_batch_statistics_under_a_checkpoint_have_no_crops():
    """The backward would run the norm again, and gets the curvature as a whole map."""
    model = Between(lambda z: checkpoint(norm, z, use_reentrant=False)).double()
    with pytest.raises(
        FastjacError, match=r"BatchNorm in train mode under torch\.utils\.checkpoint"
    ):
        with_jacobian(model, images(), AttentionWindow("layer", window=0.2), strategy="local")


def test_an_input_whose_channels_are_last_has_no_crops():
    class Last(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 3, 1, 2))

    model, x = Last(torch.sin).double(), images().permute(0, 2, 3, 1)
    with pytest.raises(FastjacError, match=r"global: the input is no image \[B, C, H, W\]"):
        with_jacobian(model, x, AttentionWindow("layer", window=0.2), strategy="local")


@pytest.mark.parametrize("name", LOCAL)
def test_what_has_crops_runs_on_them(name):
    check(LOCAL[name], "local")


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(C), lambda z: F.layer_norm(input=z, normalized_shape=[C])]
)
def test_layer_norms_over_the_channels_have_crops_under_autocast(norm):
    def gradients(strategy: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = Between(last(norm))
        target = AttentionWindow("layer", window=0.2).at(torch.tensor([[0, 0], [0, 3]]))
        with torch.autocast("cpu", torch.bfloat16):
            out = with_jacobian(model, images().float(), target, strategy=strategy)
        out.jacobian.square().sum().backward()
        return [out.jacobian.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    local, dense = gradients("local"), gradients("dense")
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(local, dense, strict=True))
