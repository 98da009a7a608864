"""One operation between two layers, of every kind: J and the gradients are the double backward's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, assert_agrees, result_of, worst
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit

SIDE = 6
LABELS = torch.tensor([0, 3, 1])


class Op(NamedTuple):
    """An operation on a map ``[3, 4, 6, 6]``, which gives any shape."""

    name: str
    function: Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """The operation, brought back to a map by a mean, where its shape is another."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        y = self.function(z)
        if y.shape == z.shape:
            return y
        return z * (1 + y.reshape(len(z), -1).mean(1)[:, None, None, None])


def index_of(z: Tensor) -> Tensor:
    return torch.arange(z.numel()).view_as(z) * 7 % z.shape[1]


def unique_values(z: Tensor) -> Tensor:
    values, inverse = torch.unique(z.detach(), return_inverse=True)
    return z * values[inverse].cos() + inverse / inverse.numel()


def codebook(z: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 20, dtype=z.dtype).view(5, 4).t() * z.mean((0, 2, 3))[:, None]
    index = z.detach().argmax(1)
    return F.embedding(index, table.t()).permute(0, 3, 1, 2) * z


def straight_through(z: Tensor) -> Tensor:
    hard = (z > 0).to(z.dtype)
    return (hard - z).detach() + z * z.sigmoid()


def eigenvalues(z: Tensor) -> Tensor:
    m = z + z.transpose(2, 3)
    return torch.linalg.eigvalsh(m)


def inner_product_svd(z: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    return u @ torch.diag_embed(s * s) @ vh


def cholesky(z: Tensor) -> Tensor:
    m = z @ z.transpose(2, 3) + 3 * torch.eye(SIDE, dtype=z.dtype)
    return torch.linalg.cholesky(m)


def complex_weights(z: Tensor) -> Tensor:
    w = torch.complex(torch.linspace(0, 1, SIDE).double(), torch.linspace(1, -1, SIDE).double())
    c = z.to(torch.complex128) * w
    return (c @ c.conj().transpose(2, 3)).real + c.imag


def as_complex(z: Tensor) -> Tensor:
    c = torch.view_as_complex(z.view(3, 4, SIDE, 3, 2).contiguous())
    return torch.view_as_real(c * c + c.conj()).view_as(z)


def polar(z: Tensor) -> Tensor:
    c = torch.polar(z.abs() + 1, z)
    return c.real * c.imag + c.angle() + c.abs()


def dict_of_parts(z: Tensor) -> Tensor:
    parts = dict(zip("abcd", z.unbind(1), strict=True))
    return torch.stack([parts[k] * i for i, k in enumerate("dcba")], 1)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def running_recurrence(z: Tensor) -> Tensor:
    state, outs = torch.zeros_like(z[:, :, 0]), []
    for row in z.unbind(2):
        state = state * row.sigmoid() + row.tanh()
        outs.append(state)
    return torch.stack(outs, 2)


ONE = torch.ones(())
MASK = torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 3 == 0
GRID = torch.linspace(-0.8, 0.7, 3 * SIDE * SIDE * 2).view(3, SIDE, SIDE, 2).double()
KERNEL = torch.linspace(-1, 1, 4 * 4 * 9).view(4, 4, 3, 3).double()

OPS = [
    Op("einsum bilinear", lambda z: torch.einsum("bchw,bcvw->bchv", z, z.sin())),
    Op("einsum trace", lambda z: torch.einsum("bcii->bc", z)),
    Op("einsum three", lambda z: torch.einsum("bch,bdh,bch->bcd", z[..., 0], z[..., 1], z[..., 2])),
    Op("bmm", lambda z: torch.bmm(z[:, 0], z[:, 1])),
    Op("baddbmm", lambda z: torch.baddbmm(z[:, 0], z[:, 1], z[:, 2], beta=2, alpha=-0.5)),
    Op("addmm", lambda z: torch.addmm(z[0, 0], z[1, 1], z[2, 2], beta=0.5, alpha=3) + z * 0),
    Op(
        "addmv, dot",
        lambda z: z * torch.dot(z[0, 0, 0], z[1, 1, 1]) + torch.mv(z[0, 0], z[0, 1, 0]),
    ),
    Op("addcmul", lambda z: torch.addcmul(z, z.sin(), z.cos(), value=2)),
    Op("addcdiv", lambda z: torch.addcdiv(z, z.sin(), z.cos() + 3, value=-2)),
    Op("lerp", lambda z: torch.lerp(z, z.sin(), z.sigmoid()) + torch.lerp(z, z * z, 0.3)),
    Op("matmul vector", lambda z: (z @ z[0, 0, 0])[..., None] * z),
    Op("matmul rmatmul", lambda z: torch.eye(SIDE).double() @ z @ z.mT),
    Op("outer, ger", lambda z: z * torch.outer(z[0, 0, 0], z[0, 0, 1])),
    Op("kron", lambda z: torch.kron(z[0, 0, :2, :2], z[1, 1, :3, :3]) * z),
    Op(
        "tensordot",
        lambda z: torch.tensordot(z, z, dims=([1, 3], [1, 3])).sum((2, 3))[:, None, :, None] * z,
    ),
    Op(
        "norms",
        lambda z: (
            z.norm() * z
            + z.norm(p=3, dim=1, keepdim=True)
            + torch.linalg.norm(z, dim=(2, 3), keepdim=True)
        ),
    ),
    Op("normalize", lambda z: F.normalize(z, dim=1) + F.normalize(z, p=1, dim=2)),
    Op("cosine similarity", lambda z: F.cosine_similarity(z, z.roll(1, 1).sin(), 1)),
    Op("pairwise distance", lambda z: F.pairwise_distance(z, z.roll(1, 1))),
    Op("logsumexp", lambda z: torch.logsumexp(z, (1, 2))),
    Op("softmax dims", lambda z: z.softmax(1) + F.softmax(z, -1) + torch.softmax(z, 2) * z),
    Op("softmin", lambda z: F.softmin(z, 1)),
    Op("log softmax", lambda z: F.log_softmax(z, 1) * z),
    Op("cumsum", lambda z: z.cumsum(2) * z),
    Op("cumprod", lambda z: (z + 2).cumprod(3)),
    Op("cummax, cummin", lambda z: z.cummax(2)[0] * z.cummin(3).values),
    Op("prod", lambda z: z.prod(1, keepdim=True) + z.prod(2).sum(2)[..., None, None]),
    Op("prod of all", lambda z: (z + 1.5).prod() * z),
    Op("where both", lambda z: torch.where(z > 0, z * z, z.exp())),
    Op("where scalar", lambda z: torch.where(MASK, z, 0.5) + z.where(MASK, z.sin())),
    Op("masked fill", lambda z: z.masked_fill(MASK, 2.0) * z),
    Op("masked fill tensor", lambda z: z.masked_fill(MASK, torch.tensor(2.0).double()) * z),
    Op("masked select", lambda z: z.masked_select(MASK).sum() * z),
    Op("masked scatter", lambda z: z.masked_scatter(MASK.expand_as(z), z.flatten().sin()) * z),
    Op("scatter", lambda z: z.scatter(1, index_of(z)[:, :1], z[:, 1:2] * 3) * z),
    Op("scatter value", lambda z: z.scatter(1, index_of(z)[:, :1], 0.3) * z),
    Op("scatter add", lambda z: z.scatter_add(1, index_of(z), z.sin()) * z),
    Op("scatter reduce", lambda z: z.scatter_reduce(1, index_of(z), z.sin(), "mean") * z),
    Op(
        "index add", lambda z: z.index_add(1, torch.tensor([0, 2, 0]), z[:, :3] * z[:, 1:], alpha=2)
    ),
    Op("index copy", lambda z: z.index_copy(1, torch.tensor([0, 2]), z[:, 1:3] * z[:, :2])),
    Op("index put", lambda z: z.index_put((torch.tensor([0, 0, 2]),), z.sin(), accumulate=True)),
    Op("index fill", lambda z: z.index_fill(1, torch.tensor([1]), 0.5) * z),
    Op("index select", lambda z: z.index_select(1, torch.tensor([3, 0, 0, 1])) * z),
    Op("advanced index", lambda z: z[:, [3, 0, 0, 1]] * z[torch.tensor([2, 0, 1])]),
    Op("boolean index", lambda z: z[z > 0].sum() * z),
    Op("gather, take", lambda z: z.gather(1, index_of(z)) * z.take(torch.tensor([5, 7, 7]))[1]),
    Op("take along dim", lambda z: torch.take_along_dim(z, z.argsort(2), 2) * z),
    Op("argsort and gather", lambda z: z.gather(3, z.argsort(3)) * z),
    Op("sort", lambda z: z.sort(1, descending=True)[0] * z + z.sort(2).indices),
    Op(
        "msort, median, mode",
        lambda z: z.msort() * z.median(1, True)[0] + z.kthvalue(2, 3, True)[0],
    ),
    Op("topk", lambda z: z.topk(2, 1)[0].sum(1, True) * z + z.topk(2, 1).indices.sum(1, True)),
    Op(
        "max, min with index",
        lambda z: z.max(1, True)[0] * z.min(2, True).values * z + z.max(1, True)[1],
    ),
    Op("amax, aminmax", lambda z: z.amax((2, 3), True) * z + z.aminmax(dim=1, keepdim=True)[0]),
    Op("max of all", lambda z: z * z.max() + z.min()),
    Op("unique", unique_values),
    Op("embedding", codebook),
    Op("roll, rot90, flip", lambda z: z.roll((1, 2), (2, 3)) * z.rot90(1, (2, 3)) + z.flip(1, 2)),
    Op("tril, triu", lambda z: z.tril() * z + z.triu(1).sin()),
    Op("diagonal", lambda z: torch.diag_embed(z.diagonal(dim1=2, dim2=3).sin()) * z),
    Op(
        "diff, trapezoid",
        lambda z: z.diff(dim=2)[:, :, :1] * z + torch.trapezoid(z, dim=3)[..., None],
    ),
    *[
        Op(f"pad {mode}", lambda z, mode=mode: F.pad(z, (1, 2, 2, 1), mode).sin())
        for mode in ("constant", "reflect", "replicate", "circular")
    ],
    Op("pad crop", lambda z: F.pad(z, (-1, 1, 1, -1), value=3.0) * z),
    *[
        Op(
            f"interpolate {mode}",
            lambda z, mode=mode: F.interpolate(z, scale_factor=1.5, mode=mode).sin(),
        )
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    ],
    Op(
        "interpolate corners",
        lambda z: F.interpolate(z, (9, 4), mode="bilinear", align_corners=True).sin(),
    ),
    Op("interpolate 1d", lambda z: F.interpolate(z.flatten(2), 20, mode="linear").sin()),
    Op("upsample", lambda z: nn.Upsample(scale_factor=2)(z).sin()),
    Op("unfold", lambda z: F.unfold(z, 3).sin()),
    Op("fold", lambda z: F.fold(F.unfold(z, 3, padding=1).sin(), (SIDE, SIDE), 3, padding=1)),
    Op("Tensor.unfold", lambda z: z.unfold(2, 3, 1).sin().mean((2, 4))),
    Op("grid sample", lambda z: F.grid_sample(z, GRID, align_corners=False).sin()),
    Op(
        "grid sample of x",
        lambda z: F.grid_sample(z.sin(), z[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=True),
    ),
    Op(
        "affine grid",
        lambda z: (
            F.grid_sample(
                z,
                F.affine_grid(
                    z.mean((2, 3))[:, :3, None].expand(3, 3, 2).transpose(1, 2).tanh(),
                    z.shape,
                    align_corners=False,
                ),
                align_corners=False,
            )
            + z
        ),
    ),
    Op("transposed", lambda z: F.conv_transpose2d(z, KERNEL, stride=2, output_padding=1).sin()),
    Op("kernel from x", lambda z: F.conv2d(z, KERNEL * z.mean(), padding=1)),
    Op(
        "dynamic convolution",
        lambda z: F.conv2d(
            z.flatten(0, 1)[None],
            z[:, :, :3, :3].flatten(0, 1)[:, None].sin(),
            padding=1,
            groups=12,
        ).view_as(z),
    ),
    Op("conv1d", lambda z: F.conv1d(z.flatten(2), KERNEL[:, :, 0]).sin()),
    Op("conv3d", lambda z: F.conv3d(z.view(3, 4, 4, 3, 3), KERNEL[:, :, None]).sin()),
    Op("conv same", lambda z: F.conv2d(z, KERNEL, padding="same", dilation=2).sin()),
    Op("gumbel softmax", lambda z: F.gumbel_softmax(z, 0.7, dim=1)),
    Op("gumbel hard", lambda z: F.gumbel_softmax(z, 0.7, hard=True, dim=1) * z),
    Op("rrelu", lambda z: F.rrelu(z, training=True) * z),
    Op("pixel shuffle", lambda z: F.pixel_shuffle(z, 2).sin()),
    Op("pixel unshuffle", lambda z: F.pixel_unshuffle(z, 2).sin().view_as(z)),
    Op("channel shuffle", lambda z: F.channel_shuffle(z, 2) * z),
    Op("pow tensor", lambda z: (z.abs() + 0.5) ** z + z**3 + (z + 3) ** 0.5 + 2**z),
    Op("float_power", lambda z: torch.float_power(z.abs() + 1, z)),
    Op("atan2, hypot", lambda z: torch.atan2(z, z.sin() + 2) + torch.hypot(z, z.cos())),
    Op("clamp tensors", lambda z: torch.clamp(z, z.sin() - 0.1, z.sin() + 0.1) * z),
    Op("clamp", lambda z: z.clamp(min=-0.1) * z.clamp_max(0.3) + z.clip(0, 1)),
    Op("maximum", lambda z: torch.maximum(z, z * z) * torch.minimum(z, z.sin() + 0.2)),
    Op("max of two", lambda z: torch.max(z, z * z) + torch.fmin(z, z.sin() + 0.2) * z),
    Op("abs, sgn", lambda z: z.abs() * z + z.sgn() * z * z),
    Op("sign", lambda z: z.sign() * z * z),
    Op("step", lambda z: torch.heaviside(z.detach(), z.new_ones(())) * z * z),
    Op("floor", lambda z: z.floor() * z * z),
    Op(
        "ceil, trunc, round", lambda z: z.ceil() * z * z + (z * 3).trunc() * z + (z * 4).round() * z
    ),
    Op("power zero", lambda z: z.pow(0) * z * z),
    Op("sqrt, rsqrt", lambda z: (z * z + 1).sqrt() * (z * z + 1).rsqrt().sin()),
    Op("logs", lambda z: (z * z + 1).log() + torch.log1p(z * z) + (z * z + 1).log2() * z),
    Op(
        "special",
        lambda z: (
            torch.special.expit(z)
            + torch.digamma(z * z + 1)
            + torch.lgamma(z * z + 1)
            + torch.special.i0(z) * 0.1
        ),
    ),
    Op(
        "trigonometry",
        lambda z: (
            torch.tan(z * 0.3)
            + torch.asin(z.tanh() * 0.9)
            + torch.atan(z)
            + torch.sinh(z)
            + torch.asinh(z)
        ),
    ),
    Op("modulo", lambda z: torch.remainder(z, 0.7) * z + z.fmod(0.4) * z + z.frac() * z),
    Op("x / (1 + x)", lambda z: z / (1 + z.abs())),
    Op("true_divide", lambda z: z.true_divide(z.exp() + 1) + torch.div(z, z.exp() + 1) / 3),
    Op("reciprocal, rdiv", lambda z: 1 / (z.exp() + 1) + (z.exp() + 1).reciprocal() * z),
    Op(
        "floor division",
        lambda z: (
            torch.div(z, 0.3, rounding_mode="floor") * z
            + torch.div(z, 0.2, rounding_mode="trunc") * z
        ),
    ),
    Op("rsub", lambda z: (1 - z) * z + torch.rsub(z, 2) * z),
    Op("rsub alpha", lambda z: torch.rsub(z, 2, alpha=3) * z),
    Op(
        "std, var",
        lambda z: z * z.std(1, keepdim=True) + z.var((2, 3), correction=0)[..., None, None],
    ),
    Op(
        "std_mean, var_mean",
        lambda z: sum(t for t in torch.std_mean(z, 1, keepdim=True)) * z + torch.var_mean(z)[0],
    ),
    Op(
        "einops-like",
        lambda z: z.view(3, 4, 2, 3, 2, 3).permute(0, 1, 3, 5, 2, 4).reshape(3, 36, 4).softmax(1),
    ),
    Op(
        "split, unflatten",
        lambda z: torch.cat([t * i for i, t in enumerate(z.split([1, 2, 1], 1))], 1),
    ),
    Op("tensor_split, hsplit", lambda z: torch.cat(z.tensor_split(3, 1)[::-1], 1) * z),
    Op("unbind and stack", dict_of_parts),
    Op("vstack, hstack", lambda z: torch.hstack([z[:, :2], z[:, 2:].sin()]) * z),
    Op(
        "repeat_interleave, tile",
        lambda z: z.repeat_interleave(2, 2)[:, :, 1:7] * z.tile(1, 1, 1, 2)[..., 3:9],
    ),
    Op(
        "expand, broadcast",
        lambda z: z[:, :1].expand(-1, 4, -1, -1) * torch.broadcast_to(z[..., :1], z.shape),
    ),
    Op("movedim, swapaxes", lambda z: z.movedim(1, 3).sin().movedim(3, 1) * z.swapaxes(2, 3)),
    Op("squeeze", lambda z: z[:, :1].squeeze(1).unsqueeze(1).sin() * z),
    Op("as_strided", lambda z: z.contiguous().as_strided((3, 4, 6, 6), (144, 36, 1, 6)) * z),
    Op("complex weights", complex_weights),
    Op("view_as_complex", as_complex),
    Op("polar", polar),
    Op("fft, ifft", lambda z: torch.fft.ifft(torch.fft.fft(z, dim=2) * 1j * z, dim=2).real),
    Op("fft2 power", lambda z: torch.fft.fft2(z).abs().square().mean((2, 3))),
    Op(
        "rfft, angle",
        lambda z: torch.fft.rfft(z + 1, norm="ortho")[..., 1:3].angle().sum(-1, True) * z,
    ),
    Op("fftshift", lambda z: torch.fft.fftshift(torch.fft.fft2(z)).real * z),
    Op(
        "stft-like",
        lambda z: torch.fft.irfft(torch.fft.rfft(z).conj() * torch.fft.rfft(z.sin()), n=SIDE),
    ),
    Op("inv", lambda z: torch.linalg.inv(z + 4 * torch.eye(SIDE)) * z),
    Op("solve", lambda z: torch.linalg.solve(z + 4 * torch.eye(SIDE), z.sin())),
    Op(
        "solve triangular",
        lambda z: torch.linalg.solve_triangular(z.tril() + 4 * torch.eye(SIDE), z, upper=False),
    ),
    Op("svd product", inner_product_svd),
    Op("singular values", lambda z: torch.linalg.svdvals(z)),
    Op("eigvalsh", eigenvalues),
    Op("cholesky", cholesky),
    Op(
        "det, slogdet",
        lambda z: torch.linalg.det(z + 2 * torch.eye(SIDE)) + torch.linalg.slogdet(z)[1],
    ),
    Op("matrix exp, power", lambda z: torch.matrix_exp(z * 0.2) + torch.linalg.matrix_power(z, 3)),
    Op("pinv, qr", lambda z: torch.linalg.pinv(z) * 0.1 + torch.linalg.qr(z)[0] * z),
    Op(
        "losses inside",
        lambda z: (
            F.mse_loss(z, z.sin(), reduction="none")
            + F.smooth_l1_loss(z, z.cos())
            + F.binary_cross_entropy_with_logits(z, z.sigmoid().detach())
        ),
    ),
    Op(
        "cross-entropy inside",
        lambda z: F.cross_entropy(z.mean((2, 3)), torch.tensor([0, 1, 2]), label_smoothing=0.1) * z,
    ),
    Op(
        "kl, nll inside",
        lambda z: (
            F.kl_div(z.log_softmax(1), z.roll(1, 1).softmax(1), reduction="none")
            + F.nll_loss(z.log_softmax(1), torch.zeros(3, 6, 6).long())
        ),
    ),
    Op(
        "bilinear form",
        lambda z: F.bilinear(z[..., 0], z[..., 1], torch.ones(2, 6, 6).double().cumsum(2)),
    ),
    Op("straight-through", straight_through),
    Op("recurrence", running_recurrence),
    Op(
        "glu, threshold",
        lambda z: F.glu(torch.cat([z, z.sin()], 1), 1) + F.threshold(z, 0.1, 0.05) * z,
    ),
    Op(
        "activations",
        lambda z: (
            F.elu(z)
            + F.selu(z) * F.celu(z, 0.7)
            + F.mish(z)
            + F.softplus(z, 2, 1)
            + F.logsigmoid(z)
        ),
    ),
    Op(
        "activations 2",
        lambda z: (
            F.gelu(z, approximate="tanh")
            + F.hardswish(z * 4)
            + F.hardtanh(z, -0.3, 0.4) * z
            + F.softshrink(z, 0.1) * z
            + F.hardshrink(z, 0.1) * z
            + F.tanhshrink(z)
        ),
    ),
    Op("prelu", lambda z: F.prelu(z, z.mean((0, 2, 3)))),
    Op(
        "pools",
        lambda z: (
            F.lp_pool2d(z.abs() + 0.1, 2, 2)
            + F.adaptive_max_pool2d(z, 3) * F.adaptive_avg_pool2d(z, (3, 3))
        ),
    ),
    Op(
        "pool 1d, 3d",
        lambda z: (
            F.max_pool1d(z.flatten(2), 3).sum(2)[..., None, None] * z + F.avg_pool3d(z, 2).sum()
        ),
    ),
    Op(
        "pool with indices",
        lambda z: F.max_unpool2d(*F.max_pool2d(z, 2, return_indices=True), 2) * z,
    ),
    Op("local response", lambda z: F.local_response_norm(z, 3)),
    Op("group norm of x", lambda z: F.group_norm(z, 2, z.mean((0, 2, 3)), z.std((0, 2, 3)))),
    Op("layer norm of x", lambda z: F.layer_norm(z, (SIDE,), z.mean((0, 1, 2)), z.std((0, 1, 2)))),
    Op("rms norm of x", lambda z: F.rms_norm(z, (SIDE,), z.mean((0, 1, 2)))),
    Op("instance norm", lambda z: F.instance_norm(z, weight=z.mean((0, 2, 3)))),
    Op("nan_to_num", lambda z: torch.nan_to_num(z.sin(), nan=0.5) * z),
    Op("renorm", lambda z: z.renorm(2, 1, 3.0) * z),
    Op(
        "item and tolist",
        lambda z: z * max(1.0, z.abs().max().item()) + sum(z[0, 0, 0].tolist()[:2]),
    ),
    Op("in-place chain", lambda z: z.clone().mul_(2).add_(1).sin_().clamp_(-0.9, 0.9)),
    Op("copy_", lambda z: torch.zeros_like(z).copy_(z.sin()) * z),
    Op("out of list", lambda z: torch.stack(list(z)) * z),
    Op("type conversions", lambda z: z.to(torch.float64) * z + z.double().type_as(z).sin()),
    Op("stack of a named tuple", lambda z: torch.stack(Pair(z, z.sin())).prod(0)),
    Op("number factors", lambda z: z * True + 3 * z - z * torch.tensor(2) + z / torch.tensor(3)),
]


def log_cumulative_sum(z: Tensor) -> Tensor:
    """torch.logcumsumexp over the rows, by a masked logsumexp."""
    below = torch.ones(SIDE, SIDE, dtype=torch.bool).tril()[:, :, None]
    return z[:, :, None].masked_fill(~below, -torch.inf).logsumexp(3)


def network(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
    head = (nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*stem, Apply(function), *head).double()


def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()


TARGETS = {"logit": LabelLogit(), "window": AttentionWindow("3", window=0.4)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_an_operation(op, batch_stats, target):
    assert_agrees(
        lambda: network(op.function), images(), TARGETS[target], LABELS, batch_stats=batch_stats
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_logcumsumexp_against_its_definition(batch_stats, target):
    """PyTorch's own double backward is wrong here where a loss of the output joins in."""
    results = [
        result_of(
            lambda f=function: network(f),
            images(),
            TARGETS[target],
            LABELS,
            strategy,
            batch_stats=batch_stats,
        )
        for function, strategy in (
            (lambda z: z.logcumsumexp(2), "auto"),
            (log_cumulative_sum, "autograd"),
        )
    ]
    assert worst(*results) < (TOLERANCE, "")


FROZEN = [*OPS, Op("logcumsumexp", lambda z: z.logcumsumexp(2))]


@pytest.mark.parametrize("op", FROZEN, ids=[op.name for op in FROZEN])
def test_an_operation_in_a_frozen_part(op):
    """No gradient passes through it: the tangent alone must be right."""
    assert_agrees(
        lambda: network(op.function),
        images(),
        LabelLogit(),
        LABELS,
        batch_stats="batch",
        change=lambda model: model[:4].requires_grad_(False),
    )


def dead_cotangents(z: Tensor) -> Tensor:
    return F.relu(z.logcumsumexp(2) - 1)


def test_logcumsumexp_whose_cotangent_has_zeros():
    """Where PyTorch's own double backward gives NaN: the masked logsumexp is the reference."""
    results = [
        result_of(lambda f=f: network(f), images(), LabelLogit(), LABELS, strategy)
        for f, strategy in (
            (dead_cotangents, "auto"),
            (lambda z: F.relu(log_cumulative_sum(z) - 1), "autograd"),
        )
    ]
    assert worst(*results) < (TOLERANCE, "")
