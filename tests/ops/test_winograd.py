"""winograd and its weight's gradient against PyTorch's convolution."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from instruction_set import evaluate_on
from torch import Tensor

from fastjac import FastjacError
from fastjac.ops import winograd, winograd_ref, winograd_weight, winograd_weight_ref
from fastjac.ops._library import CPU

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=f"not loaded: {CPU.problem}")

OPS = torch.ops.fastjac
LAST = torch.channels_last
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Around a tile's 2 and 4 pixels, the vectors and panels of 4 to 32 filters, and the blocks of tiles.
SHAPES = [  # B, C, K, H, W
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 9),
    (1, 33, 40, 6, 6),
    (3, 16, 70, 4, 3),
    (2, 64, 31, 3, 17),
    (5, 20, 17, 31, 2),
    (2, 131, 9, 12, 13),
]
PADDINGS = [(0, 0), (1, 1), (2, 2), (0, 2), (2, 1)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
PADDING = pytest.mark.parametrize("padding", PADDINGS, ids=str)


class Case:
    """x, weight, bias and the output's cotangent of one convolution."""

    def __init__(self, shape, padding, dtype=torch.float64, layout=LAST) -> None:
        make = torch.Generator().manual_seed(0)
        batch, channels, filters, height, width = shape
        out = [n + 2 * p - 2 for n, p in zip((height, width), padding, strict=True)]
        if min(out) < 1:
            pytest.skip("smaller than the window")

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=make, dtype=torch.float64).to(dtype)

        self.padding = padding
        self.x = normal(batch, channels, height, width).to(memory_format=layout)
        self.weight = normal(filters, channels, 3, 3).to(memory_format=layout)
        self.bias = normal(filters)
        self.gy = normal(batch, filters, *out).to(memory_format=layout)

    def results(self, convolve, weight_gradient) -> dict[str, Tensor]:
        return {
            "y": convolve(self.x, self.weight, self.bias, self.padding),
            "gx": convolve(self.gy, self.weight, None, self.padding, adjoint=True),
            "gweight": weight_gradient(self.gy, self.x, self.weight, self.padding),
        }

    def native(self) -> dict[str, Tensor]:
        return self.results(winograd, winograd_weight)

    def expected(self) -> dict[str, Tensor]:
        case = Case.__new__(Case)
        case.padding = self.padding
        for name in ("x", "weight", "bias", "gy"):
            setattr(case, name, getattr(self, name).double().contiguous())
        return case.results(winograd_ref, winograd_weight_ref)


@SHAPE
@PADDING
def test_matches_the_reference(shape, padding):
    case = Case(shape, padding)
    got, expected = case.native(), case.expected()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}", **EXACT)
    assert got["y"].is_contiguous(memory_format=LAST)
    assert got["gx"].is_contiguous(memory_format=LAST)
    assert got["gweight"].stride() == case.weight.stride()


@SHAPE
def test_references_are_the_convolutions_derivatives(shape):
    case = Case(shape, (1, 1))
    x, weight, bias = (v.clone().requires_grad_() for v in (case.x, case.weight, case.bias))
    y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    gx, gweight = torch.autograd.grad(y, (x, weight), case.gy)
    expected = {"y": y.detach(), "gx": gx, "gweight": gweight}
    torch.testing.assert_close(case.expected(), expected, **EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
def test_any_layout_of_the_arguments(layout):
    case = Case((2, 20, 12, 7, 6), (1, 1), layout=layout)
    torch.testing.assert_close(case.native(), case.expected(), **EXACT)
    # every other pixel and channel of larger ones
    for name in ("x", "gy"):
        value = getattr(case, name)
        large = torch.full([2 * n for n in value.shape], torch.nan, dtype=value.dtype)
        large[::2, ::2, ::2, ::2] = value
        setattr(case, name, large[::2, ::2, ::2, ::2])
    case.weight = case.weight.transpose(2, 3).contiguous().transpose(2, 3)
    case.bias = torch.stack([case.bias, case.bias], 1)[:, 0]
    torch.testing.assert_close(case.native(), case.expected(), **EXACT)


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    "shape", [(2, 64, 64, 28, 28), (2, 256, 128, 14, 14), (4, 32, 96, 40, 33)], ids=str
)
def test_float32_is_as_near_the_truth_as_pytorchs_sum(shape):
    case = Case(shape, (1, 1), torch.float32)
    got, truth = case.native(), case.expected()
    plain = case.results(winograd_ref, winograd_weight_ref)
    for name, value in truth.items():
        # A short sum over tiles gains less from its blocks than G^T and G lose.
        allowed = 2.5 if name == "gweight" else 1
        assert error(got[name], value) <= allowed * error(plain[name], value), name


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 6), (2, 0, 5, 6, 6), (2, 4, 0, 6, 6)], ids=str)
def test_empty(shape):
    case = Case(shape, (2, 2))
    got = case.native()
    assert got["y"].shape == case.gy.shape
    assert got["gx"].shape == case.x.shape
    assert got["gweight"].shape == case.weight.shape
    y = case.bias.view(1, -1, 1, 1).expand_as(got["y"])  # of no channels
    torch.testing.assert_close(got["y"], y)
    assert got["gweight"].count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_its_outputs_and_its_tiles_alone(value):
    case = Case((1, 3, 4, 12, 12), (1, 1))
    finite = case.native()["y"]
    case.x[0, 1, 5, 6] = value
    y = case.native()["y"]
    assert not y[:, :, 4:7, 5:8].isfinite().any()
    untouched = torch.ones(12, 12, dtype=torch.bool)
    untouched[4:8, 4:8] = False  # the tiles that read it
    assert torch.equal(y[:, :, untouched], finite[:, :, untouched])


@pytest.mark.parametrize("adjoint", [False, True])
def test_gradcheck(adjoint):
    case = Case((2, 3, 4, 5, 4), (1, 0))
    x = (case.gy if adjoint else case.x).clone().requires_grad_()
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    leaves = (x, weight) if adjoint else (x, weight, bias)

    def f(x, weight, bias=None):
        return winograd(x, weight, bias, (1, 0), adjoint)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_gradcheck_of_the_weights_gradient():
    case = Case((2, 3, 4, 5, 4), (1, 0))
    gy, x = case.gy.clone().requires_grad_(), case.x.clone().requires_grad_()

    def f(gy, x):
        return winograd_weight(gy, x, case.weight, (1, 0))

    assert torch.autograd.gradcheck(f, (gy, x))
    assert torch.autograd.gradgradcheck(f, (gy, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype):
    case = Case((2, 3, 4, 5, 7), (1, 2), dtype)
    weight = case.weight.clone().requires_grad_()
    check = torch.library.opcheck
    check(OPS.winograd.default, (case.x, weight, case.bias, 1, 2, False))
    check(OPS.winograd.default, (case.gy, weight, None, 1, 2, True))
    check(OPS.winograd_weight.default, (case.gy.clone().requires_grad_(), case.x, weight, 1, 2))


def test_forward_mode_is_an_error():
    case = Case((2, 3, 4, 5, 7), (1, 1))
    for op, names in ((winograd, ("x", "weight", "bias")), (winograd_weight, ("gy", "x"))):
        args = {name: getattr(case, name) for name in {*names, "weight"}}
        for name in names:
            message = rf"^{op.__name__}: forward-mode derivatives \(jvp\)"
            with pytest.raises(FastjacError, match=message):
                torch.func.jvp(
                    lambda x, op=op, args=args, name=name: op(**{**args, name: x}),
                    (args[name],),
                    (args[name],),
                )


def test_compiles_into_one_graph():
    case = Case((2, 3, 4, 5, 7), (1, 1))

    def step(scale: Tensor) -> Tensor:
        return winograd(case.x * scale, case.weight * scale, case.bias).square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        value = run(scale)
        value.backward()
        results.append((value.detach(), scale.grad))
    torch.testing.assert_close(*results)


def digest(dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> str:
    """Of the bits of results of one and of many blocks."""
    bits = hashlib.sha256()
    for shape, dtype in itertools.product(((2, 40, 33, 9, 8), (3, 70, 36, 40, 41)), dtypes):
        for x in Case(shape, (1, 1), dtype).native().values():
            bits.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def test_bits_are_the_same_from_run_to_run_and_for_any_thread_count():
    first, threads = digest(), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 17, 40):
            torch.set_num_threads(count)
            assert digest() == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_sets(isa):
    """All are near the reference; those with a multiply-add have the same bits."""
    near = "[m.test_matches_the_reference(s, (1, 1)) for s in m.SHAPES]"
    got = evaluate_on(isa, __file__, f"{near}, m.digest()")
    assert isa == "portable" or got == digest()


BAD = {
    "x must be a tensor, got list": {"x": [1.0]},
    r"x must be float64 or float32, got torch\.int64": {"x": lambda c: c.x.long()},
    r"x must be float64 or float32, got torch\.bfloat16": {"x": lambda c: c.x.bfloat16()},
    r"x must be \[B, C, H, W\], got \[3, 6, 6\]": {"x": lambda c: c.x[0]},
    r"x must have 3 channels, got 2": {"x": lambda c: c.x[:, :2]},
    r"x must be a strided tensor, got torch\.sparse_coo": {"x": lambda c: c.x.to_sparse()},
    r"bias must be a strided tensor, got torch\.sparse_coo": {"bias": lambda c: c.bias.to_sparse()},
    r"weight must be \[K, C, 3, 3\], got \[4, 3, 3, 2\]": {"weight": lambda c: c.weight[..., :2]},
    "weight must be .*, got NoneType": {"weight": None},
    "weight must have x's dtype, torch.float64, got torch.float32": {
        "weight": lambda c: c.weight.float()
    },
    "weight must have x's device, cpu, got meta": {"weight": lambda c: c.weight.to("meta")},
    r"bias must be \[4\], got \[3\]": {"bias": lambda c: c.bias[:3]},
    "bias must have x's dtype": {"bias": lambda c: c.bias.float()},
    r"padding must be two of 0, 1, 2, got \(3, 1\)": {"padding": (3, 1)},
    r"padding must be two of 0, 1, 2, got \(1,\)": {"padding": (1,)},
    "x is 2 high, too small for its padding of 0": {
        "x": lambda c: c.x[:, :, :2],
        "padding": (0, 1),
    },
    "expected no bias with adjoint=True": {"x": lambda c: c.gy, "adjoint": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    case = Case((2, 3, 4, 6, 6), (1, 1))
    args = {"x": case.x, "weight": case.weight, "bias": case.bias}
    changes = {k: v(case) if callable(v) else v for k, v in BAD[message].items()}
    with pytest.raises(FastjacError, match="^winograd: " + message):
        winograd(**{**args, **changes})


BAD_WEIGHT = {
    r"gy must be \[2, 4, 6, 6\], got \[2, 4, 6, 5\]": {"gy": lambda c: c.gy[..., :5]},
    "gy must have x's dtype": {"gy": lambda c: c.gy.float()},
    "gy must be float64 or float32, got torch.float16": {"gy": lambda c: c.gy.half()},
    r"gy must be \[B, C, H, W\], got \[4, 6, 6\]": {"gy": lambda c: c.gy[0]},
    r"gy must be a strided tensor, got torch\.sparse_coo": {"gy": lambda c: c.gy.to_sparse()},
    "x must have 3 channels, got 2": {"x": lambda c: c.x[:, :2]},
    r"x must be float64 or float32, got torch\.int64": {"x": lambda c: c.x.long()},
    r"x must be \[B, C, H, W\], got \[3, 6, 6\]": {"x": lambda c: c.x[0]},
    r"weight must be \[K, C, 3, 3\], got \[3, 3, 3\]": {"weight": lambda c: c.weight[0]},
    "weight must have x's dtype": {"weight": lambda c: c.weight.float()},
}


@pytest.mark.parametrize("message", BAD_WEIGHT)
def test_bad_input_of_the_weights_gradient_is_named(message):
    case = Case((2, 3, 4, 6, 6), (1, 1))
    args = {"gy": case.gy, "x": case.x, "weight": case.weight}
    changes = {k: v(case) for k, v in BAD_WEIGHT[message].items()}
    with pytest.raises(FastjacError, match="^winograd_weight: " + message):
        winograd_weight(**{**args, **changes})


NATIVE_BAD = {
    "x must be Float or Double, got BFloat16": {"x": lambda c: c.x.bfloat16()},
    "x must be channels-last": {"x": lambda c: c.x.contiguous()},
    r"x must be \[B, C, H, W\]": {"x": lambda c: c.x[0]},
    r"weight must be \[K, C, 3, 3\]": {"weight": lambda c: c.weight[0]},
    "weight must have x's dtype, Double, got Float": {"weight": lambda c: c.weight.float()},
    "x must have 3 channels, got 4": {"x": lambda c: c.gy},
    r"bias must be contiguous \[4\]": {"bias": lambda c: c.bias[:2]},
    "the padding must be 0, 1 or 2, got 3": {"height": 3},
    "maps of 2x6 are too small": {
        "x": lambda c: c.x[:, :, :2].contiguous(memory_format=LAST),
        "height": 0,
    },
}


@pytest.mark.parametrize("message", NATIVE_BAD)
def test_the_operator_itself_names_bad_input(message):
    case = Case((2, 3, 4, 6, 6), (1, 1))
    args = {"x": case.x, "weight": case.weight, "bias": case.bias, "height": 1}
    args |= {k: v(case) if callable(v) else v for k, v in NATIVE_BAD[message].items()}
    with pytest.raises(RuntimeError, match="winograd: " + message):
        OPS.winograd(*args.values(), 1, False)


NATIVE_BAD_WEIGHT = {
    "x must be Float or Double, got BFloat16": {"x": lambda c: c.x.bfloat16()},
    r"x must be \[B, C, H, W\], got \[3, 6, 6\]": {"x": lambda c: c.x[0]},
    "x must be channels-last": {"x": lambda c: c.x.contiguous()},
    r"gy must be \[B, C, H, W\], got \[4, 6, 6\]": {"gy": lambda c: c.gy[0]},
    "gy must be channels-last": {"gy": lambda c: c.gy.contiguous()},
    "gy must have x's dtype, Double, got Float": {"gy": lambda c: c.gy.float()},
    r"gy must be \[2, 4, 6, 6\], got \[1, 4, 6, 6\]": {"gy": lambda c: c.gy[:1]},
    r"weight must be \[K, C, 3, 3\]": {"weight": lambda c: c.weight[0]},
    "weight must have x's dtype, Double, got Float": {"weight": lambda c: c.weight.float()},
    "weight must have x's channels, 3, got 2": {"weight": lambda c: c.weight[:, :2]},
    "the padding must be 0, 1 or 2, got 3": {"height": 3},
}


@pytest.mark.parametrize("message", NATIVE_BAD_WEIGHT)
def test_the_weights_operator_itself_names_bad_input(message):
    case = Case((2, 3, 4, 6, 6), (1, 1))
    args = {"gy": case.gy, "x": case.x, "weight": case.weight, "height": 1}
    args |= {k: v(case) if callable(v) else v for k, v in NATIVE_BAD_WEIGHT[message].items()}
    with pytest.raises(RuntimeError, match="winograd_weight: " + message):
        OPS.winograd_weight(*args.values(), 1)
