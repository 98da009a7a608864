"""Operations of every kind between two layers: the gradient is the double backward's, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from comparison import assert_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import LabelLogit, Logits, with_jacobian

W = 6  # features, and the sides of a map


def complex_filter(z: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(z)
    weight = torch.view_as_complex(torch.linspace(0.5, 1, spectrum[0, 0].numel() * 2).view(-1, 2))
    return torch.fft.irfft2(
        spectrum * weight.to(spectrum.dtype).view(spectrum.shape[-2:]), s=(W, W)
    )


def complex_polar(z: Tensor) -> Tensor:
    value = torch.complex(z, z.flip(-1) + 2)
    return value.abs() + value.angle() + (value * value.conj()).real


def sorted_and_gathered(z: Tensor) -> Tensor:
    values, index = z.flatten(2).sort(-1)
    return (values * z.flatten(2).tanh().gather(2, index)).view_as(z)


def largest(z: Tensor) -> Tensor:
    top, _ = z.flatten(2).topk(3, -1)
    best, where = z.flatten(2).max(-1)
    return z * top.sum(-1)[..., None, None] + (best + where.double())[..., None, None]


def attention(**options):
    def run(z: Tensor) -> Tensor:
        tokens = z.flatten(2).transpose(1, 2).reshape(len(z), 2, -1, 2 * W // 2)[..., :4]
        mixed = F.scaled_dot_product_attention(tokens, tokens.tanh(), tokens.sin(), **options)
        return z + mixed.mean((1, 2, 3))[:, None, None, None] * z

    return run


def grouped_heads(z: Tensor) -> Tensor:
    q = z.flatten(2)[:, :, :12].reshape(len(z), 4, -1, 4)
    kv = q[:, :2].cos()
    out = F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    return z * out.mean((1, 2, 3))[:, None, None, None]


def rows(function):
    """An operation on ``[B, T, D]``."""

    def run(z: Tensor) -> Tensor:
        y = function(z.flatten(2).transpose(1, 2))
        return z * (1 + y.flatten(1).mean(1)[:, None, None, None])

    return run


def written_in_parts(z: Tensor) -> Tensor:
    out = torch.empty_like(z)
    for i, part in enumerate(z.unbind(1)):
        out[:, i] = part * (i + 1)
    return out


def batch_statistics_by_hand(z: Tensor) -> Tensor:
    std, mean = torch.std_mean(z, (0, 2, 3), keepdim=True)
    return (z - mean) / (std + 1)


def conditional_norm(z: Tensor) -> Tensor:
    scale = z.mean((0, 2, 3)).tanh() + 1
    return F.batch_norm(z, None, None, scale, scale * 2, training=True)


G = torch.Generator().manual_seed(0)
MASK = torch.rand(4, W, W, generator=G) > 0.4
FUNCTIONS = {
    "Fourier filter": complex_filter,
    "complex": complex_polar,
    "sort and gather": sorted_and_gathered,
    "topk and max": largest,
    "attention": attention(),
    "causal attention": attention(is_causal=True),
    "masked attention": attention(attn_mask=torch.rand(1, 1, 12, 12, generator=G).double()),
    "grouped heads": grouped_heads,
    "written in parts": written_in_parts,
    "moments by hand": batch_statistics_by_hand,
    "conditional norm": conditional_norm,
    "softmax": lambda z: z.flatten(2).softmax(-1).view_as(z) + z.log_softmax(1),
    "einsum": lambda z: torch.einsum("bchw,bdhw->bcd", z, z.tanh())[:, :, :, None] * z[:, :, :1],
    "matmul": lambda z: (
        z @ z.transpose(2, 3).sin() + torch.baddbmm(z[:, 0], z[:, 1], z[:, 2])[:, None]
    ),
    "distances": lambda z: z * F.pairwise_distance(z, z.roll(1, 1) + 1)[..., None],
    "logsumexp, norm": lambda z: (
        z * z.logsumexp((2, 3), keepdim=True) + z.norm(dim=1, keepdim=True)
    ),
    "cumulative": lambda z: z.cumsum(2) + (z + 2).cumprod(3) + (z + 3).prod(1, keepdim=True),
    "where, masked": lambda z: torch.where(MASK, z, z.sin()) + z.masked_fill(MASK, 0.5),
    "scatter, index add": lambda z: z.scatter_add(
        1, torch.zeros_like(z, dtype=torch.int64), z * z
    ).index_add(1, torch.tensor([2]), z[:, :1].exp()),
    "index put": lambda z: z.index_put((torch.tensor([0, 1]),), z[:2].sin(), accumulate=True),
    "roll, flip, stack": lambda z: torch.stack([z.roll(1, 2), z.flip(3), z]).prod(0),
    "repeat, expand": lambda z: z.repeat(1, 1, 2, 1)[:, :, ::2] * z.mean(1, True).expand_as(z),
    "pads": lambda z: (
        sum(
            F.pad(z, (1, 1, 1, 1), mode, **kw)[:, :, 1:-1, 2:].mean(3, True)
            for mode, kw in (
                ("constant", {"value": 2.0}),
                ("reflect", {}),
                ("replicate", {}),
                ("circular", {}),
            )
        )
        * z
    ),
    "resize": lambda z: (
        F.interpolate(z, scale_factor=2, mode="bicubic")[:, :, ::2, ::2]
        * F.interpolate(F.interpolate(z, 3, mode="nearest"), W, mode="bilinear", antialias=True)
    ),
    "unfold and fold": lambda z: F.fold(F.unfold(z, 3, padding=1).tanh(), (W, W), 3, padding=1),
    "grid sample": lambda z: F.grid_sample(
        z, (z[:, :2].permute(0, 2, 3, 1)).tanh() * 0.9, align_corners=False
    ),
    "pow, atan2": lambda z: (z + 3) ** (z.sigmoid() + 1) + torch.atan2(z, z.cos() + 2),
    "clamps": lambda z: (
        z.clamp(-0.2, 0.3) + torch.maximum(z, z.roll(1, 1)) * torch.minimum(z, z * z)
    ),
    "roots and ratios": lambda z: (
        (z.abs() + 1).sqrt() + (z * z + 1).rsqrt() + z / (1 + z.abs()) + 1 / (2 + z.sin())
    ),
    "solve": lambda z: (
        torch.linalg.solve(z + 3 * torch.eye(W), z.sin()) + torch.linalg.inv(z + 4 * torch.eye(W))
    ),
    "loss inside": lambda z: (
        z
        * F.cross_entropy(z.mean((2, 3)), torch.tensor([0, 1, 2]), reduction="none")[
            :, None, None, None
        ]
    ),
    "checkpoint": lambda z: checkpoint(lambda t: t.tanh() * t, z, use_reentrant=False),
    "hidden constants": lambda z: z * z.detach() + z.data + z * torch.zeros_like(z).fill_(2),
    "alpha and reverse": lambda z: (
        torch.add(z, z.sin(), alpha=3) - torch.sub(1, z, alpha=2) + 2 / (z + 3) - z
    ),
    "group norm": lambda z: F.group_norm(z, 2, torch.tensor([1.0, 2, 3, 4]).double()),
    "local norms": lambda z: F.layer_norm(z, (W,)) + F.instance_norm(z) + F.rms_norm(z, (W,)),
}


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options) -> None:
        super().__init__()
        self.cell = kind(4, 3, batch_first=True, **options)

    def forward(self, z: Tensor) -> Tensor:
        y, _ = self.cell(z.flatten(2).transpose(1, 2)[:, :9])
        return z * (1 + y.flatten(1).mean(1)[:, None, None, None])


class Tokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        tokens = z.flatten(2).transpose(1, 2)[:, :8]
        y = (
            self.inner(tokens, tokens, tokens)[0]
            if isinstance(self.inner, nn.MultiheadAttention)
            else self.inner(tokens)
        )
        return z * (1 + y.flatten(1).mean(1)[:, None, None, None])


class Volume(nn.Module):
    """The last layers in other numbers of dimensions."""

    def __init__(self, layer: nn.Module, dims: int) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims

    def forward(self, z: Tensor) -> Tensor:
        y = z.flatten(2) if self.dims == 1 else z.unflatten(3, (2, 3))
        return z * (1 + self.layer(y).flatten(1).mean(1).tanh()[:, None, None, None])


MODULES = {
    "LSTM": lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2),
    "LSTM with dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN, nonlinearity="relu"),
    "multi-head attention": lambda: Tokens(nn.MultiheadAttention(4, 2, batch_first=True)),
    "transformer": lambda: Tokens(nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True)),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
    "PReLU": lambda: nn.PReLU(4),
    "RReLU": lambda: nn.RReLU(),
    "conv1d, norm": lambda: Volume(nn.Sequential(nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3)), 1),
    "conv3d, norm": lambda: Volume(
        nn.Sequential(nn.Conv3d(4, 3, 2), nn.BatchNorm3d(3), nn.ReLU()), 3
    ),
    "dropouts": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.FeatureAlphaDropout(0.3), nn.Dropout2d(0.2, inplace=True)
    ),
    "bilinear": lambda: Apply(rows(lambda t: F.bilinear(t, t.sin(), torch.ones(2, 4, 4).double()))),
}


def check(middle, batch_stats: str) -> None:
    torch.manual_seed(1)

    def make() -> nn.Sequential:
        stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        return nn.Sequential(
            *stem, middle(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5)
        )

    x, y = torch.rand(3, 3, W, W), torch.tensor([0, 3, 1])
    student, teacher = make().double(), make().double()
    for network in (student, teacher):
        network.eval()(x.double())
    assert_exact(student.train(), teacher, x, y, LabelLogit(), batch_stats=batch_stats)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, batch_stats):
    if name == "conditional norm" and batch_stats == "frozen":
        pytest.skip("the reference's statistics would be those of a norm that scales by x")
    check(lambda: Apply(FUNCTIONS[name]), batch_stats)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, batch_stats):
    check(MODULES[name], batch_stats)


def test_a_recurrent_network_warns_of_nothing():
    model = nn.Sequential(Recurrent(nn.GRU), nn.Flatten(), nn.Linear(36, 2)).double()
    x = torch.rand(2, 4, 3, 3).double()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with_jacobian(model, x, Logits()).jacobian.square().sum().backward()
    finally:
        torch.set_warn_always(always)
    assert all(p.grad.norm() > 0 for p in model[0].parameters())


@pytest.mark.parametrize("function", [torch.tanh, F.silu, lambda z: F.layer_norm(z, (W,))])
def test_forward_mode_does_not_differentiate_what_has_a_second_derivative(function, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, W), nn.Linear(W, 3)

        def forward(self, x):
            return self.last(function(self.first(x)))

    def refuse(*args):
        raise AssertionError("forward mode, which is several times slower on these functions")

    monkeypatch.setattr(torch.autograd.forward_ad, "make_dual", refuse)
    model, x = Model().double(), torch.rand(5, 4, dtype=torch.float64)
    with_jacobian(model, x, Logits()).jacobian.square().sum().backward()


@pytest.mark.parametrize("trains", [False, True])
def test_logcumsumexp_where_its_cotangent_is_zero(trains):
    """PyTorch's own second derivative is wrong there; that of the same sum by a mask is not."""

    def by_mask(z: Tensor) -> Tensor:
        sums = torch.where(torch.ones(W, W).tril().bool(), z[..., None, :], -torch.inf)
        return sums.logsumexp(-1)

    def gradients(function) -> list[Tensor]:
        torch.manual_seed(0)
        stem, scale = nn.Linear(W, W).requires_grad_(trains), nn.Parameter(torch.rand(W))
        mask = torch.tensor([1.0, 0, -1, 0, 0, 1])

        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (function(stem(x)) * scale * mask).sin().sum(1)

        x = torch.rand(3, W, W, generator=torch.Generator().manual_seed(1))
        model = Model().double()
        stem.double()
        scale.data = scale.data.double()
        out = with_jacobian(
            *(model, x.double(), Logits()),
            strategy="auto" if function is not by_mask else "autograd",
        )
        loss = out.jacobian.square().sum()
        return [*torch.autograd.grad(loss, [scale, *stem.parameters()][: 3 if trains else 1])]

    found = gradients(lambda z: z.logcumsumexp(-1)), gradients(by_mask)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", ["cholesky_inverse", "as_strided_scatter"])
def test_operations_whose_jvp_is_wrong_in_pytorch(function):
    def inverse(z: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(z @ z.mT + torch.eye(W).to(z)))

    def scatter(z: Tensor) -> Tensor:
        return torch.as_strided_scatter(z, z[0, 0].sin(), (W, W), (W, 1))

    def frozen() -> nn.Module:
        middle = Apply(inverse if function == "cholesky_inverse" else scatter)
        return nn.Sequential(middle, nn.Tanh(), nn.Flatten(), nn.Linear(4 * W * W, 3)).double()

    x = torch.rand(3, 4, W, W, generator=torch.Generator().manual_seed(1)).double()
    assert_agrees(frozen, x, LabelLogit(), torch.tensor([0, 2, 1]))
