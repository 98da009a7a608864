"""What cannot be right is one clear error; what only looks wrong is right."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    attention_match_loss,
    fuse,
    input_jacobian,
    with_jacobian,
)

WINDOW = AttentionWindow("pool")
STRATEGIES = pytest.mark.parametrize("strategy", ["auto", "autograd"])
LABELS = torch.tensor([0, 1, 3])


def network(seed: int = 0, **replaced: nn.Module) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 3, 3, padding=1),
        norm=nn.BatchNorm2d(3),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        body=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()),
        mean=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(3, 4),
    )
    return nn.Sequential(OrderedDict(layers, **replaced)).double()


def images(side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed)).double()


def matching(target=WINDOW, student=None, teacher=None, **options) -> JacobianMatching:
    return JacobianMatching(student or network(), teacher or network(7), target, **options)


def step(matcher: JacobianMatching, x: Tensor, y: Tensor = LABELS) -> tuple:
    matcher.student.zero_grad()
    out = matcher(x, y)
    (F.cross_entropy(out.student_logits, y) + 3 * out.jacobian_loss).backward()
    return out.jacobian_loss.detach(), [p.grad for p in matcher.student.parameters()]


def check_against_autograd(target, student, x, y=LABELS, teacher=None, strategy="auto", **options):
    got = step(
        matching(target, copy.deepcopy(student), teacher, strategy=strategy, **options), x, y
    )
    expected = step(matching(target, student, teacher, strategy="autograd", **options), x, y)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert got[0] > 0


# Arguments


TARGET = r"target: expected a Target \(LabelLogit\(\), .*\) or a tuple of them; "


def fails(message: str):
    return pytest.raises(FastjacError, match=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "locl"}, r"unknown strategy 'locl'; nearest: 'local'"),
        ({"batch_stats": "frozn"}, r"unknown batch_stats 'frozn'; nearest: 'frozen'"),
        ({"target": "pool"}, TARGET + "got str$"),
        ({"target": None}, TARGET + "got NoneType$"),
        ({"target": LabelLogit}, TARGET + "got LabelLogit itself$"),
        ({"target": AttentionWindow("pol")}, "unknown layer 'pol' in the student; nearest: 'pool'"),
        ({"target": AttentionWindow("")}, "unknown layer '' in the student; nearest: 'conv'"),
        ({"batch_stats": True}, r"unknown batch_stats True; nearest: 'frozen'"),
        (
            {"target": AttentionWindow("conv"), "teacher": nn.Sequential(network(7))},
            r"unknown layer 'conv' in the teacher; .*; teacher_layer= names the teacher's$",
        ),
        (
            {"target": AttentionWindow("pool", teacher_layer="body.01")},
            r"unknown layer 'body.01' in the teacher; nearest: 'body.1', 'body.0', 'body'",
        ),
    ],
    ids=str,
)
def test_arguments_of_a_matcher(options, message):
    with fails(message):
        matching(**options)


def test_what_is_no_module():
    layer, function = nn.Linear(4, 3), lambda x: x
    with fails(r"^student: expected a torch.nn.Module, got function; of a function, a Module"):
        JacobianMatching(function, layer)
    with fails(r"^teacher: expected a torch.nn.Module, got NoneType"):
        JacobianMatching(layer, None)
    with fails(r"^fuse: expected a torch.nn.Module, got function$"):
        fuse(function)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"window is a share of the map's height, in \(0, 1\]; got 0"),
        ({"window": 1.5}, "window is a share.*got 1.5"),
        ({"power": 0.5}, "power must be 1 or at least 2; got 0.5"),
        ({"power": 1.5}, "power must be 1 or at least 2; got 1.5"),
        ({"anchor": "students"}, "anchor is 'teacher' or 'own'; got 'students'"),
    ],
    ids=str,
)
def test_arguments_of_a_window(options, message):
    with fails("AttentionWindow: " + message):
        AttentionWindow("pool", **options)


@STRATEGIES
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "LabelLogit needs the labels y; got None"),
        (LABELS.int(), r"labels y: expected int64 \[3\], got int32 \[3\]"),
        (LABELS.double(), r"labels y: expected int64 \[3\], got float64 \[3\]"),
        (LABELS[:2], r"labels y: expected int64 \[3\], got int64 \[2\]"),
        (F.one_hot(LABELS), r"labels y: expected int64 \[3\], got int64 \[3, 4\]"),
        (LABELS + 1, "labels y: expected 0 to 3, got 1 to 4"),
        (LABELS - 1, "labels y: expected 0 to 3, got -1 to 2"),
        (LABELS.to("meta"), "labels y are on meta; the model's logits are on cpu"),
    ],
    ids=str,
)
def test_labels(y, message, strategy):
    with fails(message):
        matching(LabelLogit(), strategy=strategy)(images(), y)
    with fails(message):
        input_jacobian(network(), images(), LabelLogit(), y, strategy=strategy)


@STRATEGIES
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images().float(), "x is torch.float32; the student is torch.float64"),
        (images().to("meta"), "x is on meta; the student is on cpu"),
        (
            images().long(),
            r"^x: expected a floating-point batch .* got torch.int64 \[3, .*embeddings",
        ),
        ((images() * 255).byte(), r"got torch.uint8 \[3, .*; x.float\(\) / 255"),
        (
            images()[0, 0, 0],
            r"x: expected a floating-point batch \[B, ...\], got torch.float64 \[16",
        ),
        (images().requires_grad_(), r"x requires grad.*expected x.detach\(\)"),
        (
            torch.nested.nested_tensor([*images()]),
            "x: expected an ordinary tensor.*a nested tensor",
        ),
        (images().float().to_mkldnn(), "x: expected an ordinary tensor.*an MKL-DNN tensor"),
    ],
    ids=["dtype", "device", "integers", "pixels", "one axis", "requires grad", "nested", "MKL-DNN"],
)
def test_x(x, message, strategy):
    with fails(message):
        matching(strategy=strategy)(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.float(), "x is torch.float64; the teacher is torch.float32"),
        (lambda t: t.to("meta"), "x is on cpu; the teacher is on meta"),
    ],
    ids=["dtype", "device"],
)
def test_the_teachers_dtype_and_device(change, message):
    with fails(message):
        matching(teacher=change(network(7)))(images())


@STRATEGIES
@pytest.mark.parametrize(
    ("position", "message"),
    [
        (torch.zeros(3, 2), r"position: expected int64 \[3, 2\], got torch.float32 \[3, 2\]"),
        (torch.zeros(2, 2).long(), r"position: expected int64 \[3, 2\], got torch.int64 \[2, 2\]"),
        (torch.full((3, 2), 8), r"position: expected 0 to \[7, 7\], got \[8, 8\] to \[8, 8\]"),
        (torch.full((3, 2), -1), r"position: expected 0 to \[7, 7\], got \[-1, -1\] to"),
    ],
    ids=["dtype", "shape", "beyond", "before"],
)
def test_a_windows_position(position, message, strategy):
    with fails(message):
        input_jacobian(network(), images(), WINDOW, position=position, strategy=strategy)
    with fails("position is for AttentionWindow; the target is LabelLogit"):
        input_jacobian(network(), images(), LabelLogit(), LABELS, position, strategy=strategy)


# Layers


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 3)
        self.aside = nn.Sequential(nn.Conv2d(3, 3, 3), Negative())
        self.pair = Pair()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.head(self.pair(self.conv(self.conv(x)))[0].mean((2, 3)))


class Aside(nn.Module):
    """A layer beside the one that gives the logits; every parameter gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.aside = nn.Sequential(nn.Conv2d(3, 3, 3))
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.inner(x)


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@STRATEGIES
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv", "layer 'conv' runs 2 times in one forward; expected once"),
        ("unused", "layer 'unused' runs 0 times in one forward; expected once"),
        ("pair", "layer 'pair' is not a feature map: it returns tuple"),
        ("head", r"layer 'head' is not a feature map: expected \[B, C, h, w\], got \[3, 4\]"),
    ],
)
def test_a_layer_that_gives_no_feature_map(layer, message, strategy):
    with fails(message):
        matching(AttentionWindow(layer), Twice().double(), Twice().double(), strategy=strategy)(
            images()
        )


@pytest.mark.parametrize("strategy", ["auto", "dense", "local"])
def test_a_layer_without_influence_on_the_output(strategy):
    """phi is a function of the features alone, so that its J is well defined."""
    target, student, x = AttentionWindow("aside"), Twice().double(), images()
    expected = input_jacobian(student, x, target, strategy="autograd")
    assert expected.norm() > 0
    got = input_jacobian(student, x, target, strategy=strategy)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    out = matching(target, student, Twice().double(), strategy=strategy)(x)
    (out.student_logits.square().mean() + out.jacobian_loss).backward()
    assert student.aside[0].weight.grad.norm() > 0
    teacher = Aside().double()
    nn.init.normal_(teacher.aside[0].weight)
    target = AttentionWindow("aside.0")
    check_against_autograd(target, Aside().double(), x, teacher=teacher, strategy=strategy)


@STRATEGIES
def test_features_overwritten_in_place(strategy):
    student = network(relu=nn.ReLU(inplace=True))
    with fails("layer 'norm' is overwritten in place.*name the layer after it, or use inplace"):
        matching(AttentionWindow("norm"), student, strategy=strategy)(images())
    check_against_autograd(AttentionWindow("relu"), student, images(), strategy=strategy)


@STRATEGIES
def test_a_window_larger_than_the_map(strategy):
    target = AttentionWindow("pool", window=1)
    with fails(r"layer 'pool': a 8x8 window \(1 of the height\) is larger than the 8x4 map"):
        matching(target, strategy=strategy)(images()[:, :, :, :8])
    if strategy == "auto":
        check_against_autograd(target, network(), images()[:, :, :8])


@pytest.mark.parametrize("anchor", ["teacher", "own"])
@pytest.mark.parametrize("strategy", ["auto", "dense"])
@pytest.mark.parametrize("layer", ["conv", "body"])
def test_teacher_features_of_another_size_are_no_error(layer, strategy, anchor):
    target = AttentionWindow("pool", anchor=anchor, teacher_layer=layer)
    check_against_autograd(target, network(), images(20), strategy=strategy)
    other = network(7, pool=nn.MaxPool2d(3))
    check_against_autograd(target, network(), images(20), teacher=other, strategy=strategy)


def test_attention_maps_of_other_sizes_are_an_error():
    with fails(
        r"attention_match_loss .*one shape.*got student \[2, 5, 5\] and teacher \[2, 4, 5\]"
    ):
        attention_match_loss(torch.rand(2, 3, 5, 5), torch.rand(2, 6, 4, 5))


# Networks


class Branching(nn.Module):
    """Its forward reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh() if x.sum() > 0 else self.conv(x).sigmoid()


class BranchingNetwork(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = network(seed)
        self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.pool(x).sum() > 0 else -self.inner(2 * x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("inner.pool")], ids=str)
def test_control_flow_of_a_network_is_what_ran(target, sign):
    x = images() - 0.5 + sign
    for strategy in ("auto", "dense"):
        student, teacher = BranchingNetwork(), BranchingNetwork(7)
        check_against_autograd(target, student, x, teacher=teacher, strategy=strategy)
    matcher, plain = matching(LabelLogit(), BranchingNetwork()), network()
    got = step(matcher, x)
    if sign > 0:
        expected = step(matching(LabelLogit(), plain, strategy="autograd"), x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for again in (-sign, sign):  # the other branch in the next step, and back
        expected = step(
            matching(LabelLogit(), copy.deepcopy(matcher.student), strategy="autograd"), again * x
        )
        torch.testing.assert_close(step(matcher, again * x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", [WINDOW, LabelLogit(), AttentionWindow("body")], ids=str)
def test_control_flow_inside_a_submodule(target):
    for strategy in ("auto", "dense"):
        student = network(body=Branching())
        check_against_autograd(target, student, images(), strategy=strategy)


@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("body")], ids=str)
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_a_batch_norm_inside_a_submodule_with_control_flow(target, batch_stats):
    def student() -> nn.Module:
        body = Branching()
        body.conv = nn.Sequential(body.conv, nn.BatchNorm2d(3))
        return network(body=body)

    check_against_autograd(target, student(), images(), batch_stats=batch_stats)
    check_against_autograd(target, student().eval(), images(), batch_stats=batch_stats)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 3).double())

    def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        return ((x * scale + shift).tanh().mean((2, 3)) * self.weight).sin()


def test_a_network_of_two_inputs_needs_both():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'scale'"):
        matching(LabelLogit(), TwoInputs())(images(), LABELS)
    found = []
    for strategy in ("auto", "autograd"):
        student = TwoInputs()
        out = with_jacobian(
            *(student, images(), LabelLogit(), LABELS % 3),
            args=(torch.rand(16, generator=torch.Generator().manual_seed(1)).double(),),
            kwargs={"shift": 0.25},
            strategy=strategy,
        )
        (out.jacobian.square().sum() + out.output.square().sum()).backward()
        found.append((out.output.detach(), out.jacobian.detach(), student.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert found[0][1].norm() > 0


def test_x_among_the_other_inputs_is_an_error():
    x = images()
    for given in ({"args": (x,)}, {"kwargs": {"scale": [x]}}):
        with fails("(kwargs|args) has x itself, which would be a constant there; expected a model"):
            with_jacobian(TwoInputs(), x, LabelLogit(), LABELS, **given)


class NoTensor(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = network(seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"out": logits, "aux": [2 * logits]}


def test_a_network_that_returns_a_structure_needs_an_output():
    message = (
        "NoTensor must return one tensor, or output= must say which; got dict with 'out', 'aux'"
    )
    with fails(message):
        matching(LabelLogit(), NoTensor())(images(), LABELS)
    with fails("output='ouch': NoTensor returned dict, which has no such item"):
        matching(LabelLogit(), NoTensor(), NoTensor(), output="ouch")(images(), LABELS)
    with fails("output='aux' of NoTensor must be a tensor; got list"):
        matching(LabelLogit(), NoTensor(), NoTensor(), output="aux")(images(), LABELS)
    expected = step(matching(LabelLogit(), strategy="autograd"), images())
    for teacher, teacher_output in ((NoTensor(7), None), (network(7), lambda logits: logits)):
        for output in ("out", lambda found: found["aux"][0] / 2):
            options = {"output": output, "teacher_output": teacher_output}
            if isinstance(teacher, NoTensor):
                options["teacher_output"] = "out"
            matcher = matching(LabelLogit(), NoTensor(), teacher, **options)
            torch.testing.assert_close(step(matcher, images()), expected, rtol=1e-9, atol=1e-12)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(3, 4)


class Detached(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).detach() @ self.logits.expand(3, 4)


@STRATEGIES
@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Constant(), r"the target does not depend on the input x \(LabelLogit\)"),
        (Detached(), r"the target does not depend on the input x \(LabelLogit\).*a detach"),
        (
            nn.Conv2d(3, 3, 3).double(),
            r"needs logits \[B, classes\]; the model gave \[3, 3, 14, 14\]",
        ),
    ],
    ids=["a constant", "detached", "a map"],
)
def test_networks_of_another_kind(student, message, strategy):
    with fails(message):
        matching(LabelLogit(), student, strategy=strategy)(images(), LABELS)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2).sub_(0.5))


@STRATEGIES
def test_a_network_that_overwrites_its_input_overwrites_a_copy(strategy):
    x, before = images(), images()
    matcher = matching(LabelLogit(), Overwriting().eval(), Overwriting(), strategy=strategy)
    assert step(matcher, x)[0] < 1e-24  # the same network, on the same pixels
    check_against_autograd(LabelLogit(), Overwriting(), x, strategy=strategy)
    assert torch.equal(x, before)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.squeeze(x)


def test_local_on_what_is_global_names_the_first_global_call():
    with fails("strategy='local' needs a target with local support; global: the target reads"):
        matching(LabelLogit(), strategy="local")(images(), LABELS)
    student = network(body=nn.Sequential(SqueezeExcite(), nn.Tanh(), SqueezeExcite()))
    # The sweep goes down from the window: the last one is the first that it meets.
    with fails(r"global: mul in module 'body.2': it broadcasts over the map"):
        matching(AttentionWindow("body"), student, strategy="local")(images())
    with fails(
        "global: batch_norm in module 'norm': BatchNorm in train mode with batch_stats='batch'"
    ):
        matching(strategy="local", batch_stats="batch")(images())
    for batch_stats in ("frozen", "batch"):
        target = AttentionWindow("body")
        check_against_autograd(target, student, images(), batch_stats=batch_stats)


def test_synchronised_batch_norm_without_processes_is_batch_norm():
    student = nn.SyncBatchNorm.convert_sync_batchnorm(network()).eval()
    assert isinstance(student.norm, nn.SyncBatchNorm)
    check_against_autograd(WINDOW, student, images())


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "conv.weight", "head.bias", "teacher"])
@pytest.mark.parametrize("target", [WINDOW, LabelLogit()], ids=["window", "logit"])
def test_nan_and_inf_propagate_as_in_autograd(target, where, value):
    x, student, teacher = images(), network().eval(), network(7)
    if where == "x":
        x[1, 0, 3, 4] = value
    else:
        model, name = (teacher, "conv.weight") if where == "teacher" else (student, where)
        model.get_parameter(name).data.view(-1)[0] = value
    got, expected = (
        matching(target, copy.deepcopy(student), teacher, strategy=strategy)(x, LABELS)
        for strategy in ("auto", "autograd")
    )
    torch.testing.assert_close(got.jacobian_loss, expected.jacobian_loss, equal_nan=True)
    torch.testing.assert_close(got.student_logits, expected.student_logits, equal_nan=True)
    got.jacobian_loss.backward()
    if value != value and where in ("x", "conv.weight"):
        assert got.student_logits.isnan().any()


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("target", [WINDOW, LabelLogit()], ids=["window", "logit"])
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_an_all_zero_jacobian_gives_a_finite_loss_and_gradient(dead, target, normalize):
    student, teacher = network().eval(), network(7)
    for name, model in (("student", student), ("teacher", teacher)):
        if dead in (name, "both"):
            model.norm.bias.data.fill_(-1e3)  # no ReLU lets anything through
    for strategy in ("auto", "dense"):
        loss, grads = step(
            matching(target, student, teacher, normalize=normalize, strategy=strategy), images()
        )
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in grads)
        assert grads[-1].norm() > 0
        if dead == "both":
            assert loss == 0
        elif normalize:
            torch.testing.assert_close(loss, torch.ones_like(loss), rtol=1e-9, atol=0)


def test_one_dead_sample_leaves_the_others_alone():
    student, x = network(norm=nn.Identity()).eval(), images()
    student.conv.bias.data.fill_(-1e-3)
    x[1] = 0
    loss, grads = step(matching(WINDOW, student), x)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert input_jacobian(student, x, WINDOW)[1].count_nonzero() == 0
    assert grads[0].norm() > 0


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
def test_a_batch_norm_of_one_value(batch_stats, native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: False)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"more than 1 value per channel.* \S*\[1, 5"):
        with_jacobian(model, torch.rand(1, 6), LabelLogit(), LABELS[:1], batch_stats=batch_stats)
