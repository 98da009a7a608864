"""The engine against the double backward, in float64 and in float32."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_exact, relative_error, step
from small_network import agrees, network
from torch import nn

import fastjac
from fastjac import AttentionWindow, LabelLogit


def batch(size: int = 2, height: int = 24, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.rand(size, 3, height, width), torch.randint(5, (size,))


def pair(make, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return make(*args, **kwargs), make(*args, **kwargs)


def half_eval(student: nn.Module) -> nn.Module:
    """The first BatchNorm in eval mode, with statistics of its own; the others in train mode."""
    norm = next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 1.5)
    norm.eval()
    return student


MODES = {"train": lambda s: s.train(), "eval": lambda s: s.eval(), "mixed": half_eval}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", [networks.vgg, networks.Residual])
def test_label_logit(network, mode, batch_stats, normalize):
    student, teacher = pair(network)
    MODES[mode](student)
    options = {"normalize": normalize, "batch_stats": batch_stats}
    assert_exact(student, teacher, *batch(3), LabelLogit(), **options)


@pytest.mark.parametrize("anchor", ["teacher", "own"])
@pytest.mark.parametrize("strategy", ["dense", "local"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("network", "layer"), [(networks.vgg, "7"), (networks.Residual, "last")])
def test_window_with_frozen_statistics(network, layer, mode, strategy, anchor):
    student, teacher = pair(network)
    MODES[mode](student)
    target = AttentionWindow(layer, window=0.4, anchor=anchor)
    assert_exact(student, teacher, *batch(), target, strategy=strategy)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["train", "mixed"])
@pytest.mark.parametrize(("network", "layer"), [(networks.vgg, "7"), (networks.Residual, "last")])
def test_window_with_batch_statistics(network, layer, mode, normalize):
    student, teacher = pair(network)
    MODES[mode](student)
    options = {"batch_stats": "batch", "normalize": normalize}
    assert_exact(student, teacher, *batch(), AttentionWindow(layer, window=0.4), **options)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["dense", "local"])
def test_powers(power, strategy):
    student, teacher = pair(networks.vgg)
    target = AttentionWindow("4", window=0.3, power=power)  # a convolution's output: of any sign
    assert_exact(student, teacher, *batch(), target, strategy=strategy)


@pytest.mark.parametrize(("make", "layer"), [(networks.vgg, "7"), (networks.Residual, "last")])
@pytest.mark.parametrize("strategy", ["dense", "local"])
def test_every_position_of_the_window(make, layer, strategy):
    """J at each place of the map, corners and borders among them, a batch at a time."""
    torch.manual_seed(3)
    model = make().double().eval()
    target = AttentionWindow(layer, window=0.5)
    x = torch.rand(1, 3, 22, 26, dtype=torch.float64)
    _, features = fastjac.features.forward_with_features(model, x, layer)
    k = target.side(features)
    rows, cols = (n - k + 1 for n in features.shape[2:])
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    x = x.expand(len(places), -1, -1, -1)
    want = fastjac.input_jacobian(model, x, target, position=places, strategy="autograd")
    got = fastjac.input_jacobian(model, x, target, position=places, strategy=strategy)
    assert want.abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("strategy", ["dense", "local"])
def test_batch_of_one(strategy):
    student, teacher = pair(networks.vgg)
    target = AttentionWindow("7", window=0.4)
    assert_exact(student, teacher, *batch(1), target, strategy=strategy)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_gamma_of_zero(batch_stats):
    """A residual block's last BatchNorm often starts there: its gradient is not G / gamma."""
    student, teacher = pair(networks.Residual)
    nn.init.zeros_(student.norm2.weight)
    nn.init.zeros_(student.stem[1].weight[:2])
    assert_exact(student, teacher, *batch(3), LabelLogit(), batch_stats=batch_stats)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_batch_norm_without_parameters(batch_stats):
    student, teacher = pair(networks.vgg, affine=False)
    assert_exact(student, teacher, *batch(3), LabelLogit(), batch_stats=batch_stats)


class NormOfAParameter(nn.Module):
    """A BatchNorm whose map does not depend on x, in a chain with one that does."""

    def __init__(self, add) -> None:
        super().__init__()
        self.map, self.add = nn.Parameter(torch.rand(3, 4, 4, 4)), add
        self.norm = nn.BatchNorm2d(4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.add(self.norm(self.map), z).relu(), 2, 2).repeat(1, 1, 2, 2)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("add", [torch.add, lambda y, z: z + y, lambda y, z: y.add_(z)])
def test_the_norm_of_a_parameter_in_a_chain(add, batch_stats):
    agrees(lambda: network(NormOfAParameter(add)), batch_stats)


class InPlaceOnView(nn.Module):
    """As a classifier's Dropout(inplace=True) on what was flattened."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (2 * x).flatten(1)
        self.function(y)
        return y.view_as(x)


VIEWS = {
    "dropout of a view": lambda y: F.dropout(y, 0.3, inplace=True),
    "ELU of a view": lambda y: F.elu(y, inplace=True),
    "ReLU of a view": lambda y: F.relu(y, inplace=True),
    "product into a view": lambda y: y.mul_((3 * y).sigmoid()),
    "sum into a view": lambda y: y.add_((3 * y).sigmoid()),
}
CASES = {
    "branches": (networks.Branches, 4),
    "squeeze-excite": (networks.SqueezeExcite, 4),
    "layer norm": (networks.ChannelsLastNorm, 4),
    "split and shuffle": (networks.Splits, 4),
    "attention": (networks.Attention, 4),
    "weight standardised": (lambda: networks.WeightStandardised(4, 4, 3), 4),
    "group norm": (lambda: nn.GroupNorm(2, 4), 4),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 4),
    "local response": (lambda: nn.LocalResponseNorm(3, alpha=0.5), 4),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Conv2d(4, 4, 3)), 4),
    "dropout in place": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.3, True)), 4),
    **{
        name: (lambda f=f: nn.Sequential(InPlaceOnView(f), nn.Conv2d(4, 4, 3)), 4)
        for name, f in VIEWS.items()
    },
    "channel dropout": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout2d(0.3)), 4),
    "alpha dropout": (lambda: nn.AlphaDropout(0.3), 4),
    "average pool": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), 4),
    "average pool, no padding counted": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 4),
    "overlapping pool": (lambda: nn.MaxPool2d(3, 1, 1), 4),
    "ceil-mode pool": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), 4),
    "dilated pool": (lambda: nn.MaxPool2d(2, 2, dilation=2), 4),
    "depthwise": (lambda: nn.Conv2d(4, 8, (3, 5), (1, 2), (1, 2), groups=4), 8),
    "same padding": (lambda: nn.Conv2d(4, 4, (3, 2), padding="same"), 4),
    "reflected padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 2, 2), 4),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 4),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 1),
    "ReLU6": (lambda: nn.ReLU6(True), 4),
    "leaky": (lambda: nn.LeakyReLU(0.2, True), 4),
    "leaky, rising both ways": (lambda: nn.LeakyReLU(-0.2), 4),
    "PReLU": (lambda: nn.PReLU(4), 4),
    "PReLU of one slope": (lambda: nn.Sequential(nn.PReLU(), nn.Conv2d(4, 4, 3, padding=1)), 4),
    "zero padding": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(4, 4, 3)), 4),
    "constant padding": (
        lambda: nn.Sequential(nn.ReLU(), nn.ConstantPad2d((2, -1, 0, 3), 0.7), nn.MaxPool2d(3, 1)),
        4,
    ),
    "padding of channels": (lambda: nn.ConstantPad3d((1, 0, 0, 1, 1, 2), 0.7), 7),
    "SiLU": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(True)), 4),
    "GELU": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()), 4),
    "Hardswish": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish(True)), 4),
    "Mish": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Mish()), 4),
    "Softplus": (lambda: nn.Softplus(), 4),
    "ELU": (lambda: nn.ELU(inplace=True), 4),
    "GLU": (lambda: nn.GLU(1), 2),
}
GLOBAL = {"squeeze-excite", "split and shuffle", "attention", "group norm"}
GLOBAL |= {"instance norm", "local response", "same padding", "reflected padding", "transposed"}
GLOBAL |= {"bilinear", "pixel shuffle", "GLU", "alpha dropout", "leaky, rising both ways"}
GLOBAL |= {"branches", "padding of channels", *VIEWS}


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_operations_dense(case, batch_stats):
    middle, channels = CASES[case]
    student, teacher = pair(lambda: networks.Blocks(middle(), channels))
    options = {"batch_stats": batch_stats, "strategy": "dense"}
    assert_exact(student, teacher, *batch(2, 12, 10), LabelLogit(), **options)


@pytest.mark.parametrize("case", sorted(CASES.keys() - GLOBAL))
def test_operations_local(case):
    middle, channels = CASES[case]
    student, teacher = pair(lambda: networks.Blocks(middle(), channels))
    target = AttentionWindow("last", window=0.3, anchor="own")
    assert_exact(student, teacher, *batch(3, 16, 14), target, strategy="local")


@pytest.mark.parametrize("case", sorted(GLOBAL - {"pixel shuffle"}))
def test_operations_without_crops_are_named(case):
    middle, channels = CASES[case]
    student, teacher = pair(lambda: networks.Blocks(middle(), channels))
    matcher = fastjac.JacobianMatching(
        student, teacher, AttentionWindow("last", window=0.3), strategy="local"
    )
    with pytest.raises(fastjac.FastjacError, match=r"strategy='local' needs .* global: .*middle"):
        matcher(*batch(2, 16, 14))


def test_channels_last():
    student, teacher = pair(networks.Residual)
    x, y = batch(2)
    last = {"memory_format": torch.channels_last}
    for target in (AttentionWindow("last", window=0.4), LabelLogit()):
        assert_exact(student.to(**last), teacher.to(**last), x.contiguous(**last), y, target)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("target", [AttentionWindow("7", window=0.4), LabelLogit()])
def test_float32(target, batch_stats, native, monkeypatch):
    """The error against float64 is at most twice that of the double backward in float32."""
    if not native:
        monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: False)
    student, teacher = pair(networks.vgg, width=16)
    x, y = batch(4, 32, 32)
    options = {"batch_stats": batch_stats}
    wide = [copy.deepcopy(m).double() for m in (student, teacher)]
    exact = step(*wide, x.double(), y, target, strategy="autograd", **options)
    naive = step(student, teacher, x, y, target, strategy="autograd", **options)
    ours = step(student, teacher, x, y, target, strategy="auto", **options)

    def error(found):
        total = sum(
            float((found[k].double() - v).square().sum())
            for k, v in exact.items()
            if k.startswith("gradient")
        )
        return total**0.5

    assert error(naive) > 0
    assert error(ours) <= 2 * error(naive)


@pytest.mark.parametrize("strategy", ["dense", "local"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize(("network", "layer"), [(networks.vgg, "7"), (networks.Residual, "last")])
def test_without_native_operators(network, layer, mode, batch_stats, strategy, monkeypatch):
    """Every BatchNorm, addition, activation and pool is then a call of its own."""
    monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: False)
    student, teacher = pair(network)
    MODES[mode](student)
    options = {"batch_stats": batch_stats, "strategy": strategy}
    if batch_stats == "frozen" or mode == "eval":
        target = AttentionWindow(layer, window=0.4)
        assert_exact(student, teacher, *batch(), target, **options)
    if strategy == "dense":
        assert_exact(student, teacher, *batch(3), LabelLogit(), **options)


def test_hardsigmoid():
    """PyTorch has no double backward of it: the oracle is another spelling of the same function.

    PyTorch's has a sixth in float32, whatever the dtype.
    """
    student, teacher = pair(lambda: networks.Blocks(nn.Hardsigmoid(), 4).double())
    spelt = copy.deepcopy(student)
    spelt.middle = nn.Sequential(networks.Shift(), nn.ReLU6(), networks.Divide())
    x, y = batch(2, 12, 10)
    wanted = step(spelt, teacher, x.double(), y, LabelLogit(), strategy="autograd")
    got = step(student, teacher, x.double(), y, LabelLogit())
    assert relative_error(got, wanted) < (1e-6, "")
