"""norm_act_pool's device code, as the operators launch it, against the references in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastjac import ops

pytestmark = pytest.mark.check

POOLS = {"none": (1, 1, 0), "2x2": (2, 2, 0), "3x3": (3, 2, 1), "3x3-unpadded": (3, 2, 0)}
ACTIVATIONS = ["none", "relu", "relu6", "leaky_relu", "silu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 8, 5, 7), (1, 3, 6, 6), (3, 16, 4, 16), (1, 1, 3, 3), (2, 41, 7, 4)]
SLOPE = 0.25
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}

each_pool = pytest.mark.parametrize("pool", POOLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_format = pytest.mark.parametrize("layout", FORMATS)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_shape(shape, pool):
    k, s, p = POOLS[pool]
    return (*shape[:2], *((n + 2 * p - k) // s + 1 for n in shape[2:]))


class Case:
    """The arguments of one call; values are few, so that windows tie and z falls on kinks."""

    def __init__(self, shape, dtype, layout, pool, *, residual=False, affine=True, seed=0):
        self.make = torch.Generator().manual_seed(seed)
        self.shape, self.dtype, self.layout, self.pool = shape, dtype, layout, pool
        self.u = self.map(shape)
        self.residual = self.map(shape) if residual else None
        self.weight = self.channels(0.5, 1.5) if affine else None
        self.bias = self.channels(-1, 1) if affine else None
        self.mean, self.invstd = self.channels(-1, 1), self.channels(0.5, 2)
        self.gy = self.map(output_shape(shape, pool))
        self.tu, self.curvature = self.map(shape), self.map(shape)
        self.tresidual = self.map(shape) if residual else None
        self.coefficient = self.channels(-1, 1)

    def map(self, shape) -> Tensor:
        x = torch.randint(-12, 13, shape, generator=self.make) / 4
        return x.to(self.dtype).contiguous(memory_format=FORMATS[self.layout])

    def channels(self, low, high) -> Tensor:
        eighths = torch.randint(
            int(8 * low), int(8 * high) + 1, self.shape[1:2], generator=self.make
        )
        return (eighths / 8).to(accumulator(self.dtype))

    def inputs(self) -> list[Tensor | None]:
        return [self.u, self.residual, self.weight, self.bias, self.mean, self.invstd]

    def like(self, shape) -> Tensor:
        x = torch.empty(shape, dtype=self.dtype, memory_format=FORMATS[self.layout])
        return x.fill_(torch.nan)

    def results(self, *names) -> dict[str, Tensor]:
        """NaN everywhere, to be overwritten."""
        maps = {"y": self.gy.shape, "ty": self.gy.shape}
        like_u = ("gu", "gresidual", "kappa")
        return {
            name: self.like(maps.get(name, self.shape))
            if name in maps or name in like_u
            else torch.full_like(self.mean, torch.nan)
            for name in names
        }


def launch(executor, op, case, activation, results, *, flag=False, seed=0, **tensors):
    names = ("u", "residual", "weight", "bias", "mean", "invstd")
    named = dict(zip(names, case.inputs(), strict=True))
    if op.startswith("statistics"):
        named = {"u": case.u}
    pointers = {
        name: x.data_ptr() for name, x in {**named, **tensors, **results}.items() if x is not None
    }
    return executor.norm_act_pool(
        *(op, str(case.dtype).removeprefix("torch."), case.shape, case.layout == "channels-last"),
        *(ACTIVATIONS.index(activation), SLOPE, POOLS[case.pool], flag, pointers, seed),
    )


def forward(executor, case, activation="relu", **kwargs):
    out = case.results("y")
    launch(executor, "forward", case, activation, out, **kwargs)
    return out["y"]


def backward(executor, case, activation, training, extra, mask=(True,) * 4, **kwargs):
    names = ("gu", "gresidual", "gweight", "gbias")
    out = case.results(*itertools.compress(names, mask))
    added = {"coefficient": case.coefficient, "curvature": case.curvature} if extra else {}
    launch(
        executor, "backward", case, activation, out, flag=training, gy=case.gy, **added, **kwargs
    )
    return tuple(out.get(name) for name in names)


def pushforward(executor, case, activation, batch, curvature, **kwargs):
    out = case.results("ty", "total", "coefficient", *(["kappa"] if curvature else []))
    tangents = {"tu": case.tu, "tresidual": case.tresidual, "gy": case.gy}
    launch(executor, "pushforward", case, activation, out, flag=batch, **tangents, **kwargs)
    return tuple(out.get(name) for name in ("ty", "total", "coefficient", "kappa"))


def double(x):
    return x.double() if isinstance(x, Tensor) else x


def check(got, reference, *args):
    """Within twice the reference's own error in this dtype, and rounding of the accumulator."""
    exact = reference(*map(double, args))
    plain = reference(*args)
    if isinstance(got, Tensor):
        got, exact, plain = (got,), (exact,), (plain,)
    for i, (x, truth, same) in enumerate(zip(got, exact, plain, strict=True)):
        if x is None:
            continue
        assert (x.shape, x.dtype) == (truth.shape, same.dtype)
        acc = accumulator(x.dtype)
        scale = truth.abs().max().item() if truth.numel() else 0
        rounding = 50 * torch.finfo(acc).eps * max(scale, 1)
        error = (x.double() - truth).abs()
        allowed = 2 * (same.double() - truth).abs().max().item() + rounding
        assert not error.isnan().any(), f"result {i} is not all written"
        assert error.max().item() <= allowed, f"result {i}"


def run_check(executor, case, activation, kind):
    inputs, options = case.inputs(), (activation, SLOPE, case.pool)
    residual = case.residual is not None
    if kind == "forward":
        check(forward(executor, case, activation), ops.norm_act_pool_ref, *inputs, *options)
    for training, extra in itertools.product((True, False), repeat=2):
        if kind == "backward":
            mask = (True, residual, True, True)
            got = backward(executor, case, activation, training, extra, mask)
            added = (case.coefficient, case.curvature) if extra else (None, None)
            args = (case.gy, *inputs, *options, training, *added, mask)
            check(got, ops.norm_act_pool_backward_ref, *args)
    for batch, curvature in ((False, False), (True, False), (True, True)):
        if kind == "pushforward" and activation != "silu":
            got = pushforward(executor, case, activation, batch, curvature)
            args = (case.tu, case.tresidual, case.gy, *inputs, *options)
            args = (*args, "batch" if batch else "fixed", curvature)
            check(got, ops.norm_act_pool_pushforward_ref, *args)


@pytest.mark.parametrize("kind", ["forward", "backward", "pushforward"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@each_pool
@each_format
@each_dtype
def test_matches_the_reference(executor, dtype, layout, pool, residual, kind):
    for (i, shape), activation in itertools.product(enumerate(SHAPES), ACTIVATIONS):
        if i > 0 and activation != ACTIVATIONS[i]:  # every activation, then every shape
            continue
        case = Case(shape, dtype, layout, pool, residual=residual, affine=i != 1, seed=i)
        run_check(executor, case, activation, kind)


@each_dtype
@each_format
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 1, 1), (5, 64, 9, 8), (1, 264, 5, 5)], ids=str)
def test_statistics(executor, shape, layout, dtype):
    case = Case(shape, dtype, layout, "none")
    case.u += 100
    out = case.results("mean", "var")
    launch(executor, "statistics", case, "none", out)
    check(tuple(out.values()), ops.channel_statistics_ref, case.u)


@each_dtype
@each_format
def test_running_statistics(executor, layout, dtype):
    case = Case((3, 16, 9, 8), dtype, layout, "none")
    out = case.results("mean", "invstd", "running_mean", "running_var")
    out["running_mean"].copy_(torch.linspace(-1, 1, 16))
    out["running_var"].copy_(torch.linspace(0.5, 2, 16))
    running = [out[name].clone() for name in ("running_mean", "running_var")]
    launch(executor, "statistics", case, "none", out)

    def reference(u: torch.Tensor, mean: torch.Tensor, var: torch.Tensor):
        kept = (mean.clone(), var.clone())
        return *ops.batch_norm_statistics_ref(u, *kept, True, 0.25, 1e-3), *kept

    check(tuple(out.values()), reference, case.u, *running)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 300])
@each_dtype
def test_statistics_without_values(executor, dtype, channels, training):
    """Of a map without pixels, zeros; not in training, the running ones, which stay."""
    case = Case((1, channels, 1, 1), dtype, "contiguous", "none")
    out = case.results("mean", "invstd", "running_mean", "running_var")
    running = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    out["running_mean"].copy_(running[0]), out["running_var"].copy_(running[1])
    launch(executor, "statistics without values", case, "none", out, flag=training)
    mean, var = (0 * x if training else x for x in running)
    expected = (mean, (var + 1e-3).rsqrt(), *running)
    for got, x in zip(out.values(), expected, strict=True):
        torch.testing.assert_close(got, x.to(got.dtype), rtol=1e-6, atol=0)


@each_format
def test_statistics_with_a_large_mean(executor, layout):
    case = Case((4, 8, 16, 16), torch.float32, layout, "none")
    noise = torch.randn(case.shape, generator=case.make) + 1e4
    case.u = noise.contiguous(memory_format=FORMATS[layout])
    out = case.results("mean", "var")
    launch(executor, "statistics", case, "none", out)
    mean, var = ops.channel_statistics_ref(case.u.double())
    torch.testing.assert_close(out["mean"].double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(out["var"].double(), var, rtol=2e-6, atol=0)


@each_format
def test_statistics_of_equal_values(executor, layout):
    case = Case((3, 8, 5, 5), torch.float32, layout, "none")
    case.u.fill_(1234.567)
    out = case.results("mean", "var")
    launch(executor, "statistics", case, "none", out)
    assert (out["mean"] == case.u[0, 0, 0, 0]).all()
    assert out["var"].count_nonzero() == 0


@each_format
@pytest.mark.parametrize(
    ("dtype", "lanes"),
    [(torch.float64, 1), (torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)],
    ids=str,
)
@each_pool
def test_whole_vectors_and_their_alignment(executor, pool, dtype, lanes, layout):
    case = Case((1, 32, 4, 32), dtype, layout, pool, residual=True)
    if pool.startswith("3x3"):
        lanes = 1 if layout == "contiguous" else min(lanes, 4)
    y = case.results("y")
    assert launch(executor, "forward", case, "relu", y)[0] == lanes
    room = torch.empty(case.u.numel() + 1, dtype=dtype)[1:]
    case.residual = room.as_strided(case.u.shape, case.u.stride()).copy_(case.residual)
    again = case.results("y")
    assert launch(executor, "forward", case, "relu", again)[0] == 1
    assert torch.equal(y["y"], again["y"])


@each_format
@each_pool
@each_dtype
def test_more_chunks_and_tiles_than_one(executor, dtype, pool, layout):
    # Channels-last: several tiles of channels, the last in part; contiguous: several images.
    shape = (2, 264, 24, 16) if layout == "channels-last" else (3, 4, 64, 128)
    case = Case(shape, dtype, layout, pool)
    out = case.results("gu", "gweight", "gbias")
    _, chunks, tiles = launch(executor, "backward", case, "relu", out, flag=True, gy=case.gy)
    assert min(chunks, tiles) > 1
    args = (case.gy, *case.inputs(), "relu", SLOPE, pool, True, None, None, (1, 0, 1, 1))
    got = (out["gu"], None, out["gweight"], out["gbias"])
    check(got, ops.norm_act_pool_backward_ref, *args)


@each_format
@pytest.mark.parametrize("pool", ["3x3", "3x3-unpadded"])
def test_strips_that_are_cut_and_shared(executor, pool, layout):
    """Several strips in a column, and blocks whose first column is a neighbour's."""
    case = Case((2, 12, 41, 36), torch.float32, layout, pool, residual=True)
    for kind in ("forward", "backward", "pushforward"):
        run_check(executor, case, "relu", kind)


def test_blocks_with_several_turns(executor):
    """So many tiles of channels that a block goes on to further strips."""
    case = Case((1, 16393, 1, 30), torch.float32, "channels-last", "3x3")
    mask = (True, False, False, False)
    got = backward(executor, case, "relu", False, False, mask)
    args = (case.gy, *case.inputs(), "relu", SLOPE, "3x3", False, None, None, mask)
    check(got, ops.norm_act_pool_backward_ref, *args)


@each_format
@each_pool
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(executor, dtype, pool, layout):
    def everything(seed):
        case = Case((2, 40, 12, 16), dtype, layout, pool, residual=True)
        stats = case.results("mean", "var")
        launch(executor, "statistics", case, "none", stats, seed=seed)
        return (
            *stats.values(),
            forward(executor, case, seed=seed),
            *backward(executor, case, "relu", True, True, seed=seed),
            *pushforward(executor, case, "relu", False, False, seed=seed),
            *pushforward(executor, case, "relu", True, True, seed=seed),
        )

    first, *others = (everything(seed) for seed in range(3))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@each_format
@pytest.mark.parametrize("pool", ["2x2", "3x3", "3x3-unpadded"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_windows_choose_as_pytorch_does(executor, activation, pool, layout):
    """Ties, kinks, infinities and NaN: where the cotangent goes, and the value, bit for bit."""
    case = Case((2, 8, 7, 9), torch.float64, layout, pool, seed=3)
    case.weight, case.bias = None, None
    case.mean.zero_(), case.invstd.fill_(1)
    special = torch.tensor([0.0, -0.0, 6.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf, 0.0, 7.0])
    pick = torch.randint(len(special), case.shape, generator=case.make)
    case.u.copy_(special[pick])
    if activation == "silu":  # its derivative at an infinity is NaN
        case.u[case.u.isinf()] = 2.0
    if activation == "relu6":  # at a NaN, PyTorch's depends on the layout
        case.u[case.u.isnan()] = 2.0
    options = (activation, SLOPE, pool)
    y = forward(executor, case, activation)
    torch.testing.assert_close(
        y, ops.norm_act_pool_ref(*case.inputs(), *options), rtol=1e-15, atol=0, equal_nan=True
    )
    gu = backward(executor, case, activation, False, False, (True, False, False, False))[0]
    expected = ops.norm_act_pool_backward_ref(
        *(case.gy, *case.inputs(), *options, False, None, None, (True, False, False, False))
    )[0]
    torch.testing.assert_close(gu, expected, rtol=1e-14, atol=0, equal_nan=True)


@each_format
def test_only_what_is_wanted_is_computed(executor, layout):
    case = Case((2, 8, 6, 6), torch.float32, layout, "2x2", residual=True)
    wanted = backward(executor, case, "relu", True, False)
    for mask in itertools.product((True, False), repeat=4):
        if any(mask):
            got = backward(executor, case, "relu", True, False, mask)
            for x, full, asked in zip(got, wanted, mask, strict=True):
                assert torch.equal(x, full) if asked else x is None


@each_format
@each_pool
def test_low_precision_is_rounded_once(executor, pool, layout):
    """Against what the reference computes in float32 from the same bits."""
    case = Case((2, 16, 8, 8), torch.bfloat16, layout, pool)
    case.u.copy_(torch.randn(case.shape, generator=case.make))
    wide = ops.norm_act_pool_ref(
        *(x if x is None else x.double() for x in case.inputs()), "relu", SLOPE, pool
    )
    error = (forward(executor, case).double() - wide).abs()
    assert (error <= wide.abs() * 2**-8 + math.ulp(1e-6)).all()
