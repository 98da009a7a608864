"""attention_window and its slope against their equations in float64."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from instruction_set import evaluate_on
from torch import Tensor

from fastjac import FastjacError
from fastjac.ops import (
    attention_window,
    attention_window_ref,
    attention_window_slope,
    attention_window_slope_ref,
)
from fastjac.targets import AttentionWindow

OP = torch.ops.fastjac.attention_window
SLOPE = torch.ops.fastjac.attention_window_slope
LAST = torch.channels_last
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POWERS = [1, 2, 2.5, 3, 4]
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"]
)
# Around the lanes and vectors of channels and pixels, and more pixels than one block takes.
SHAPES = [
    ((3, 5, 1, 1), 1),
    ((3, 1, 4, 6), 1),
    ((2, 7, 9, 5), 3),
    ((2, 16, 8, 8), 8),
    ((1, 33, 12, 17), 12),
    ((3, 64, 14, 14), 2),
    ((2, 12, 61, 37), 11),
    ((2, 3, 40, 41), 6),
]


def maps(*shape: int, device="cpu", dtype=torch.float64, seed=0) -> Tensor:
    """Features, made on the CPU, brightest at a place of the sample's own."""
    make = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=make, dtype=torch.float64)
    z = (z * (0.5 + torch.rand(shape[0], 1, *shape[2:], generator=make))).to(device, dtype)
    assert z.device.type == device
    return z


def pooled_truth(z: Tensor, k: int, power: float) -> Tensor:
    """P, as its definition says it, in float64."""
    windows = z.double().abs().pow(power).unfold(2, k, 1).unfold(3, k, 1)
    return windows.mean((1, 4, 5))


def at(pooled: Tensor, position: Tensor) -> Tensor:
    return pooled[torch.arange(len(pooled), device=pooled.device), position[:, 0], position[:, 1]]


def check(z: Tensor, k: int, power: float, tolerance: float) -> None:
    position, value = attention_window(z, k, power)
    expected_position, expected_value = attention_window_ref(z.double(), k, power)
    assert position.device == value.device == z.device
    assert (position.dtype, position.shape) == (torch.int64, (len(z), 2))
    assert value.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=0)
    if z.dtype == torch.float64:
        assert torch.equal(position, expected_position)
    else:  # the best window up to the rounding of its value
        found = at(pooled_truth(z, k, power), position)
        torch.testing.assert_close(found, expected_value, rtol=tolerance, atol=0)


@pytest.mark.parametrize("power", POWERS)
def test_the_reference_is_the_equation(power):
    z = maps(3, 4, 9, 8)
    position, value = attention_window_ref(z, 3, power)
    pooled = pooled_truth(z, 3, power)
    torch.testing.assert_close(value, pooled.amax((1, 2)))
    torch.testing.assert_close(value, at(pooled, position))
    assert len(position.unique(dim=0)) > 1

    leaf = z.clone().requires_grad_()
    phi = at(pooled_truth(leaf, 3, power), position).sum()
    (gradient,) = torch.autograd.grad(phi, leaf, create_graph=True)
    slope, bend = attention_window_slope_ref(z, position, 3, power)
    rows = [slice(p, p + 3) for p in position[:, 0]]
    columns = [slice(p, p + 3) for p in position[:, 1]]
    inside = torch.stack([gradient[b, :, rows[b], columns[b]] for b in range(3)])
    torch.testing.assert_close(slope, inside)
    torch.testing.assert_close(slope.sum(), gradient.sum())  # and nothing outside
    if power > 1:
        (second,) = torch.autograd.grad(inside.sum(), leaf)
        second = torch.stack([second[b, :, rows[b], columns[b]] for b in range(3)])
        torch.testing.assert_close(bend, second)
    else:
        assert bend.count_nonzero() == 0


@LAYOUTS
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_matches_the_reference(device, shape, k, power, layout):
    z = maps(*shape, device=device).to(memory_format=layout)
    check(z, k, power, 1e-13)


@LAYOUTS
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "k"), SHAPES[1:], ids=str)
def test_low_precision(device, shape, k, dtype, power, layout):
    z = maps(*shape, device=device, dtype=dtype).to(memory_format=layout)
    check(z, k, power, 2e-6)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_error_at_most_twice_the_references(device, dtype, layout):
    z = maps(8, 512, 14, 14, device=device, dtype=dtype).to(memory_format=layout)
    truth = attention_window_ref(z.double(), 5)[1]
    reference = (attention_window_ref(z, 5)[1] - truth).norm() / truth.norm()
    ours = (attention_window(z, 5)[1] - truth).norm() / truth.norm()
    assert ours <= 2 * reference + torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("power", [1, 2, 3])
def test_is_the_targets_position_and_scalar(device, power):
    z = maps(5, 24, 28, 30, device=device)
    target = AttentionWindow("layer", window=0.2, power=power)
    position, value = attention_window(z, target.side(z), power)
    pooled = target.pooled(z)
    index = pooled.flatten(1).argmax(1)
    assert torch.equal(
        position, torch.stack([index // pooled.shape[2], index % pooled.shape[2]], 1)
    )
    assert torch.equal(position, target.position(z))
    torch.testing.assert_close(value, target.at(position).scalar(z, z, None), rtol=1e-13, atol=0)


@LAYOUTS
def test_of_equal_windows_the_first_is_found(device, layout):
    def found(z: Tensor) -> list[int]:
        (row,) = attention_window(z.to(memory_format=layout), 3)[0].tolist()
        return row

    z = torch.zeros(1, 4, 40, 50, device=device)
    assert found(z) == [0, 0]
    assert found(z + 1) == [0, 0]
    for row, column in ((30, 41), (7, 45), (7, 12), (2, 47)):  # each before the last in row order
        z[0, 1, row, column] = 2.0
        assert found(z) == [row - 2, column - 2]


@LAYOUTS
def test_nan_and_inf_as_in_argmax(device, layout):
    z = maps(4, 6, 40, 50, device=device)
    z[0, 2, 30, 20] = math.nan
    z[1, 3, 20, 30] = math.inf
    z[2, 3, 20, 30], z[2, 0, 25, 5], z[2, 1, 39, 49] = -math.inf, math.nan, math.nan
    z[3, 3, 20, 30], z[3, 0, 22, 5] = -math.inf, math.inf
    position, value = attention_window(z.to(memory_format=layout), 3)
    expected = attention_window_ref(z, 3)
    assert position.tolist() == [[28, 18], [18, 28], [23, 3], [18, 28]]
    assert torch.equal(position, expected[0])
    torch.testing.assert_close(value, expected[1], equal_nan=True)


def test_a_bright_window_leaves_no_rounding_in_the_others(device):
    """A sum that runs from window to window would carry it on."""
    z = torch.zeros(1, 1, 9, 400, device=device)
    z[0, 0, 4, 10] = 1e6
    z[0, 0, 4, 300] = 1e-3
    assert attention_window(z, 3)[0].tolist() == [[2, 8]]
    z[0, 0, 4, 10] = math.nan
    z[0, 0, 2, 390] = math.nan
    assert attention_window(z, 3)[0].tolist() == [[0, 388]]


def views(device: str) -> dict[str, Tensor]:
    z = maps(4, 6, 12, 10, device=device)
    last = z.to(memory_format=LAST)
    odd = torch.zeros(z.numel() + 1, device=device, dtype=torch.float64)[1:].view(4, 12, 10, 6)
    return {
        "crop": z[:, :, 2:11, 1:8],
        "crop, channels last": last[:, :, 2:11, 1:8],
        "every other channel": z[:, ::2],
        "half of the channels, channels last": last[:, 1:4],
        "every other pixel": z[:, :, ::2, ::2],
        "every other sample, channels last": last[::2],
        "batch innermost": z.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "transposed": z.transpose(2, 3),
        "expanded": z[:, :1].expand(-1, 6, -1, -1),
        "odd address, channels last": odd.permute(0, 3, 1, 2).copy_(z),
    }


@pytest.mark.parametrize("view", views("cpu"))
def test_any_strides(device, view):
    z = views(device)[view]
    check(z, 3, 2, 1e-13)
    check_slope(z, attention_window(z, 3)[0], 3, 2, 1e-13)


def check_slope(
    z: Tensor,
    position: Tensor,
    k: int,
    power: float,
    tolerance: float,
    atol: float | None = None,
) -> None:
    """To ``tolerance`` of each value, and to ``atol``, or that of the largest."""
    got = attention_window_slope(z, position, k, power)
    expected = attention_window_slope_ref(z.double(), position, k, power)
    layout = attention_window_slope_ref(z, position, k, power)[0].stride()
    for x, y in zip(got, expected, strict=True):
        assert (x.dtype, x.device, x.stride()) == (z.dtype, z.device, layout)
        near = tolerance * y.abs().max() if atol is None else atol
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=near)


@LAYOUTS
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_slope_matches_the_reference(device, shape, k, dtype, power, layout):
    z = maps(*shape, device=device, dtype=dtype).to(memory_format=layout)
    z[:, :, ::2] *= -1
    z[0, 0, 0, 0] = 0
    room = torch.tensor(shape[2:], device=device) - k
    position = torch.stack([i * room // max(1, shape[0] - 1) for i in range(shape[0])])
    if dtype not in (torch.bfloat16, torch.float16):
        check_slope(z, position, k, power, 4 * torch.finfo(dtype).eps)
        return
    # Rounded once: half a unit in the last place, and the accumulator's own error.
    info = torch.finfo(dtype)
    check_slope(z, position, k, power, 0.51 * info.eps, 0.51 * info.eps * info.tiny)


def test_slope_counts_features_outside_as_zero(device):
    z = maps(3, 4, 6, 6, device=device)
    position = torch.tensor([[-1, 2], [4, 5], [90, 0]], device=device)
    for power in POWERS:
        check_slope(z, position, 3, power, 1e-13)


def test_empty(device):
    for shape in ((0, 3, 4, 4), (0, 0, 1, 1)):
        z = maps(*shape, device=device)
        position, value = attention_window(z, 1)
        assert (position.shape, value.shape) == ((0, 2), (0,))
        assert attention_window_slope(z, position, 1)[0].shape == (0, shape[1], 1, 1)
    for shape in ((2, 3, 0, 4), (2, 3, 4, 0)):
        z, position = maps(*shape, device=device), torch.zeros(2, 2, device=device).long()
        size = f"{shape[2]}x{shape[3]}"
        with pytest.raises(FastjacError, match=f"k must be from 1 .*, {size}, got 1"):
            attention_window(z, 1)
        with pytest.raises(FastjacError, match=f"k must be from 1 .*, {size}, got 1"):
            attention_window_slope(z, position, 1)
    position, value = attention_window(maps(2, 0, 3, 3, device=device), 2)
    assert position.tolist() == [[0, 0], [0, 0]]  # the mean of nothing is a NaN, as in PyTorch
    assert value.isnan().all()


def test_opcheck(device):
    for dtype in DTYPES:
        z = maps(3, 4, 5, 6, device=device, dtype=dtype)
        for x in (z, z.to(memory_format=LAST), z[:, :, 1:]):
            torch.library.opcheck(OP.default, (x, 2, 2.0))
            position = attention_window(x, 2)[0]
            torch.library.opcheck(SLOPE.default, (x, position, 2, 3.0))


def test_derivatives_are_errors(device):
    z = maps(2, 3, 5, 5, device=device)
    tracked = z.clone().requires_grad_()
    position, value = attention_window(tracked, 2)
    assert not position.requires_grad
    with pytest.raises(FastjacError, match="attention_window: its derivative is not supported"):
        value.sum().backward()
    slope, _ = attention_window_slope(tracked, position, 2)
    with pytest.raises(FastjacError, match="attention_window_slope: its derivative is not supp"):
        slope.sum().backward()
    for f in (attention_window, lambda x, k: attention_window_slope(x, position, k)):
        with pytest.raises(
            FastjacError, match=r"attention_window.*: forward-mode derivatives \(jvp"
        ):
            torch.func.jvp(lambda x, f=f: f(x, 2)[1], (z,), (z,))


BAD = {
    "features must be a tensor, got NoneType": lambda z: (None, 2),
    r"features must be one of torch\.float64, .*, got torch\.int64": lambda z: (z.long(), 2),
    r"features must be a strided tensor, got torch\.sparse_coo": lambda z: (z.to_sparse(), 2),
    "k must be an integer, got float": lambda z: (z, 2.0),
    r"features must be \[B, C, H, W\], got \[3, 5, 6\]": lambda z: (z[0], 2),
    "k must be from 1 to the map's height and width, 5x6, got 0": lambda z: (z, 0),
    "k must be from 1 to the map's height and width, 5x6, got 6": lambda z: (z, 6),
    r"power must be 1 or at least 2, got 1\.5": lambda z: (z, 2, 1.5),
    "power must be 1 or at least 2, got nan": lambda z: (z, 2, math.nan),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    args = BAD[message](maps(2, 3, 5, 6))
    with pytest.raises(FastjacError, match="^attention_window: " + message):
        attention_window(*args)
    with pytest.raises(FastjacError, match="^attention_window_slope: " + message):
        attention_window_slope(args[0], torch.zeros(2, 2).long(), *args[1:])


BAD_POSITION = {
    "position must be a tensor, got list": [[0, 0]],
    r"position must be torch\.int64, got torch\.float32": torch.zeros(2, 2),
    r"position must be \[2, 2\], got \[3, 2\]": torch.zeros(3, 2).long(),
    "position must have features's device, cpu, got meta": torch.zeros(2, 2).long().to("meta"),
}


@pytest.mark.parametrize("message", BAD_POSITION)
def test_a_bad_position_is_named(message):
    with pytest.raises(FastjacError, match="^attention_window_slope: " + message):
        attention_window_slope(maps(2, 3, 5, 6), BAD_POSITION[message], 2)


@pytest.mark.parametrize("message", list(BAD)[4:])
def test_the_operator_itself_names_bad_input(device, message):
    z, k, *power = BAD[message](maps(2, 3, 5, 6, device=device))
    power = power[0] if power else 2.0
    with pytest.raises(RuntimeError, match="attention_window: " + message):
        OP(z, k, power)
    with pytest.raises(RuntimeError, match="attention_window_slope: " + message):
        SLOPE(z, torch.zeros(2, 2, device=device).long(), k, power)
    with pytest.raises(RuntimeError, match="attention_window_slope: position must be Long, got F"):
        SLOPE(maps(2, 3, 5, 6, device=device), torch.zeros(2, 2, device=device), 2, 2.0)


def digest(device: str) -> str:
    """Of the bits of results over sizes, layouts, dtypes and powers."""
    bits = hashlib.sha256()
    for shape, k in (((3, 37, 45, 43), 9), ((1, 64, 56, 56), 11), ((9, 20, 7, 7), 1)):
        for dtype in DTYPES:
            for layout in (torch.contiguous_format, LAST):
                z = maps(*shape, device=device, dtype=dtype).to(memory_format=layout)
                for power in (1, 2, 3):
                    position, value = attention_window(z, k, power)
                    for x in (position, value, *attention_window_slope(z, position, k, power)):
                        bits.update(x.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def test_bits_are_the_same_from_run_to_run_and_for_any_thread_count(device):
    first, threads = digest(device), torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            assert digest(device) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_bits_are_the_same_for_any_instruction_set(isa):
    assert evaluate_on(isa, __file__, "m.digest('cpu')") == digest("cpu")


def test_compiles_into_one_graph(device):
    z = maps(2, 3, 8, 8, device=device).to(memory_format=LAST)

    def step(z: Tensor) -> tuple[Tensor, ...]:
        position, value = attention_window(z * 2, 3)
        return (position, value, *attention_window_slope(z, position, 3, 3.0))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z)
    for got, expected in zip(compiled, step(z), strict=True):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_captures_into_a_cuda_graph(device):
    z = maps(5, 12, 33, 31, device=device, dtype=torch.float32)

    def step() -> tuple[Tensor, ...]:
        position, value = attention_window(z, 5)
        return (position, value, *attention_window_slope(z, position, 5))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a synchronisation, and on a launch on another stream
        got = step()
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
